"""Which keypoint head learns best from random weights in equal time: dense grid points, or queries.

    python docs/scripts/pose_kinds.py OUT --data keypoints= --data keypoints=tubes --seeds 3
    python docs/scripts/pose_kinds.py OUT --data keypoints=tubes --sigmas data 0.05 --minutes 10

Trains a small model with either kind of head on each of the data sets, with several seeds and sigmas. A short training
of each kind first measures its seconds per epoch; then every kind gets as many epochs as fit into the time of the first
kind's epochs (or into ``--minutes``), so that each has its whole schedule. The curve of AP goes into the rows, with the
seconds that the training took. See ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, config_of, epochs_of, name_of, parser_of, places, run_trials, tables

from mvision.config import Config
from mvision.engine.train import train
from mvision.errors import Stopped
from mvision.heads import HEADS
from mvision.storage.atomic import write_text

TASK = "keypoints"
FROM_DATA = "data"  # the sigmas of the data set
MEASURED = 3  # epochs by which the longer one of two trainings that measure the time is longer


def main() -> None:
    """Measure what an epoch costs, train what has no row yet, and write the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=HEADS[TASK], default=["dense", "query"])
    parser.add_argument(
        "--sigmas", nargs="+", default=[FROM_DATA], metavar="SIGMA",
        help=f"of all points: a number, or {FROM_DATA} for those of the data set  [default: {FROM_DATA}]",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="of each training, in place of the time of the first kind")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all kinds."""
    where = [folder for task, folder in places(options.data) if task == TASK]
    for seed, folder, sigma in itertools.product(range(options.seeds), where, options.sigmas):
        seconds = {kind: seconds_per_epoch(options, kind, folder) for kind in options.kinds}
        first = seconds[options.kinds[0]] * epochs_of(config_for(options, options.kinds[0], folder, sigma))
        budget = first if options.minutes is None else 60 * options.minutes
        for kind in options.kinds:
            config = config_for(options, kind, folder, sigma)
            config.train.seed = seed
            config.train.epochs = epochs = max(1, round(budget / seconds[kind]))
            config.train.val_interval = max(1, epochs // 8)
            facts = {"train_epochs": epochs, "epoch_seconds": round(seconds[kind], 2)}
            yield Trial({"kind": kind, "sigmas": sigma}, config, facts)


def config_for(options: argparse.Namespace, kind: str, folder: str | None, sigma: str) -> Config:
    """The shipped model's with this kind of head."""
    chosen = {f"model.heads.{TASK}.kind": kind}
    config = config_of(TASK, options, chosen)
    config.data.root = folder
    if sigma != FROM_DATA:
        settings = config.model.heads[TASK]
        config.model.heads[TASK] = settings.model_copy(update={"sigmas": [float(sigma)] * number_of_points(folder)})
    return config


def number_of_points(folder: str | None) -> int:
    """Of the classes of a data set in COCO's layout."""
    if folder is None:
        raise SystemExit("--sigmas: the classes of the built-in set have several numbers of points; give data sets")
    files = sorted(Path(folder).glob("annotations/*.json")) or sorted(Path(folder).glob("*/*.json"))
    if not files:
        raise SystemExit(f"--sigmas: {folder} has no annotations in COCO's layout")
    categories = json.loads(files[0].read_text(encoding="utf-8"))["categories"]
    counts = {len(category["keypoints"]) for category in categories if category.get("keypoints")}
    if len(counts) != 1:
        raise SystemExit(f"--sigmas: the classes of {folder} have {sorted(counts)} points; one number is needed")
    return counts.pop()


def seconds_per_epoch(options: argparse.Namespace, kind: str, folder: str | None) -> float:
    """Of a short training without evaluation; kept in OUT, so that a command that continues has the same epochs."""
    file = options.out / "seconds.json"
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    key = f"{kind} on {name_of(folder)}"
    if key not in known:
        took = []
        for epochs in (1, 1, 1 + MEASURED):  # the first one alone has what is done once in a process, such as imports
            config = config_for(options, kind, folder, FROM_DATA)
            config.train.epochs = config.train.val_interval = epochs
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as parent:
                train(config, output=Path(parent) / "run", device=options.device)
            took.append(time.monotonic() - begin)
        known[key] = max(took[2] - took[1], 1e-3) / MEASURED
        write_text(file, json.dumps(known, indent=1) + "\n")
    return known[key]


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``, and below it the curves."""
    ordered = sorted(rows, key=lambda row: (row["sigmas"], row["kind"]))
    page = tables(ordered, ["kind", "sigmas"], ["head", "sigmas", "epochs", "seconds", "AP on the way"], cells)
    return page.replace("\n\n\n", "\n\n")


def cells(row: Row) -> list[str]:
    way = ", ".join(f"{epoch}: {ap:.3f}" for epoch, ap in row["curve"])
    return [row["kind"], row["sigmas"], str(row["train_epochs"]), f"{row['seconds']:.0f}", way]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

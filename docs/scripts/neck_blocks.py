"""Which fusion block learns best at equal FLOPs, and how many RepBlocks a block should have.

    python docs/scripts/neck_blocks.py OUT --data detection=bccd --data keypoints=tubes --seeds 3
    python docs/scripts/neck_blocks.py OUT --data detection=bccd --blocks csp --downsample conv --depths 1 2 3 4 5

Trains a small model with every kind of block, downsampling and depth (RepBlocks per CSP layer), on each of the data
sets, with several seeds. All necks have the FLOPs, to 2 %, of RT-DETR's blocks with three RepBlocks and the expansion
of the model's config: the expansion of each follows from that. Everything else is the config's.

Each training adds a line to OUT/rows.jsonl as it ends. The same command continues what was stopped, inside a training
too; another one adds to the rows, if models, epochs and settings are the same. OUT/table.md has the last epoch's AP:
mean, lowest and highest over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision.backbone import Backbone
from mvision.commands.equal_flops import expansion_for, neck_flops
from mvision.config import Config, load_config
from mvision.engine.train import train
from mvision.errors import Stopped
from mvision.evaluation.tables import markdown_table
from mvision.heads import head_class
from mvision.neck import HybridEncoder
from mvision.storage.atomic import write_text
from mvision.storage.run_folder import RunFolder

BLOCKS: dict[str, dict[str, Any]] = {
    "csp": {"fusion_block": "csp"},
    "elan": {"fusion_block": "elan"},
    "elan_split": {"fusion_block": "elan", "elan_split": True},
}
TASKS = ("detection", "instance-seg", "keypoints")
TOLERANCE = 0.02  # of FLOPs, relative
BASE_DEPTH = 3  # of the block whose FLOPs all others get

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A fusion to compare."""

    block: str
    downsample: str
    depth: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of the neck, without ``expansion``."""
        return {"elan_split": False, **BLOCKS[self.block], "downsample": self.downsample, "depth": self.depth}


@dataclass(frozen=True)
class Cost:
    """Of the neck of a variant, fused: FLOPs for one image, and relative to the reference."""

    expansion: float
    flops: int
    ratio: float
    parameters: int


def main() -> None:
    """Train what has no row yet, and write the table."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    recipe = {"model": options.model, "epochs": options.epochs, "settings": options.set}
    rows = read_rows(file, recipe)
    variants = [Variant(*names) for names in itertools.product(options.blocks, options.downsample, options.depths)]
    places = [(task, folder) for task, folder in options.data if task in options.tasks]
    configs = {task: config_of(task, options) for task, _ in places}
    costs = {(task, variant): cost(config, variant) for task, config in configs.items() for variant in variants}
    done = {key_of(row) for row in rows}
    # Seeds come last, so that a table of what is there compares all variants.
    for seed, (task, folder), variant in itertools.product(range(options.seeds), places, variants):
        row = {"task": task, "data": name_of(folder), **asdict(variant), "seed": seed}
        if key_of(row) in done:
            continue
        begin = time.monotonic()
        run = options.out / "runs" / "-".join(str(part) for part in key_of(row))
        of_neck = costs[task, variant]
        row |= {**asdict(of_neck), "ap": train_one(configs[task], folder, variant, of_neck, seed, run, options.device)}
        row |= {"seconds": round(time.monotonic() - begin, 1), "torch": torch.__version__, **recipe}
        rows.append(row)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(run)
        (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the rows and the table")
    parser.add_argument(
        "--data", action="append", default=[], type=task_and_folder, metavar="TASK=FOLDER",
        help="a data set to train TASK on; may be repeated.  [default: the built-in set, for all tasks]",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="leave the others of --data out")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--downsample", nargs="+", choices=("conv", "separable"), default=["conv", "separable"])
    parser.add_argument("--depths", nargs="+", type=int, default=[BASE_DEPTH], metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0")
    parser.add_argument("--model", default="tiny", help="a shipped config")
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the config's")
    parser.add_argument("--set", "-o", action="append", default=[], metavar="KEY=VALUE", help="as in mvision train")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    options.data = options.data or [(task, None) for task in TASKS]
    names = [(task, name_of(folder)) for task, folder in options.data]
    if len(set(names)) < len(names):
        parser.error("--data: two folders of one name for one task, which rows could not tell apart")
    return options


def task_and_folder(text: str) -> tuple[str, str]:
    task, equals, folder = text.partition("=")
    if not equals or task not in TASKS:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FOLDER with a task of {', '.join(TASKS)}")
    return task, folder


def name_of(folder: str | None) -> str:
    return Path(folder).resolve().name if folder else "built-in"


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "data", "block", "downsample", "depth", "seed"))


def read_rows(file: Path, recipe: Row) -> list[Row]:
    """The rows of earlier commands, which must have the same recipe: a table has one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if any(row[name] != value for name, value in recipe.items()):
            other = {name: row[name] for name in recipe}
            raise SystemExit(f"{file} has rows of {other}, not of {recipe}: choose another folder")
    return rows


def config_of(task: str, options: argparse.Namespace) -> Config:
    overrides = {} if options.epochs is None else {"train.epochs": options.epochs}
    return load_config(options.model, tasks=[task], overrides=overrides, assignments=options.set)


def cost(config: Config, variant: Variant) -> Cost:
    """The neck's; the expansion is the one with the reference's FLOPs."""
    backbone = Backbone(config.model.backbone.model_copy(update={"pretrained": False}), config.model.image_size)
    maps = (backbone.channels, backbone.strides, max(config.model.image_size))
    settings = config.model.neck.model_dump()
    reference = neck_flops(*maps, {**settings, **Variant("csp", "conv", BASE_DEPTH).settings})
    settings |= variant.settings
    settings["expansion"] = expansion_for(reference, *maps, settings)
    flops = neck_flops(*maps, settings)
    if abs(flops / reference - 1) > TOLERANCE:
        raise SystemExit(
            f"{variant}: no expansion gives the {reference / 1e9:.3g} GFLOPs of the reference to {TOLERANCE:.0%}; "
            "leave it out, or choose a larger model or wider blocks (-o model.neck.expansion=1)"
        )
    with torch.device("meta"):
        neck = HybridEncoder(*maps[:2], **settings).fuse()
    parameters = sum(parameter.numel() for parameter in neck.parameters())
    return Cost(settings["expansion"], flops, round(flops / reference, 4), parameters)


def train_one(
    config: Config, folder: str | None, variant: Variant, cost: Cost, seed: int, run: Path, device: str | None
) -> float:
    """The AP of the last epoch; the primary metric of the task."""
    config = Config.model_validate(config.model_dump())
    neck = config.model.neck
    config.model.neck = neck.model_copy(update={**variant.settings, "expansion": cost.expansion})
    config.data.root = folder
    config.train.seed, config.train.val_interval = seed, config.train.epochs
    print(f"--- {run.name}: expansion {cost.expansion:.3f}, {cost.flops / 1e9:.3f} GFLOPs", flush=True)
    if RunFolder(run).state.exists():
        train(load_config(file=run / "config.yaml"), resume=run, device=device)
    else:
        shutil.rmtree(run, ignore_errors=True)  # stopped before there was anything to continue
        train(config, output=run, device=device)
    (task,) = config.model.heads
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return last["metrics"][task][head_class(task, config.model.heads[task]).primary_metric]


def table(rows: list[Row]) -> str:
    """Markdown: one table for each task and data set."""
    pages = []
    by_place = itertools.groupby(sorted(rows, key=lambda row: (row["task"], row["data"])), place_of)
    for (task, data), group in by_place:
        cells = [cells_of(list(same)) for same in by_variant(list(group))]
        best = max(cells, key=lambda line: line[-3])[-3]
        shown = [[*line[:-3], f"**{line[-3]}**" if line[-3] == best else line[-3], *line[-2:]] for line in cells]
        header = ["block", "downsampling", "RepBlocks", "expansion", "GFLOPs", "parameters", "AP", "range", "seeds"]
        pages.append("\n".join([f"{task} on {data}:", "", *markdown_table(header, shown)]))
    return "\n\n".join(pages) + "\n"


def place_of(row: Row) -> tuple[str, str]:
    return row["task"], row["data"]


def by_variant(rows: list[Row]) -> Iterator[list[Row]]:
    def key(row: Row) -> tuple[Any, ...]:
        return row["block"], row["downsample"], row["depth"]

    for _, group in itertools.groupby(sorted(rows, key=key), key):
        yield list(group)


def cells_of(rows: list[Row]) -> list[str]:
    row, found = rows[0], [row["ap"] for row in rows]
    return [
        row["block"],
        row["downsample"],
        str(row["depth"]),
        f"{row['expansion']:.3f}",
        f"{row['flops'] / 1e9:.3f}",
        f"{row['parameters'] / 1e6:.2f} M",
        f"{statistics.mean(found):.3f}",
        f"{min(found):.3f} to {max(found):.3f}",
        str(len(found)),
    ]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

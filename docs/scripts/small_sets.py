"""What the scripts about small data sets share: trainings of equal steps on equal numbers of pictures, and recipes.

An epoch is made as long as the time between two evaluations: the pictures are shown again (``data.weight``) until it
has that many steps. So all data sets get the same steps and evaluations, and nothing is saved more often.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, parser_of

from mvision.config import Config, DataConfig, load_config
from mvision.data import read_data_sources

WARM_UP = 0.05  # share of the steps
EQUAL_RATES = {"train.backbone_lr": None}
ADAMW = {"train.optimizer": "adamw", "train.beta2": 0.999, "train.weight_decay": 1e-4, "train.clip_norm": 0.1}
MUON = {"train.optimizer": "muon", "train.beta2": 0.99, "train.weight_decay": 0.01, "train.clip_norm": 5.0}
SHIPPED = "shipped"
RECIPES: dict[str, dict[str, Any]] = {
    SHIPPED: {},
    "adamw": {**ADAMW, **EQUAL_RATES, "train.lr": 2e-4},
    "muon": {**MUON, **EQUAL_RATES, "train.lr": 8e-3},
    "muon-low": {**MUON, **EQUAL_RATES, "train.lr": 2e-3},
}
"""Name -> dotted keys. All but ``shipped`` have a schedule in shares of the steps too, see ``shares``."""


def small_parser(description: str | None, steps: int, size: int | None) -> argparse.ArgumentParser:
    """The options of these scripts, with the defaults for ``--steps`` and ``--image-size``."""
    parser = parser_of(description, by_epochs=False)
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=steps,
        metavar="N",
        help="of a training; 0: as configured  [default: %(default)s]",
    )
    add("--evaluations", type=int, default=10, metavar="N", help="in each training  [default: %(default)s]")
    add("--pictures", type=int, default=0, metavar="N", help="to train on, drawn with the seed; 0 for all")
    add("--image-size", type=int, default=size, metavar="N", help="pixels  [default: %(default)s]")
    add("--batch", type=int, default=16, metavar="N", help="[default: %(default)s]")
    add("--ema-share", type=float, default=0.02, metavar="X", help="of the steps: the time of the moving average")
    return parser


def small_config(
    options: argparse.Namespace,
    place: tuple[str, str | None],
    seed: int,
    model: str,
    recipe: str,
    overrides: dict[str, Any] | None = None,
) -> tuple[Config, Row]:
    """The config of a training by these options, and the columns that say how long it is and on what.

    Args:
        place: task, and folder of the data set.
        overrides: dotted keys, which override those of the recipe.
    """
    task, folder = place
    count = training_pictures(task, folder)
    if options.pictures > count:
        raise SystemExit(f"--pictures {options.pictures}: {folder or 'the built-in set'} has {count}")
    pictures = options.pictures or count
    chosen: dict[str, Any] = {"train.batch_size": options.batch, "data.root": folder, "train.seed": seed}
    chosen["data.fraction"] = pictures / count
    if options.image_size is not None:
        chosen["model.image_size"] = options.image_size
    chosen |= RECIPES[recipe]
    if options.steps:
        chosen |= length(options.steps, options.evaluations, options.batch, pictures)
        if recipe != SHIPPED:
            chosen |= shares(options.steps, options.ema_share)
    elif recipe != SHIPPED:
        raise SystemExit(f"--steps 0: the recipe {recipe} needs a number of steps; choose one, or the recipe {SHIPPED}")
    config = load_config(model, tasks=[task], overrides=chosen | (overrides or {}), assignments=options.set)
    size = config.model.image_size[0]
    return config, {"pictures": pictures, "steps": options.steps or "own", "size": size, "batch": options.batch}


@functools.cache
def training_pictures(task: str, folder: str | None) -> int:
    """How many pictures a data set has to train a task on."""
    return len(read_data_sources(DataConfig(root=folder), [task], 0, lambda line: None)[0].train)


def length(steps: int, evaluations: int, batch: int, pictures: int) -> dict[str, Any]:
    """Dotted keys of a training of so many steps, or a few less, with an evaluation at the end of each epoch."""
    of_epoch = max(1, steps // evaluations)
    repeats = {"data.weight": of_epoch * batch / pictures}
    return {"train.epochs": steps // of_epoch, "train.val_interval": 1, "train.patience": 0, **repeats}


def shares(steps: int, ema_share: float) -> dict[str, Any]:
    """Dotted keys of the warm-up and the moving average, in shares of the steps."""
    averaged = max(1.0, ema_share * steps)
    return {
        "train.warmup_steps": round(WARM_UP * steps),
        "train.ema_decay": 1 - 1 / averaged,
        "train.ema_warmup": max(1, round(averaged / 4)),
    }


def by_length(rows: list[Row]) -> list[Row]:
    """The rows with the length of the trainings in the name of the data set: a table compares equal ones alone."""
    return [
        {**row, "data": "{data}, {pictures} pictures, {steps} steps of {batch} at {size} px".format(**row)}
        for row in rows
    ]


def course(row: Row) -> str:
    """AP at each evaluation."""
    return ", ".join(f"{ap:.3f}" for _, ap in row["curve"])

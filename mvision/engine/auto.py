"""What a new run decides itself from its data and its initial weights: the keys of ``train`` that are ``auto``.

Everything that has to do with time is a share of the run. A fixed number of steps of warm-up, or of the memory of the
moving average, suits data sets of one size: a run on a hundred images can end before its learning rate has risen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mvision.config import Config, DecidedTrain, RunConfig, TrainConfig
from mvision.engine.patience import wait_of
from mvision.errors import UserError
from mvision.weights.transfer import Transferred

Start = Literal["random", "backbone", "encoder", "model"]

IMAGES = 16  # in an optimiser step, to which the learning rates below belong
MOST_PASSES = 20  # times ``full_epochs``, however few images there are
FINE_TUNED = 0.5  # share of the epochs and steps of other runs that a run from a whole model's weights takes
WARM_UP, MOST_WARM_UP = 0.05, 1000
AVERAGED = 0.02  # share of the run's steps over which the moving average has its weight
LARGEST_DECAY = 0.9999
EVALUATIONS = 50
# Learning rates, and shares of them for the backbone, were compared in docs/learning.md and docs/transfer.md; AdamW's
# are RT-DETR's and D-FINE's, and 0.5 was not measured.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"base_lr": 8e-3, "weight_decay": 0.01, "beta2": 0.99, "clip_norm": 5.0},
    "adamw": {"base_lr": 2e-4, "weight_decay": 1e-4, "beta2": 0.999, "clip_norm": 0.1},
}
KEPT = 0.9  # share of the layers of a head that are loaded where it goes on
# Share of ``lr`` for the backbone, by what the run starts from.
BACKBONE = {"random": 1.0, "backbone": 0.1, "encoder": 0.1, "model": 0.5}


def start_of(config: Config, taken: Transferred | None) -> Start:
    """What a new run starts from.

    ``model`` is a trained model whose heads go on, ``encoder`` a trained backbone and neck below a head that is new, or
    has new parts, such as a detector's decoder that is to learn masks. Backbone and neck count as trained where most of
    their layers were loaded.

    Args:
        taken: what the model took over from ``--init``; None: there is none.
    """
    if taken is None:
        return "backbone" if config.model.backbone.starts_trained else "random"
    backbone, neck = (taken.shares[part] > 0.5 for part in ("backbone", "neck"))
    if backbone and neck:
        return "model" if all(head.loaded >= KEPT * head.layers for head in taken.heads.values()) else "encoder"
    return "backbone" if backbone or config.model.backbone.starts_trained else "random"


def decided(config: Config, batches: int, start: Start, images: Sequence[tuple[int, int]] = ()) -> RunConfig:
    """The config with numbers in place of every ``auto``; its other sections are the same objects.

    Args:
        batches: in an epoch, of one process.
        images: training and validation images of each data set.
    """
    train = config.train
    given = {name: getattr(train, name) for name in type(train).model_fields}
    auto = {name for name, value in given.items() if value == "auto" and name in _DECIDED}
    steps_of_epoch = math.ceil(batches / train.accumulate)
    optimizer = given["optimizer"] if "optimizer" not in auto else "adamw" if start == "model" else "muon"
    epochs = given["epochs"] if "epochs" not in auto else _epochs(train, steps_of_epoch, start)
    total = epochs * steps_of_epoch
    base = OPTIMIZERS[optimizer]["base_lr"] if train.base_lr == "auto" else train.base_lr
    lr = given["lr"] if "lr" not in auto else base * math.sqrt(train.batch_size * train.accumulate / IMAGES)
    averaged = max(1.0, AVERAGED * total)
    rules: dict[str, Any] = {
        **OPTIMIZERS[optimizer],
        "epochs": epochs,
        "optimizer": optimizer,
        "lr": lr,
        "backbone_lr": None if BACKBONE[start] == 1 else BACKBONE[start] * lr,
        "warmup_steps": min(round(WARM_UP * total), MOST_WARM_UP),
        "ema_decay": min(1 - 1 / averaged, LARGEST_DECAY),
        "ema_warmup": max(1, round(averaged / 2)),
        "val_interval": max(1, epochs // EVALUATIONS),
        "patience": 0,  # until the others are known
    }
    numbers = DecidedTrain.model_validate({**given, **{name: rules[name] for name in auto}})
    if "patience" in auto:
        last = steps_of_epoch * config.data.augment.count_last(epochs)
        numbers.patience = wait_of(numbers, total, last, sum(count for _, count in images))
    return RunConfig.model_construct(**{**dict(config), "train": numbers})


def resumed(config: Config, path: Path) -> RunConfig:
    """The config of a run that goes on, which has been decided.

    Raises:
        UserError: an option wants something to be ``auto`` again.
    """
    train = config.train
    for name in _DECIDED:
        if getattr(train, name) == "auto":
            raise UserError(f"train.{name}: auto is decided when a run starts, and {path} goes on; give a number")
    numbers = DecidedTrain.model_construct(**{name: getattr(train, name) for name in type(train).model_fields})
    return RunConfig.model_construct(**{**dict(config), "train": numbers})


def _epochs(train: TrainConfig, steps_of_epoch: int, start: Start) -> int:
    share = FINE_TUNED if start == "model" else 1.0
    full = max(1, round(share * train.full_epochs))
    return min(max(full, math.ceil(share * train.least_steps / steps_of_epoch)), MOST_PASSES * full)


_DECIDED = DecidedTrain.__annotations__.keys()

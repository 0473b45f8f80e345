"""What a run is and what it will do when, in two lines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mvision.config import DecidedTrain, RunConfig
from mvision.data.augment.transforms import MIXING
from mvision.data.loading.sources import DataSource
from mvision.engine.optim import falling_part
from mvision.engine.trainer import Trainer
from mvision.machine import computes_in_bf16


def describe_run(trainer: Trainer, sources: Sequence[DataSource]) -> str:
    """Model, data and hardware of the run in one line, and its schedule in a second one."""
    config, model, accelerator = trainer.config, trainer.bare_model, trainer.accelerator
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    images = [sum(numbers) for numbers in zip(*images_of(sources))]
    fp32 = "fp32 (TF32)" if accelerator.device.type == "cuda" else "fp32"
    precision = fp32 if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    if precision == "bf16" and not computes_in_bf16(accelerator.device):
        precision = "bf16, which this device does not compute in (fp32 is faster),"
    height, width = config.model.image_size
    parts = [
        "+".join(model.tasks),
        f"{config.model.backbone.name} with {parameters:.1f} M parameters at {width} x {height}",
        f"{images[0]} + {images[1]} images",
        plural(len(model.categories), "class"),
        plural(config.train.epochs, "epoch"),
        f"{precision} on {accelerator.num_processes} x {accelerator.device.type}",
    ]
    return f"{', '.join(parts)}\n{describe_plan(config, trainer.total_steps, trainer.last_steps)}"


def images_of(sources: Sequence[DataSource]) -> list[tuple[int, int]]:
    """Training and validation images of each data set."""
    return [(len(source.train), len(source.val)) for source in sources]


def plural(number: int, noun: str) -> str:
    """The number with the noun, such as ``3 classes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def describe_plan(config: RunConfig, total: int, last: int) -> str:
    """The optimiser, the steps of the learning rate, the moving average, and the epochs in which augmentation differs.

    Args:
        total: optimiser steps of the run.
        last: those of its ``data.augment.last_epochs``.
    """
    parts = [_optimizer(config.train), *_average(config.train), _learning_rate(config, total, last)]
    return f"schedule: {'; '.join([*parts, *_augmentation(config), *_patience(config.train)])}"


def _optimizer(settings: DecidedTrain) -> str:
    backbone = settings.backbone_lr
    slower = "" if backbone is None or backbone == settings.lr else f" (backbone {backbone:.3g})"
    return f"{settings.optimizer} with a learning rate of {settings.lr:.3g}{slower}"


def _average(settings: DecidedTrain) -> list[str]:
    return [f"weights averaged over about {1 / (1 - settings.ema_decay):.0f} steps"] if settings.ema_decay else []


def _learning_rate(config: RunConfig, total: int, last: int) -> str:
    settings = config.train
    parts = [f"{total} steps"]
    if settings.warmup_steps >= total:
        parts.append(f"all of them warm-up (train.warmup_steps {settings.warmup_steps})")
    else:
        parts.append(f"warm-up to step {settings.warmup_steps}" if settings.warmup_steps else "no warm-up")
        begin, end = falling_part(config.train, total, last)
        if settings.schedule == "constant":
            parts.append("then constant")
        else:
            if begin > settings.warmup_steps:
                parts.append(f"constant to step {begin}")
            shape = "linear" if settings.schedule == "linear" else "cosine"
            parts.append(f"{shape} to {settings.final_lr:g} of the peak{f' at step {end}' if end < total else ''}")
    return ", ".join(parts)


def _patience(settings: DecidedTrain) -> list[str]:
    wait, evaluations = settings.patience, math.ceil(settings.epochs / settings.val_interval)
    return [f"stops early after {wait} of its {evaluations} evaluations without a better one"] if wait else []


def _augmentation(config: RunConfig) -> list[str]:
    """Whether and when pictures are made of several images, where the epochs of a run differ."""
    augment, epochs = config.data.augment, config.train.epochs
    names = [name for name in MIXING if getattr(augment, name) > 0]
    if not names:
        return []
    mixing = augment.mixing(epochs)
    when = f"in epochs {mixing.start + 1} to {mixing.stop} of {epochs}" if mixing else f"in none of {epochs} epochs"
    return [f"{' and '.join(names)} {when}"]

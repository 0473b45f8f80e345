"""What a run will do when, in one line: learning rate and augmentation."""

from __future__ import annotations

from mvision.config import Config
from mvision.engine.optim import falling_part


def describe_plan(config: Config, total: int, last: int) -> str:
    """The steps of the learning rate, and the epochs in which augmentation differs.

    Args:
        total: optimiser steps of the run.
        last: those of its ``data.augment.last_epochs``.
    """
    return f"schedule: {'; '.join((_learning_rate(config, total, last), *_augmentation(config)))}"


def _learning_rate(config: Config, total: int, last: int) -> str:
    settings = config.train
    parts = [f"{total} steps"]
    if settings.warmup_steps >= total:
        parts.append(f"all of them warm-up (train.warmup_steps {settings.warmup_steps})")
    else:
        parts.append(f"warm-up to step {settings.warmup_steps}")
        begin, end = falling_part(config.train, total, last)
        if settings.schedule == "constant":
            parts.append("then constant")
        else:
            if begin > settings.warmup_steps:
                parts.append(f"constant to step {begin}")
            shape = "linear" if settings.schedule == "linear" else "cosine"
            parts.append(f"{shape} to {settings.final_lr:g} of the peak{f' at step {end}' if end < total else ''}")
    return ", ".join(parts)


def _augmentation(config: Config) -> list[str]:
    """Whether and when there are mosaics and mixups, where the epochs of a run differ."""
    augment, epochs = config.data.augment, config.train.epochs
    names = [name for name in ("mosaic", "mixup") if getattr(augment, name) > 0]
    if not names:
        return []
    mixing = augment.mixing(epochs)
    when = f"in epochs {mixing.start + 1} to {mixing.stop} of {epochs}" if mixing else f"in none of {epochs} epochs"
    return [f"{' and '.join(names)} {when}"]

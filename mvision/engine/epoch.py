"""One epoch of training: gradients over ``accumulate`` batches, then an optimiser step."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import nullcontext

import torch
from tqdm import tqdm

from mvision.config import TrainConfig
from mvision.data import Loader
from mvision.engine.optim import set_learning_rate
from mvision.engine.trainer import Trainer
from mvision.errors import UserError

MAX_BAD_STEPS = 20
"""The run ends with an error after this many optimiser steps in a row without a finite gradient."""


def train_epoch(trainer: Trainer, loader: Loader, epoch: int) -> dict[str, float]:
    """One pass over the data; returns the mean of every loss term over the batches of this process."""
    config, accelerator = trainer.config.train, trainer.accelerator
    trainer.model.train()
    sums: defaultdict[str, float] = defaultdict(float)
    bar = tqdm(
        loader.epoch(epoch),
        total=len(loader),
        desc=f"epoch {epoch + 1}/{config.epochs}",
        disable=not accelerator.is_main_process,
        leave=False,
    )
    start = time.monotonic()
    count = 0
    for count, loaded in enumerate(bar, start=1):
        for file, reason in loaded.skipped:
            tqdm.write(f"skipped {file}: {reason}")
        batch = loaded.to(accelerator.device)
        # The last group of an epoch may have fewer batches than ``accumulate``; its gradient is divided all the same.
        last_of_group = count % config.accumulate == 0 or count == len(loader)
        with nullcontext() if last_of_group else accelerator.no_sync(trainer.model):
            with accelerator.autocast():
                outputs = trainer.model(batch.images, batch.targets)
            terms = trainer.bare_model.loss(outputs, batch.targets)
            accelerator.backward(_total(terms, config) / config.accumulate)
        for name, value in terms.items():
            sums[_logged_name(name)] += float(value.detach())
        if last_of_group:
            _optimize(trainer)
            batches_left = (config.epochs - epoch) * len(loader) - count
            bar.set_postfix_str(_status(trainer, sums, count, (time.monotonic() - start) / count * batches_left))
    return {name: value / max(1, count) for name, value in sums.items()}


def _total(terms: dict[str, torch.Tensor], config: TrainConfig) -> torch.Tensor:
    """The loss: the sum of all terms, which are named ``task/term``, those of a task times ``task_weights``.

    The weights are fixed: learning them (Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2)
    was measured and is no better, see docs/measurements.md.
    """
    losses: dict[str, torch.Tensor] = {}
    for name, value in terms.items():
        task = name.partition("/")[0]
        losses[task] = losses.get(task, 0) + value.float()
    return torch.stack([config.task_weights.get(task, 1.0) * value for task, value in losses.items()]).sum()


def _optimize(trainer: Trainer) -> None:
    """An optimiser step, which is left out where the gradient is not finite.

    Raises:
        UserError: ``MAX_BAD_STEPS`` steps in a row had no finite gradient.
    """
    config, progress = trainer.config.train, trainer.progress
    set_learning_rate(trainer.optimizer, config, progress.step, trainer.total_steps)
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), config.clip_norm or float("inf"))
    # The gradient is the average over all processes, so all of them decide alike. With fp16, accelerate's optimiser
    # leaves such steps out itself and lowers its loss scale.
    if norm is None or torch.isfinite(norm) or trainer.accelerator.scaler is not None:
        trainer.optimizer.step()
        trainer.bad_steps = 0
    else:
        trainer.bad_steps += 1
        tqdm.write(f"step {progress.step}: the gradient is not finite; step left out")
        if trainer.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"training diverged: no finite gradient in {MAX_BAD_STEPS} steps (precision "
                f"{trainer.accelerator.mixed_precision}, lr {config.lr:g}); lower train.lr or use --precision fp32"
            )
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.ema is not None:
        trainer.ema.update(trainer.bare_model, step=progress.step)
    progress.step += 1


def _logged_name(term: str) -> str:
    """The name under which a loss term ``task/NAME_LAYER_KIND`` is logged, ``task/KIND_NAME``: summed over layers."""
    task, _, rest = term.partition("/")
    parts = rest.split("_")
    kind = next((part for part in parts[1:] if not part.isdigit()), "decoder")
    return f"{task}/{kind}_{parts[0]}"


def _status(trainer: Trainer, sums: dict[str, float], count: int, left: float) -> str:
    """For the progress bar: mean loss, best score so far, and the time left in the whole run (``left`` in seconds)."""
    progress = trainer.progress
    best = f"AP {progress.best:.3f}, " if progress.best_epoch >= 0 else ""
    return f"loss {sum(sums.values()) / count:.3f}, {best}{int(left // 60)}:{int(left % 60):02d} left"

"""One epoch of training: gradients over ``accumulate`` batches, then an optimiser step."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm

from mvision.compat import copy_all
from mvision.config import TrainConfig
from mvision.data import Batch, Loader
from mvision.engine.checks import single_value
from mvision.engine.optim import set_learning_rate
from mvision.engine.state import random_states
from mvision.engine.trainer import Trainer
from mvision.errors import UserError, printable

MAX_BAD_STEPS = 20
"""The run ends with an error after this many optimiser steps in a row without a finite gradient."""
MAX_SCALED_BAD_STEPS = 60
"""The same with fp16, where each of them halves the scale of the loss; finding a scale takes some steps."""


def train_epoch(trainer: Trainer, loader: Loader, epoch: int) -> dict[str, float]:
    """One pass over the data, or the rest of one that was stopped; the mean of every loss term over its batches.

    Afterwards ``trainer.progress`` says that all batches are done. The means are those of this process.

    Raises:
        Stopped: the run was asked to stop; ``trainer.progress`` tells where it did, so that it can go on there.
        UserError: the training diverged, or cannot work with batches of this size.
    """
    config, accelerator, progress = trainer.config.train, trainer.accelerator, trainer.progress
    trainer.model.train()
    first, before = (progress.batch, progress.sums) if epoch == progress.epoch else (0, {})
    sums: defaultdict[str, float] = defaultdict(float, before)
    bar = tqdm(
        loader.epoch(epoch, first) if first < len(loader) else (),
        total=len(loader),
        initial=first,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        disable=not accelerator.is_main_process,
        leave=False,
    )
    start = time.monotonic()
    guard = BufferGuard(trainer.bare_model)
    count = first
    for count, loaded in enumerate(bar, start=first + 1):
        for file, reason in loaded.skipped:
            tqdm.write(printable(f"skipped {file}: {reason}"))
        batch = loaded.to(accelerator.device)
        # The last group of an epoch may have fewer batches than ``accumulate``; its gradient is divided all the same.
        last_of_group = count % config.accumulate == 0 or count == len(loader)
        with nullcontext() if last_of_group else accelerator.no_sync(trainer.model):
            terms = _forward(trainer, batch)
            accelerator.backward(_total(terms, config) / config.accumulate)
        for name, value in terms.items():
            sums[_logged_name(name)] += float(value.detach())
        if last_of_group:
            _optimize(trainer, guard)
            batches_left = (config.epochs - epoch) * len(loader) - count
            speed = (time.monotonic() - start) / (count - first)
            bar.set_postfix_str(_status(trainer, sums, count, speed * batches_left))
            if trainer.stop.requested(accelerator):
                _pause(trainer, count, sums)
                raise trainer.stop.stopped()
    _pause(trainer, count, sums)
    return {name: value / max(1, count) for name, value in sums.items()}


def _pause(trainer: Trainer, count: int, sums: dict[str, float]) -> None:
    """Note all that is needed to go on after this batch."""
    trainer.progress.batch, trainer.progress.sums = count, dict(sums)
    trainer.random = random_states(trainer.accelerator)


def _forward(trainer: Trainer, batch: Batch) -> dict[str, torch.Tensor]:
    try:
        with trainer.accelerator.autocast():
            outputs = trainer.model(batch.images, batch.targets)
    except ValueError as error:
        line = single_value(error, len(batch), batch.images.shape[-2:])
        if line is None:
            raise
        raise line from error
    return trainer.bare_model.loss(outputs, batch.targets)


class BufferGuard:
    """The running means of norms, as they were after the last step with a finite gradient.

    A forward pass that overflows puts NaN into them, where it would stay: no later step can remove it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.copies = [buffer.clone() for buffer in self.buffers]

    def update(self) -> None:
        """Take the values of now as good."""
        copy_all(self.copies, self.buffers)

    def restore(self) -> None:
        """Go back to the last good values if there are others that are not finite."""
        if not all(bool(buffer.isfinite().all()) for buffer in self.buffers):
            copy_all(self.buffers, self.copies)


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


def _optimize(trainer: Trainer, guard: BufferGuard) -> None:
    """An optimiser step, which is left out where the gradient is not finite.

    Raises:
        UserError: ``MAX_BAD_STEPS`` steps in a row had no finite gradient.
    """
    config, progress = trainer.config.train, trainer.progress
    set_learning_rate(trainer.optimizer, config, progress.step, trainer.total_steps)
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), config.clip_norm or float("inf"))
    is_finite = norm is None or bool(torch.isfinite(norm))
    if is_finite:
        guard.update()
    else:
        guard.restore()
    # The gradient is the average over all processes, so all of them decide alike. With fp16, accelerate's optimiser
    # leaves such steps out itself and lowers its loss scale.
    scaler = trainer.accelerator.scaler
    if is_finite or scaler is not None:
        trainer.optimizer.step()
    else:
        tqdm.write(f"step {progress.step}: the gradient is not finite; step left out")
    progress.bad_steps = 0 if is_finite else progress.bad_steps + 1
    limit = MAX_BAD_STEPS if scaler is None else MAX_SCALED_BAD_STEPS
    if progress.bad_steps >= limit:
        raise UserError(
            f"training diverged: no finite gradient in {limit} steps (precision "
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
    best = f"best {progress.best:.3f}, " if progress.best >= 0 else ""
    return f"loss {sum(sums.values()) / count:.3f}, {best}{int(left // 60)}:{int(left % 60):02d} left"

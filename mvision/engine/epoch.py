"""One epoch of training: gradients over ``accumulate`` batches, then an optimiser step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from tqdm import tqdm

from mvision.config import TrainConfig
from mvision.data import Batch, Loader
from mvision.engine.acceleration import tell_compilation
from mvision.engine.checks import single_value
from mvision.engine.optim import set_learning_rate
from mvision.engine.readings import BufferGuard, Readings
from mvision.engine.state import random_states
from mvision.engine.trainer import Trainer
from mvision.errors import UserError, printable
from mvision.structures.transfer import to_device

MAX_BAD_STEPS = 20
"""The run ends with an error after this many optimiser steps in a row without a finite gradient."""
MAX_SCALED_BAD_STEPS = 60
"""The same with fp16, where each of them halves the scale of the loss; finding a scale takes some steps."""
READ_INTERVAL = 0.5
"""On a GPU, seconds between two readings of the losses and of whether the gradients were finite; it waits for each."""


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
    bar = tqdm(
        loader.epoch(epoch, first) if first < len(loader) else (),
        total=len(loader),
        initial=first,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        disable=not accelerator.is_main_process,
        leave=False,
    )
    start = read_at = time.monotonic()
    guard, readings = BufferGuard(trainer.bare_model), Readings(before)
    count = first
    wait = partial(
        trainer.stop.waiting,
        # Not inside a group, whose gradients would be lost; nor where other processes wait for this one's gradients.
        may_stop=lambda: accelerator.num_processes == 1 and count % config.accumulate == 0,
        save=lambda: _pause(trainer, count, readings),
    )
    # No variable holds the batches: an error would keep it, and the bar would end after the line that says why.
    for count, loaded in enumerate(wait(bar), start=first + 1):
        for file, reason in loaded.skipped:
            tqdm.write(printable(f"skipped {file}: {reason}"))
        batch, begin = loaded.to(accelerator.device), time.monotonic()
        # The last group of an epoch may have fewer batches than ``accumulate``; its gradient is divided all the same.
        last_of_group = count % config.accumulate == 0 or count == len(loader)
        with nullcontext() if last_of_group else accelerator.no_sync(trainer.model):
            names, values = _forward(trainer, batch)
            accelerator.backward(_total(names, values, config) / config.accumulate)
        tell_compilation(trainer, begin)
        readings.add_terms(names, values)
        if last_of_group:
            position = epoch * trainer.steps_of_epoch + (count - 1) // config.accumulate
            readings.add_step(progress.step, _optimize(trainer, guard, position))
            now = time.monotonic()
            stops, reads = trainer.stop.agree(accelerator, now - read_at >= _interval(accelerator.device))
            if stops:
                _pause(trainer, count, readings)
                raise trainer.stop.stopped()
            if reads:
                read_at = now
                _check_steps(trainer, readings.read())
                left = (now - start) / (count - first) * ((config.epochs - epoch) * len(loader) - count)
                bar.set_postfix_str(_status(trainer, readings.sums, count, left))
    _pause(trainer, count, readings)
    return {name: value / max(1, count) for name, value in readings.sums.items()}


def _interval(device: torch.device) -> float:
    """Seconds between two readings. On a CPU nothing runs ahead, so it costs nothing to read after every step."""
    return 0.0 if device.type == "cpu" else READ_INTERVAL


def _pause(trainer: Trainer, count: int, readings: Readings) -> None:
    """Note all that is needed to go on after this batch."""
    _check_steps(trainer, readings.read())
    trainer.progress.batch, trainer.progress.sums = count, dict(readings.sums)
    trainer.random = random_states(trainer.accelerator)


def _forward(trainer: Trainer, batch: Batch) -> tuple[list[str], torch.Tensor]:
    """The names of the loss terms of a batch, and their values as one float32 tensor."""
    try:
        with trainer.accelerator.autocast():
            outputs = trainer.model(batch.images, batch.targets)
    except ValueError as error:
        line = single_value(error, len(batch), batch.images.shape[-2:])
        if line is None:
            raise
        raise line from error
    terms = trainer.bare_model.loss(outputs, batch.targets)
    return list(terms), torch.stack([value.float() for value in terms.values()])


def _total(names: Sequence[str], values: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """The loss: the sum of all terms, which are named ``task/term``, those of a task times ``task_weights``.

    The weights are fixed: learning them (Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2)
    was measured and is no better, see docs/measurements.md.
    """
    if config.task_weights:
        weights = torch.tensor([config.task_weights.get(name.partition("/")[0], 1.0) for name in names])
        values = values * to_device({"weights": weights}, values.device)["weights"]
    return values.sum()


def _optimize(trainer: Trainer, guard: BufferGuard, position: int) -> torch.Tensor:
    """An optimiser step, which changes nothing where the gradient is not finite.

    Args:
        position: the step in the schedule: of a run that was resumed with other batches, not ``progress.step``.

    Returns:
        () float32: 1 if the gradient was not finite.
    """
    config, progress, scaler = trainer.config.train, trainer.progress, trainer.accelerator.scaler
    set_learning_rate(trainer.optimizer, config, position, trainer.total_steps, trainer.last_steps)
    # The gradient is the average over all processes, so all of them decide alike.
    norm = trainer.accelerator.clip_grad_norm_(trainer.parameters, config.clip_norm or float("inf"))
    found_inf = norm.isfinite().logical_not().float()
    guard.update(found_inf)
    if scaler is None:  # else it tells the optimiser itself, and lowers its loss scale
        trainer.bare_optimizer.found_inf = found_inf
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.ema is not None:
        trainer.ema.update(trainer.bare_model, step=progress.step)
    progress.step += 1
    return found_inf


def _check_steps(trainer: Trainer, finite: list[tuple[int, bool]]) -> None:
    """Report the steps that were left out.

    Args:
        finite: number of each step, and whether its gradient was finite.

    Raises:
        UserError: ``MAX_BAD_STEPS`` steps in a row had no finite gradient.
    """
    config, progress, scaler = trainer.config.train, trainer.progress, trainer.accelerator.scaler
    limit = MAX_BAD_STEPS if scaler is None else MAX_SCALED_BAD_STEPS
    for number, is_finite in finite:
        progress.bad_steps = 0 if is_finite else progress.bad_steps + 1
        if not is_finite and scaler is None:
            tqdm.write(f"step {number}: the gradient is not finite; step left out")
        if progress.bad_steps >= limit:
            raise UserError(
                f"training diverged: no finite gradient in {limit} steps (precision "
                f"{trainer.accelerator.mixed_precision}, lr {config.lr:g}); lower train.lr or use --precision fp32"
            )


def _status(trainer: Trainer, sums: Mapping[str, float], count: int, left: float) -> str:
    """For the progress bar: mean loss, best score so far, and the time left in the whole run (``left`` in seconds)."""
    progress = trainer.progress
    best = f"best {progress.best:.3f}, " if progress.best >= 0 else ""
    return f"loss {sum(sums.values()) / count:.3f}, {best}{int(left // 60)}:{int(left % 60):02d} left"

"""The objects of a training run, and how far the run has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator

from mvision.config import RunConfig
from mvision.engine.optim import Ema
from mvision.engine.stopping import StopRequest
from mvision.model import Model


@dataclass
class Progress:
    """How far a run has come; saved after every epoch, and read again when the run is resumed.

    Attributes:
        epoch: completed epochs.
        step: completed optimiser steps.
        best, best_epoch: the highest score of an evaluation so far (see ``checkpoint.keep_best``) and its epoch,
            counted from 0; -1 before the first evaluation, and ``best`` also where there is nothing to measure.
        seconds: training time so far, evaluations included.
        bad_steps: optimiser steps in a row without a finite gradient, up to now.
        batch: of an epoch that was stopped inside, the batches that were trained; 0 between epochs.
        sums: of these batches, the sum of every loss term.
    """

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0
    bad_steps: int = 0
    batch: int = 0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainer:
    """What the training loop works with.

    Attributes:
        model: wrapped for several processes where there are some, else the model itself.
        ema: the moving average of the weights; None where it is switched off.
        total_steps: optimiser steps of the whole run, with batches as they are now.
        last_steps: those of its ``data.augment.last_epochs``.
        stop: whether the run has been asked to stop.
        facts: what has to be the same when the run is resumed, see ``state.run_facts``, and ``started_from``: the
            published weights that it started from, as text, or None.
        compiles: backbone and neck will be compiled in the first batch.
        random: the random numbers of all processes when the training last paused, see ``state.random_states``.
        next_curves: the time (``time.monotonic``) before which the curves are not drawn again, see ``checkpoint``.
    """

    config: RunConfig
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    ema: Ema | None
    total_steps: int
    last_steps: int = 0
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)
    facts: dict[str, Any] = field(default_factory=dict)
    random: list[dict[str, Any]] = field(default_factory=list)
    compiles: bool = False
    next_curves: float = 0.0

    @property
    def steps_of_epoch(self) -> int:
        """Optimiser steps of an epoch, with batches as they are now."""
        return self.total_steps // self.config.train.epochs

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The weights that are trained, in the order of the model: the norm of all gradients is rounded by it."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def bare_optimizer(self) -> Any:
        """The optimiser without accelerate's wrapper around it."""
        return self.optimizer.optimizer

    @property
    def bare_model(self) -> Model:
        """The model in training, without a wrapper around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eval_model(self) -> Model:
        """The model that is evaluated and saved: the moving average where there is one."""
        return self.bare_model if self.ema is None else self.ema.module

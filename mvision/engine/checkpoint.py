"""What a run writes while it trains: its config, the best weights, and after every epoch all that resuming needs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from mvision.config import RUN_CONFIG, DecidedTrain
from mvision.engine.report import plot_run
from mvision.engine.state import SavedState, load_state, not_finite, random_states, save_state
from mvision.engine.trainer import Progress, Trainer
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.storage.run_folder import BEST, RunFolder
from mvision.weights import save_weights

DRAWING = 0.02  # share of a run's time that may go into drawing its curves before the last epoch


def new_folder(trainer: Trainer, output: Path | None) -> RunFolder:
    """An empty folder, the same for all processes."""
    accelerator = trainer.accelerator
    folder: list[Any] = [None]
    if accelerator.is_main_process:
        folder[0] = RunFolder.create(output, trainer.bare_model.tasks).path
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(folder)
    return RunFolder(folder[0])


def start(trainer: Trainer, run: RunFolder, saved: SavedState | None) -> None:
    """Write the complete config; for a run that is resumed, load its state and make its other files agree with it."""
    if saved is not None:
        load_state(trainer, run.state, saved)
        if bad := not_finite(trainer):
            raise UserError(f"{run.state}: {bad[0]} is not finite; start a new run from other weights: --init WEIGHTS")
        if len(saved.random) != (now := trainer.accelerator.num_processes):
            trainer.accelerator.print(
                f"note: the run was saved by {len(saved.random)} processes and goes on with {now}: it has the same "
                "batches, but not the same random noise in the model"
            )
    if trainer.accelerator.is_main_process:
        run.write_text(RUN_CONFIG, trainer.config.to_yaml())
        if saved is not None:
            _draw_curves(run, run.restore_records(saved.progress.epoch, saved.record))


def keep_best(trainer: Trainer, run: RunFolder, metrics: dict[str, dict[str, float]], epoch: int) -> None:
    """Save the weights if no evaluation before had a higher score, the mean of the tasks' primary metrics.

    Tasks without a figure (there is no such object in the validation images) do not count; where no task has one, the
    newest weights are the best.

    Args:
        metrics: the figures of this evaluation, by task.
        epoch: counted from 0.
    """
    values = [value for _, _, value in primary_figures(metrics) if math.isfinite(value) and value >= 0]
    score = sum(values) / len(values) if values else -1.0
    progress = trainer.progress
    if score > progress.best or progress.best_epoch < 0 or not values:
        if trainer.accelerator.is_main_process:
            extra = {"epoch": epoch + 1, "metrics": metrics, "started_from": trainer.facts.get("started_from")}
            run.forget_end()  # of a finished run that is trained on
            save_weights(trainer.eval_model, run.path / BEST, extra=extra)
        # Not before: a run that is stopped while it saves has to save once more when it is resumed.
        progress.best, progress.best_epoch = score, epoch


def primary_figures(metrics: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    """Task, name and value of every task's primary metric."""
    names = {task: head_class(task).primary_metric for task in metrics}
    return [(task, names[task], figures[names[task]]) for task, figures in metrics.items()]


def is_out_of_patience(config: DecidedTrain, progress: Progress, epoch: int) -> bool:
    """Whether the last ``patience`` evaluations, up to this epoch, were all no better than the best one."""
    evaluations_since_best = (epoch - progress.best_epoch) // config.val_interval
    return 0 < config.patience <= evaluations_since_best


def has_ended(config: DecidedTrain, progress: Progress) -> bool:
    """Whether there is no epoch left to train."""
    out_of_patience = progress.epoch > 0 and is_out_of_patience(config, progress, progress.epoch - 1)
    return progress.epoch >= config.epochs or out_of_patience


def finish_epoch(trainer: Trainer, run: RunFolder, record: dict[str, Any]) -> None:
    """Write the epoch's record to the trackers and to the run, and save the state that a resumed run starts from.

    The state has the record in it and is replaced first: wherever a kill comes, the records can be made to agree.

    Args:
        record: one line of ``metrics.jsonl``: epoch, step, losses, seconds, and metrics where there was an evaluation.
    """
    accelerator = trainer.accelerator
    accelerator.log({**flat(record["loss"], "loss"), **flat(record.get("metrics", {}))}, step=record["step"])
    trainer.random = random_states(accelerator)
    if accelerator.is_main_process:
        save_state(trainer, run.state, record)
        run.log(record)
        _draw_curves_in_time(trainer, run)
    accelerator.wait_for_everyone()


def save_inside_epoch(trainer: Trainer, run: RunFolder) -> None:
    """Save the state of a run that is stopped inside an epoch; nothing is sent between the processes."""
    if trainer.accelerator.is_main_process and trainer.random:
        require_finite(trainer, run)
        save_state(trainer, run.state, None)


def require_finite(trainer: Trainer, run: RunFolder) -> None:
    """Refuse to go on with, and to save, weights that have become infinite or NaN.

    Raises:
        UserError: they have.
    """
    if bad := not_finite(trainer):
        config = trainer.config.train
        kept = (
            f"the state of epoch {trainer.progress.epoch} is kept in {run.path}"
            if run.state.is_file()
            else "nothing was saved"
        )
        raise UserError(
            f"training diverged in epoch {trainer.progress.epoch + 1}: {bad[0]}"
            f"{f' and {len(bad) - 1} more tensors are' if bad[1:] else ' is'} not finite (precision "
            f"{trainer.accelerator.mixed_precision}, lr {config.lr:g}); {kept}; lower train.lr or use --precision fp32"
        )


def _draw_curves_in_time(trainer: Trainer, run: RunFolder) -> None:
    """At the end, and before it as often as ``DRAWING`` allows: an epoch of few images is as short as a drawing."""
    begin = time.monotonic()
    if begin >= trainer.next_curves or has_ended(trainer.config.train, trainer.progress):
        _draw_curves(run, run.records())
        end = time.monotonic()
        trainer.next_curves = end + (end - begin) / DRAWING


def _draw_curves(run: RunFolder, records: list[dict[str, Any]]) -> None:
    if records:
        plot_run(records, run.path / "results.png")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings or figures as one dictionary with keys ``a/b``, for trackers; other types become text."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict):
            result |= flat(value, name)
        else:
            result[name] = value if isinstance(value, (int, float, str)) else str(value)
    return result

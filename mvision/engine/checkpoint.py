"""What a run writes while it trains: its config, the best weights, and after every epoch all that resuming needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mvision.config import RUN_CONFIG
from mvision.engine.report import plot_run
from mvision.engine.trainer import Progress, Trainer
from mvision.heads import head_class
from mvision.storage.run_folder import BEST, RunFolder
from mvision.weights import save_weights


def open_run(trainer: Trainer, output: Path | None, resume: Path | None) -> RunFolder:
    """A new folder with the complete config, or the one of ``resume``, whose saved state is loaded into ``trainer``."""
    accelerator = trainer.accelerator
    if resume is not None:
        run = RunFolder.resume(resume)
        state = run.state()
        accelerator.load_state(str(state))
        trainer.progress = Progress(**json.loads((state / "progress.json").read_text()))
        if accelerator.is_main_process:
            run.cut_records(trainer.progress.epoch)
    else:
        folder: list[Any] = [None]
        if accelerator.is_main_process:
            folder[0] = RunFolder.create(output, trainer.bare_model.tasks).path
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(folder)
        run = RunFolder(folder[0])
    if accelerator.is_main_process:
        run.write_text(RUN_CONFIG, trainer.config.to_yaml())
    return run


def keep_best(trainer: Trainer, run: RunFolder, metrics: dict[str, dict[str, float]], epoch: int) -> None:
    """Save the weights if no evaluation before had a higher score, the mean of the tasks' primary metrics.

    Args:
        metrics: the figures of this evaluation, by task.
        epoch: counted from 0.
    """
    score = sum(value for _, _, value in primary_figures(metrics)) / len(metrics)
    progress = trainer.progress
    if score > progress.best or progress.best_epoch < 0:
        progress.best, progress.best_epoch = score, epoch
        if trainer.accelerator.is_main_process:
            save_weights(trainer.eval_model, run.path / BEST, extra={"epoch": epoch + 1, "metrics": metrics})


def primary_figures(metrics: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    """Task, name and value of every task's primary metric."""
    names = {task: head_class(task).primary_metric for task in metrics}
    return [(task, names[task], figures[names[task]]) for task, figures in metrics.items()]


def is_out_of_patience(trainer: Trainer, epoch: int) -> bool:
    """Whether the last ``patience`` evaluations, up to this epoch, were all no better than the best one."""
    evaluations_since_best = (epoch - trainer.progress.best_epoch) // trainer.config.train.val_interval
    return 0 < trainer.config.train.patience <= evaluations_since_best


def finish_epoch(trainer: Trainer, run: RunFolder, record: dict[str, Any]) -> None:
    """Write the epoch's record to the trackers and to the run, and save the state that a resumed run starts from.

    Args:
        record: one line of ``metrics.jsonl``: epoch, step, losses, seconds, and metrics where there was an evaluation.
    """
    accelerator = trainer.accelerator
    accelerator.log({**flat(record["loss"], "loss"), **flat(record.get("metrics", {}))}, step=record["step"])
    new_state = run.path / ".state.tmp"
    accelerator.save_state(str(new_state))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new_state / "progress.json").write_text(json.dumps(vars(trainer.progress)))
        run.replace_state(new_state)
        run.log(record)
        plot_run(run.records(), run.path / "results.png")
    accelerator.wait_for_everyone()


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

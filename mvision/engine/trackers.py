"""Figures of a training in TensorBoard, Weights & Biases and the like, as accelerate writes them."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from mvision.engine.checkpoint import flat
from mvision.engine.trainer import Trainer
from mvision.errors import UserError
from mvision.storage.run_folder import RunFolder


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise a UserError for a tracker whose package is missing: accelerate would train without it in silence."""
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker in LoggerType.list() and tracker not in {*available, "all"}:
            installed = ", ".join(sorted(available)) or "none"
            missing = f"the package of {tracker} is not installed (installed: {installed})"
            raise UserError(f"train.trackers: {missing}: pip install {tracker}")


def start_trackers(trainer: Trainer, run: RunFolder) -> None:
    """Those that write files do so in the run's folder; Weights & Biases gets the run's name."""
    trainer.accelerator.project_configuration.logging_dir = str(run.path)
    settings = flat(trainer.config.model_dump(mode="json"))
    trainer.accelerator.init_trackers("mvision", settings, {"wandb": {"name": run.path.as_posix()}})

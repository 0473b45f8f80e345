"""The training run, from a config to a folder with weights. Read ``train`` from top to bottom."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment, set_seed

from mvision.backbone import freeze
from mvision.compat import reset_accelerate
from mvision.config import Config
from mvision.data import Dataset, Loader, build_eval_loader, build_train_loader, read_data_sources
from mvision.data.loading.sources import DataSource
from mvision.engine.checkpoint import finish_epoch, flat, is_out_of_patience, keep_best, open_run, primary_figures
from mvision.engine.epoch import train_epoch
from mvision.engine.optim import Ema, build_optimizer
from mvision.engine.report import write_prediction_grid
from mvision.engine.trainer import Trainer
from mvision.errors import UserError
from mvision.evaluation import Validation, evaluate_all, make_metrics, tables
from mvision.heads import serving_task
from mvision.machine import channels_last_is_safe, keep_freed_memory, resolve_device, resolve_precision
from mvision.model import Model
from mvision.storage.run_folder import BEST, RunFolder
from mvision.weights import init_from, load


def train(
    config: Config,
    *,
    output: Path | None = None,
    init: str | None = None,
    init_parts: Collection[str] | None = None,
    resume: Path | None = None,
    device: str | None = None,
) -> Path:
    """Train, evaluate after every ``val_interval`` epochs, and return the run's folder.

    Args:
        config: everything that is configured; categories come from the data set.
        output: the run's folder; None takes the next number under ``runs/TASK``.
        init: weights to start from, see ``mvision.weights.init_from``.
        init_parts: of these weights, ``backbone`` and ``neck``; None takes all that fits.
        resume: a run folder to continue; ``config`` is then the run's own.

    Raises:
        UserError: anything wrong with data, weights, device or folder.
    """
    _check_task_weights(config)
    keep_freed_memory()
    accelerator = _accelerator(config, device)
    log = accelerator.print
    sources = read_data_sources(config.data, list(config.model.heads), config.train.seed, log)
    config.model.categories = sources[0].train.categories

    set_seed(config.train.seed)
    model = Model(config.model)
    if init is not None:
        log(init_from(model, init, init_parts))
    elif resume is None:
        _warn_of_slow_backbone(config, log)
    train_loader, validation = _loaders(config, sources, model, accelerator)
    trainer = _trainer(config, model, accelerator, len(train_loader))
    run = open_run(trainer, output, resume)
    log(f"run {run.path}: {_describe(trainer, sources)}")
    accelerator.init_trackers("mvision", config=flat(config.model_dump(mode="json")))

    for epoch in range(trainer.progress.epoch, config.train.epochs):
        start = time.monotonic()
        losses = train_epoch(trainer, train_loader, epoch)
        record: dict[str, Any] = {"epoch": epoch, "step": trainer.progress.step, "loss": losses}
        if epoch + 1 == config.train.epochs or (epoch + 1) % config.train.val_interval == 0:
            record["metrics"] = evaluate_all(trainer.eval_model, validation, accelerator=accelerator)
            keep_best(trainer, run, record["metrics"], epoch)
            figures = [f"{task} {name} {value:.3f}" for task, name, value in primary_figures(record["metrics"])]
            log(f"epoch {epoch + 1}: loss {sum(losses.values()):.2f}, {', '.join(figures)}")
        trainer.progress.epoch = epoch + 1
        trainer.progress.seconds += time.monotonic() - start
        finish_epoch(trainer, run, {**record, "seconds": round(trainer.progress.seconds, 2)})
        if is_out_of_patience(trainer, epoch):
            log(f"stopped early: no better AP in {config.train.patience} evaluations")
            break

    _finish_run(trainer, run, validation)
    accelerator.end_training()
    return run.path


def _check_task_weights(config: Config) -> None:
    heads = [task for task in config.model.heads if serving_task(task, config.model.heads) == task]
    for task in config.train.task_weights:
        if task not in heads:
            raise UserError(f"train.task_weights: there is no head {task} in this model, only {', '.join(heads)}")


def _accelerator(config: Config, device: str | None) -> Accelerator:
    """Devices, precision and trackers. One process uses ``device``; under ``torchrun`` each takes its own."""
    chosen = resolve_device(device)
    precision = resolve_precision(config.train.precision, chosen)
    reset_accelerate()  # an earlier run of this process may have had another precision
    # Accelerate always takes the first GPU in a single process, unless this variable names another.
    single = chosen.index is not None and "LOCAL_RANK" not in os.environ
    try:
        with patch_environment(accelerate_torch_device=chosen) if single else nullcontext():
            return Accelerator(
                cpu=chosen.type == "cpu",
                mixed_precision="no" if precision == "fp32" else precision,
                log_with=list(config.train.trackers) or None,
                project_dir="runs" if config.train.trackers else None,
                step_scheduler_with_optimizer=False,
            )
    except ValueError as error:
        raise UserError(f"train.precision {precision} or train.trackers {config.train.trackers}: {error}") from error


def _warn_of_slow_backbone(config: Config, log: Callable[[str], None]) -> None:
    """The low learning rate of a pretrained backbone is far too low for random weights."""
    settings = config.train
    slow = settings.backbone_lr is not None and settings.backbone_lr < settings.lr
    if slow and not config.model.backbone.pretrained:
        log(
            f"warning: the backbone starts from random weights at a low rate (train.backbone_lr "
            f"{settings.backbone_lr:g}): use --init WEIGHTS, -o model.backbone.pretrained=true, or "
            f"-o train.backbone_lr={settings.lr:g}"
        )


def _loaders(
    config: Config, sources: Sequence[DataSource], model: Model, accelerator: Accelerator
) -> tuple[Loader, list[Validation]]:
    """Batches to train on, and for every data set those to evaluate on, with its metrics."""
    shared: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "image_size": config.model.image_size,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "device": accelerator.device,
    }
    settings = config.train
    split = sources if len(sources) > 1 else sources[0].train
    train_loader = build_train_loader(split, config.data, seed=settings.seed, epochs=settings.epochs, **shared)
    validation = []
    for source in sources:
        loader = build_eval_loader(source.val, config.data, **shared)
        validation.append(Validation(source.name, loader, make_metrics(model, source.val, source.tasks)))
    return train_loader, validation


def _trainer(config: Config, model: Model, accelerator: Accelerator, batches: int) -> Trainer:
    """The model with its optimiser and moving average, on the device and wrapped for several processes.

    Args:
        batches: in an epoch, of this process.
    """
    for part in config.train.freeze:
        freeze(getattr(model, part))
    if channels_last_is_safe(model, accelerator.device):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = model.to(accelerator.device)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = Ema(model, config.train.ema_decay, config.train.ema_warmup) if config.train.ema_decay else None
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, config.train))
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    total_steps = math.ceil(batches / config.train.accumulate) * config.train.epochs
    return Trainer(config, accelerator, wrapped, optimizer, ema, total_steps)


def _describe(trainer: Trainer, sources: Sequence[DataSource]) -> str:
    """Model, data and hardware of the run in one line."""
    config, model, accelerator = trainer.config, trainer.bare_model, trainer.accelerator
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    images = [sum(map(len, splits)) for splits in zip(*((source.train, source.val) for source in sources))]
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    height, width = config.model.image_size
    return (
        f"{'+'.join(model.tasks)}, {config.model.backbone.name} with {parameters:.1f} M parameters "
        f"at {width} x {height}, {images[0]} + {images[1]} images, {len(model.categories)} classes, "
        f"{config.train.epochs} epochs, {precision} on {accelerator.num_processes} x {accelerator.device.type}"
    )


def _finish_run(trainer: Trainer, run: RunFolder, validation: list[Validation]) -> None:
    """Evaluate the best weights once more, as a user would load them, and write their figures and pictures."""
    accelerator = trainer.accelerator
    best = load(str(run.path / BEST)).to(accelerator.device)
    figures = evaluate_all(best, validation, accelerator=accelerator)
    if accelerator.is_main_process:
        run.write_text("metrics.json", json.dumps(figures, indent=2) + "\n")
        accelerator.print("\n\n".join(tables(validation)))
        loader = validation[0].loader
        assert isinstance(loader, Loader)
        dataset = loader.dataset
        assert isinstance(dataset, Dataset)
        write_prediction_grid(best, dataset, run.path / "predictions.jpg", log=accelerator.print)
        accelerator.print(f"best weights (epoch {trainer.progress.best_epoch + 1}): {run.path / BEST}")

"""The training run, from a config to a folder with weights. Read ``train`` from top to bottom."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment, set_seed
from tqdm import tqdm

from mvision.backbone import freeze
from mvision.compat import reset_accelerate
from mvision.config import Config, TrainConfig
from mvision.data import Dataset, Loader, build_eval_loader, build_train_loader, read_data_sources
from mvision.engine.optim import Ema, build_optimizer, set_learning_rate
from mvision.engine.report import plot_run, write_prediction_grid
from mvision.errors import UserError
from mvision.evaluation.evaluate import Validation, evaluate_all, make_metrics, tables
from mvision.heads import head_class, serving_task
from mvision.machine import channels_last_is_safe, keep_freed_memory, resolve_device, resolve_precision
from mvision.model import Model
from mvision.storage.run_folder import BEST, RunFolder
from mvision.weights import init_from, load, save_weights

MAX_BAD_STEPS = 20
"""Steps in a row without a finite gradient after which the run gives up."""


@dataclass
class Progress:
    """Where a run stands; saved with its state."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0


@dataclass
class Trainer:
    """What the loop holds; built once by ``train``."""

    config: Config
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    ema: Ema | None
    total_steps: int
    progress: Progress = field(default_factory=Progress)
    bad_steps: int = 0

    @property
    def bare_model(self) -> Model:
        """The model that is trained, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eval_model(self) -> Model:
        """What is evaluated and saved: the moving average where there is one."""
        model = self.bare_model if self.ema is None else self.ema.module
        assert isinstance(model, Model)
        return model


def train(
    config: Config,
    *,
    output: Path | None = None,
    init: str | None = None,
    init_parts: Collection[str] | None = None,
    resume: Path | None = None,
    device: str | None = None,
) -> Path:
    """Train, evaluate after every ``val_interval`` epochs, and leave a run folder.

    Args:
        config: everything that is configured; categories come from the data set.
        output: the run's folder; None takes the next number under ``runs/TASK``.
        init: weights to start from, see ``mvision.weights.init_from``.
        init_parts: of these weights, ``backbone`` and ``neck``; None takes all that fits.
        resume: a run folder to continue; ``config`` is then the run's own.

    Returns:
        The run's folder.

    Raises:
        UserError: anything wrong with data, weights, device or folder.
    """
    _check_tasks(config)
    keep_freed_memory()
    accelerator = _accelerator(config, device)
    log = accelerator.print
    parts = read_data_sources(config.data, list(config.model.heads), config.train.seed, log)
    config.model.categories = parts[0].train.categories

    set_seed(config.train.seed)
    model = Model(config.model)
    if init is not None:
        log(init_from(model, init, init_parts))
    elif resume is None:
        _warn_of_slow_backbone(config, log)
    for part in config.train.freeze:
        freeze(getattr(model, part))
    if config.train.channels_last and channels_last_is_safe(model, accelerator.device):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    sizes: dict[str, Any] = {"batch_size": config.train.batch_size, "image_size": config.model.image_size}
    place: dict[str, Any] = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "device": accelerator.device,
    }
    train_loader = build_train_loader(
        parts if len(parts) > 1 else parts[0].train,
        config.data,
        seed=config.train.seed,
        epochs=config.train.epochs,
        **sizes,
        **place,
    )
    validation = [
        Validation(
            part.name,
            build_eval_loader(part.val, config.data, **sizes, **place),
            make_metrics(model, part.val, part.tasks),
        )
        for part in parts
    ]

    model = model.to(accelerator.device)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = Ema(model, config.train.ema_decay, config.train.ema_warmup) if config.train.ema_decay else None
    optimizer = build_optimizer(model, config.train)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    steps_per_epoch = math.ceil(len(train_loader) / config.train.accumulate)
    trainer = Trainer(config, accelerator, wrapped, optimizer, ema, steps_per_epoch * config.train.epochs)

    run = _open_run(trainer, output, resume)
    images = [sum(len(getattr(part, split)) for part in parts) for split in ("train", "val")]
    log(f"run {run.path}: {_describe(trainer, *images)}")
    accelerator.init_trackers("mvision", config=_flat(config.model_dump(mode="json")))

    for epoch in range(trainer.progress.epoch, config.train.epochs):
        epoch_start = time.monotonic()
        losses = train_epoch(trainer, train_loader, epoch)
        record: dict[str, Any] = {"epoch": epoch, "step": trainer.progress.step, "loss": losses}
        last = epoch + 1 == config.train.epochs
        if last or (epoch + 1) % config.train.val_interval == 0:
            record["metrics"] = evaluate_all(trainer.eval_model, validation, accelerator=accelerator)
            _keep_best(trainer, run, record["metrics"], epoch)
            found = ", ".join(f"{task} {name} {value:.3f}" for task, name, value in _main_figures(record["metrics"]))
            log(f"epoch {epoch + 1}: loss {sum(losses.values()):.2f}, {found}")
        trainer.progress.epoch = epoch + 1
        trainer.progress.seconds += time.monotonic() - epoch_start
        record["seconds"] = round(trainer.progress.seconds, 2)
        _finish_epoch(trainer, run, record)
        if _stop_early(trainer, epoch):
            log(f"stopped early: no better AP in {config.train.patience} evaluations")
            break

    _finish_run(trainer, run, validation)
    accelerator.end_training()
    return run.path


def train_epoch(trainer: Trainer, loader: Loader, epoch: int) -> dict[str, float]:
    """One pass over the data; returns the mean of every loss term."""
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
    clock = time.monotonic()
    count = 0
    for index, loaded in enumerate(bar):
        for file, reason in loaded.skipped:
            tqdm.write(f"skipped {file}: {reason}")
        batch = loaded.to(accelerator.device)
        boundary = (index + 1) % config.accumulate == 0 or index + 1 == len(loader)
        with accelerator.no_sync(trainer.model) if not boundary else nullcontext():
            with accelerator.autocast():
                outputs = trainer.model(batch.images, batch.targets)
            terms = trainer.bare_model.loss(outputs, batch.targets)
            loss = _total(terms, config)
            accelerator.backward(loss / config.accumulate)
        for name, value in terms.items():
            sums[_group(name)] += float(value.detach())
        count += 1
        if boundary:
            _optimize(trainer)
            left = (time.monotonic() - clock) / count * ((config.epochs - epoch) * len(loader) - count)
            bar.set_postfix_str(_status(trainer, sums, count, left))
    return {name: value / max(1, count) for name, value in sums.items()}


def _total(terms: dict[str, torch.Tensor], config: TrainConfig) -> torch.Tensor:
    """One loss from the terms of all heads, named ``task/term``.

    Fixed weights: adding the logarithms (Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2)
    was measured and is no better, see docs/measurements.md.
    """
    losses: dict[str, torch.Tensor] = {}
    for name, value in terms.items():
        task = name.partition("/")[0]
        losses[task] = losses.get(task, 0) + value.float()
    return torch.stack([config.task_weights.get(task, 1.0) * value for task, value in losses.items()]).sum()


def _optimize(trainer: Trainer) -> None:
    """One optimiser step, unless the gradient is not finite."""
    config, progress = trainer.config.train, trainer.progress
    set_learning_rate(trainer.optimizer, config, progress.step, trainer.total_steps)
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), config.clip_norm or float("inf"))
    # The norm is of the gradient averaged over all processes, so all of them decide alike.
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


def _check_tasks(config: Config) -> None:
    heads = [task for task in config.model.heads if serving_task(task, config.model.heads) == task]
    for task in config.train.task_weights:
        if task not in heads:
            raise UserError(f"train.task_weights: there is no head {task} in this model, only {', '.join(heads)}")


def _warn_of_slow_backbone(config: Config, log: Callable[[str], None]) -> None:
    """A rate meant for pretrained backbones teaches a random one next to nothing."""
    settings = config.train
    slow = settings.backbone_lr is not None and settings.backbone_lr < settings.lr
    if slow and not config.model.backbone.pretrained:
        log(
            f"warning: the backbone starts from random weights at a low rate (train.backbone_lr "
            f"{settings.backbone_lr:g}): use --init WEIGHTS, -o model.backbone.pretrained=true, or "
            f"-o train.backbone_lr={settings.lr:g}"
        )


def _accelerator(config: Config, device: str | None) -> Accelerator:
    """Devices, precision and trackers. One process uses ``device``; under ``torchrun`` each takes its own."""
    chosen = resolve_device(device)
    precision = resolve_precision(config.train.precision, chosen)
    # Settings outlive an Accelerator: a second run in the same process would be refused for having others.
    reset_accelerate()
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


def _open_run(trainer: Trainer, output: Path | None, resume: Path | None) -> RunFolder:
    """A new folder with the whole config in it, or the old one with the state loaded."""
    accelerator = trainer.accelerator
    if resume is not None:
        run = RunFolder.resume(resume)
        state = run.state()
        accelerator.load_state(str(state))
        trainer.progress = Progress(**json.loads((state / "progress.json").read_text()))
        if accelerator.is_main_process:
            run.cut_records(trainer.progress.epoch)
            run.write_text("config.yaml", trainer.config.to_yaml())
        return run
    folder: list[Any] = [None]
    if accelerator.is_main_process:
        folder[0] = RunFolder.create(output, trainer.bare_model.tasks).path
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(folder)
    run = RunFolder(folder[0])
    if accelerator.is_main_process:
        run.write_text("config.yaml", trainer.config.to_yaml())
    return run


def _keep_best(trainer: Trainer, run: RunFolder, metrics: dict[str, dict[str, float]], epoch: int) -> None:
    """Save the weights if this evaluation is the best so far (mean of the tasks' main figures)."""
    score = sum(value for _, _, value in _main_figures(metrics)) / len(metrics)
    progress = trainer.progress
    if score > progress.best or progress.best_epoch < 0:
        progress.best, progress.best_epoch = score, epoch
        if trainer.accelerator.is_main_process:
            save_weights(trainer.eval_model, run.path / BEST, extra={"epoch": epoch + 1, "metrics": metrics})


def _main_figures(metrics: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    """Task, name and value of the figure that each task is judged by."""
    names = {task: head_class(task).primary_metric for task in metrics}
    return [(task, names[task], figures[names[task]]) for task, figures in metrics.items()]


def _finish_epoch(trainer: Trainer, run: RunFolder, record: dict[str, Any]) -> None:
    """Log the epoch and save everything needed to continue after it."""
    accelerator = trainer.accelerator
    flat = {**_flat(record["loss"], "loss"), **_flat(record.get("metrics", {}))}
    accelerator.log(flat, step=record["step"])
    fresh = run.path / ".state.tmp"
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (fresh / "progress.json").write_text(json.dumps(vars(trainer.progress)))
        run.replace_state(fresh)
        run.log(record)
        plot_run(run.records(), run.path / "results.png")
    accelerator.wait_for_everyone()


def _finish_run(trainer: Trainer, run: RunFolder, validation: list[Validation]) -> None:
    """Evaluate the best weights once more, as a user would load them, and leave figures and pictures."""
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
        write_prediction_grid(best, dataset, run.path / "predictions.jpg")
        accelerator.print(f"best weights (epoch {trainer.progress.best_epoch + 1}): {run.path / BEST}")


def _stop_early(trainer: Trainer, epoch: int) -> bool:
    waited = (epoch - trainer.progress.best_epoch) // trainer.config.train.val_interval
    return 0 < trainer.config.train.patience <= waited


def _status(trainer: Trainer, sums: dict[str, float], count: int, left: float) -> str:
    """Loss, best AP so far and the time left in the whole run, for the progress bar."""
    progress = trainer.progress
    best = f"AP {progress.best:.3f}, " if progress.best_epoch >= 0 else ""
    return f"loss {sum(sums.values()) / count:.3f}, {best}{int(left // 60)}:{int(left % 60):02d} left"


def _describe(trainer: Trainer, train_images: int, val_images: int) -> str:
    """What is trained on what, in one line."""
    config, model = trainer.config, trainer.bare_model
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    precision = {"no": "fp32"}.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision)
    height, width = config.model.image_size
    return (
        f"{'+'.join(model.tasks)}, {config.model.backbone.name} with {parameters:.1f} M parameters "
        f"at {width} x {height}, {train_images} + {val_images} images, {len(model.categories)} classes, "
        f"{config.train.epochs} epochs, "
        f"{precision} on {trainer.accelerator.num_processes} x {trainer.accelerator.device.type}"
    )


def _group(name: str) -> str:
    """The loss term as logged: layers are summed, the kinds of supervision are kept apart."""
    task, _, term = name.partition("/")
    parts = term.split("_")
    kind = next((part for part in parts[1:] if not part.isdigit()), "decoder")
    return f"{task}/{kind}_{parts[0]}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings or figures as one level, for trackers, which take numbers and strings alone."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict):
            flat |= _flat(value, name)
        else:
            flat[name] = value if isinstance(value, (int, float, str)) else str(value)
    return flat

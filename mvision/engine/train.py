"""The training run, from a config to a folder with weights. Read ``train`` from top to bottom."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment, set_seed

from mvision.backbone import freeze
from mvision.compat import reset_accelerate
from mvision.config import Config, RunConfig
from mvision.data import Dataset, Loader, build_eval_loader, build_train_loader, read_data_sources
from mvision.data.loading.pixel_range import choose_pixel_range
from mvision.data.loading.samplers import TrainBatches
from mvision.data.loading.sources import DataSource
from mvision.data.loading.tiles import lines_of_tiles, tiled_datasets
from mvision.data.loading.workers import pick_workers, worker_context
from mvision.engine.acceleration import compiled, set_for_training
from mvision.engine.auto import decided, resumed, start_of
from mvision.engine.checkpoint import (
    finish_epoch,
    has_ended,
    keep_best,
    new_folder,
    primary_figures,
    require_finite,
    save_inside_epoch,
    start,
)
from mvision.engine.checks import (
    check_batches,
    check_model,
    check_resumed,
    check_task_weights,
    tell_before_the_first_step,
)
from mvision.engine.epoch import train_epoch
from mvision.engine.graphs import can_record, record_features
from mvision.engine.imbalance import plan_repeats, weigh_classes
from mvision.engine.optim import Ema, build_optimizer
from mvision.engine.plan import describe_run, images_of, plural
from mvision.engine.report import write_prediction_grid
from mvision.engine.state import SavedState, read_state, run_facts
from mvision.engine.stopping import StopRequest, lost_processes_in_one_line
from mvision.engine.trackers import check_trackers, start_trackers
from mvision.engine.trainer import Trainer
from mvision.engine.zero_shot import tell_zero_shot
from mvision.errors import Stopped, UserError, printable_lines
from mvision.evaluation import Validation, evaluate_all, make_metrics, tables
from mvision.evaluation.analyses import (
    analyse_all,
    analysis_tables,
    best_thresholds,
    with_analyses,
    write_curves,
)
from mvision.evaluation.tables import figure_text
from mvision.machine import channels_last_is_safe, keep_freed_memory, resolve_device, resolve_precision
from mvision.model import Model
from mvision.storage.run_folder import BEST, RunFolder
from mvision.weights import load
from mvision.weights.files import Start, starting_from
from mvision.weights.sources import origin
from mvision.weights.start import published_start
from mvision.weights.thresholds import write_thresholds
from mvision.weights.transfer import Transferred


def train(
    config: Config,
    *,
    output: Path | None = None,
    init: str | None = None,
    init_parts: Collection[str] | None = None,
    init_family: str | None = None,
    resume: Path | None = None,
    device: str | None = None,
) -> Path:
    """Train, evaluate after every ``val_interval`` epochs, and return the run's folder.

    Args:
        config: everything that is configured; categories come from the data set.
        output: the run's folder; None takes the next number under ``runs/TASK``.
        init, init_parts, init_family: weights to start from, see ``mvision.weights.init_from``.
        resume: a run folder to continue; ``config`` is then the run's own.

    Raises:
        UserError: anything wrong with data, weights, device or folder.
        Stopped: it was asked to, by Ctrl-C or SIGTERM; its state is saved after the step that it was in.
    """
    _check_options(config, output, resume)
    keep_freed_memory()
    accelerator = _accelerator(config, device)
    log = _printer(accelerator)
    with ExitStack() as stack:
        stack.enter_context(lost_processes_in_one_line(accelerator))
        stop = stack.enter_context(StopRequest().listening())
        run, saved = (None, None) if resume is None else _reopen(resume, accelerator, stack)
        if run is not None and saved is not None:
            config = resumed(config, run.path)
            if _is_complete(run, config, saved):
                log(_nothing_to_do(run, config, saved))
                return run.path
        begin = None if init is None else starting_from(init, init_parts, init_family)
        check_model(config.model, begin, is_new=saved is None)
        sources = _read_data(config, saved is None, log)
        set_seed(config.train.seed)
        model, taken = _build_model(config, begin, saved is None, log)
        train_loader, validation = _loaders(config, sources, model, accelerator, log)
        stack.callback(_close, train_loader, validation)
        config = decided(config, len(train_loader), start_of(config, taken), images_of(sources))
        facts = run_facts(config, images_of(sources), len(train_loader))
        if run is not None and saved is not None:
            check_resumed(run.path, config, saved, facts, log)
        trainer = _trainer(config, model, accelerator, len(train_loader))
        started_from = saved.facts.get("started_from") if saved else origin(init)
        trainer.stop, trainer.facts = stop, facts | {"started_from": started_from}
        check_batches(trainer, train_loader)
        _plan_epochs(trainer, train_loader, stack)
        if run is None:
            run = new_folder(trainer, output)
            _claim(run, accelerator, stack)
        start(trainer, run, saved)
        log(f"run {run.path}: {describe_run(trainer, sources)}")
        tell_before_the_first_step(config, model, sources, log, taken, is_new=saved is None)
        tell_zero_shot(trainer, begin if saved is None else None, validation, log)
        _train_to_the_end(trainer, run, train_loader, validation)
        return run.path


def _check_options(config: Config, output: Path | None, resume: Path | None) -> None:
    if resume is not None and output is not None:
        raise UserError(f"--output {output}: a resumed run stays in its folder, {resume}; leave --output out")
    check_task_weights(config)


def _plan_epochs(trainer: Trainer, loader: Loader, stack: ExitStack) -> None:
    """Which epochs have which augmentation; and backbone and neck compiled for all sizes, where the config wants it."""
    assert isinstance(loader.batches, TrainBatches)
    loader.batches.plan_epochs(trainer.config.train.epochs, trainer.config.data.augment)
    if trainer.config.train.compile:
        stack.enter_context(compiled(trainer, loader.batches.sizes()))


def _read_data(config: Config, is_new: bool, log: Callable[[str], None]) -> list[DataSource]:
    """The data sets of the run; the config gets what they decide, the classes and (of a new run) the pixels' range."""
    if pick_workers(config.data.workers, on_cuda=False) > 0:
        worker_context()  # makes its imports while the data is read and the model is built
    heads = config.model.heads
    sources = read_data_sources(
        config.data, list(heads), config.train.seed, log, heads, image_size=config.model.image_size
    )
    config.model.categories = sources[0].train.categories
    if is_new:
        trained = [source.train for source in sources]
        config.model.pixel_range = choose_pixel_range(config.model.pixel_range, trained, log)
    return sources


def _build_model(
    config: Config, begin: Start | None, is_new: bool, log: Callable[[str], None]
) -> tuple[Model, Transferred | None]:
    """The model with the weights that a new run starts from, and what it took over of ``begin``.

    Args:
        begin: loads initial weights, and returns a line that says which; those of another run come with its state.
    """
    backbone = config.model.backbone
    wanted = backbone.pretrained, backbone.weights
    if not is_new:
        backbone.forget_weights()
    try:
        model = Model(config.model)
    finally:
        backbone.pretrained, backbone.weights = wanted
    if is_new:
        model.backbone.decide_norms(begin is None and backbone.starts_trained)
    if begin is not None:
        log(begin(model))
    elif is_new and (line := published_start(config.model)):
        log(line)
    return model, begin.transferred if begin else None


def _reopen(path: Path, accelerator: Accelerator, stack: ExitStack) -> tuple[RunFolder, SavedState]:
    """The folder of a run that goes on, kept free of other runs until the end of this one, and its state."""
    run = RunFolder.resume(path)
    _claim(run, accelerator, stack)
    return run, read_state(run.state)


def _is_complete(run: RunFolder, config: RunConfig, saved: SavedState) -> bool:
    """Whether all epochs are trained and all files of the end are written."""
    return has_ended(config.train, saved.progress) and run.is_finished(saved.progress.epoch)


def _train_to_the_end(trainer: Trainer, run: RunFolder, loader: Loader, validation: list[Validation]) -> None:
    start_trackers(trainer, run)
    try:
        _train_epochs(trainer, run, loader, validation)
        _finish_run(trainer, run, validation)
        for one in (loader, *(part.loader for part in validation)):
            if isinstance(one, Loader) and (line := one.missing()):
                _printer(trainer.accelerator)(f"warning: {line}")
    except Stopped as stopped:
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
        command = f"mvision train --resume {shlex.quote(str(run.path))}"
        hint = f"go on with: {command}" if run.state.is_file() else "nothing was saved yet"
        raise Stopped(stopped.number, hint) from None
    trainer.accelerator.end_training()


def _train_epochs(trainer: Trainer, run: RunFolder, loader: Loader, validation: list[Validation]) -> None:
    """Train and evaluate, epoch by epoch, from where the run is."""
    config, progress, log = trainer.config.train, trainer.progress, _printer(trainer.accelerator)
    if progress.epoch or progress.batch:
        inside = f" and {progress.batch} of {len(loader)} batches" if progress.batch else ""
        log(f"resumed after {plural(progress.epoch, 'epoch')}{inside}")
    while not has_ended(config, progress):
        epoch, begin, before = progress.epoch, time.monotonic(), progress.seconds
        try:
            with trainer.stop.held(), set_for_training(trainer.accelerator):
                losses = train_epoch(trainer, loader, epoch)
            require_finite(trainer, run)
            if trainer.stop.requested(trainer.accelerator):
                raise trainer.stop.stopped()
            record: dict[str, Any] = {"epoch": epoch, "step": progress.step, "loss": losses}
            if epoch + 1 == config.epochs or (epoch + 1) % config.val_interval == 0:
                record["metrics"] = evaluate_all(trainer.eval_model, validation, accelerator=trainer.accelerator)
                keep_best(trainer, run, record["metrics"], epoch)
                figures = [f"{task} {name} {figure_text(x)}" for task, name, x in primary_figures(record["metrics"])]
                log(f"epoch {epoch + 1}: loss {sum(losses.values()):.2f}, {', '.join(figures)}")
        except Stopped:
            with trainer.stop.held():
                progress.seconds = before + time.monotonic() - begin
                save_inside_epoch(trainer, run)
            raise
        with trainer.stop.held():
            progress.epoch, progress.batch, progress.sums = epoch + 1, 0, {}
            progress.seconds = before + time.monotonic() - begin
            finish_epoch(trainer, run, {**record, "seconds": round(progress.seconds, 2)})
            if trainer.stop.requested(trainer.accelerator):
                raise trainer.stop.stopped()
    if progress.epoch < config.epochs:
        log(f"stopped early: no better result in {plural(config.patience, 'evaluation')} (train.patience)")


def _claim(run: RunFolder, accelerator: Accelerator, stack: ExitStack) -> None:
    """Keep other runs out of the folder until the end of this one."""
    if accelerator.is_main_process:
        stack.enter_context(run.claimed())


def _close(train_loader: Loader, validation: list[Validation]) -> None:
    """End the processes that load images."""
    train_loader.close()
    for part in validation:
        assert isinstance(part.loader, Loader)
        part.loader.close()


def _nothing_to_do(run: RunFolder, config: RunConfig, saved: SavedState) -> str:
    epoch = saved.progress.epoch
    if epoch >= config.train.epochs:
        return (
            f"run {run.path}: nothing to do, it is trained to its end ({plural(epoch, 'epoch')}). To train on, add "
            f"--epochs N with more than {epoch}"
        )
    return (
        f"run {run.path}: nothing to do, it stopped early after {plural(epoch, 'epoch')}: no better result in "
        f"{plural(config.train.patience, 'evaluation')}. To train on, add -o train.patience=0"
    )


def _accelerator(config: Config, device: str | None) -> Accelerator:
    """Devices, precision and trackers. One process uses ``device``; under ``torchrun`` each takes its own."""
    chosen = resolve_device(device)
    precision = resolve_precision(config.train.precision, chosen)
    reset_accelerate()  # an earlier run of this process may have had another precision
    # Accelerate always takes the first GPU in a single process, unless this variable names another.
    single = chosen.index is not None and "LOCAL_RANK" not in os.environ
    check_trackers(config.train.trackers)
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


def _loaders(
    config: Config,
    sources: Sequence[DataSource],
    model: Model,
    accelerator: Accelerator,
    log: Callable[[str], None],
) -> tuple[Loader, list[Validation]]:
    """Batches to train on, and for every data set those to evaluate on, with its metrics."""
    shared: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "image_size": config.model.image_size,
        "pixel_range": config.model.pixel_range,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "device": accelerator.device,
    }
    settings = config.train
    split = sources if len(sources) > 1 or sources[0].weight != 1 else sources[0].train
    repeats = plan_repeats(config, sources, model, log)
    factors = None if repeats is None else repeats.factors
    train_loader = build_train_loader(split, config.data, seed=settings.seed, factors=factors, **shared)
    weigh_classes(config, sources, model, repeats, tiled_datasets(train_loader), log)
    validation = []
    for source in sources:
        loader = build_eval_loader(source.val, config.data, **shared)
        metrics = make_metrics(model, source.val, source.tasks)
        validation.append(Validation(source.name, loader, metrics, loader.tiles))
    for line in lines_of_tiles(train_loader, *(part.loader for part in validation)):
        _printer(accelerator)(line)
    return train_loader, validation


def _trainer(config: RunConfig, model: Model, accelerator: Accelerator, batches: int) -> Trainer:
    """The model with its optimiser and moving average, on the device and wrapped for several processes.

    Args:
        batches: in an epoch, of this process.
    """
    for part in config.train.freeze:
        # A branch of details beside a pretrained ViT starts from random weights, so it is trained nevertheless.
        freeze(model.backbone.net if part == "backbone" else getattr(model, part))
    if channels_last_is_safe(model, accelerator.device):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = model.to(accelerator.device)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = Ema(model, config.train.ema_decay, config.train.ema_warmup) if config.train.ema_decay else None
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, config.train))
    total_steps = math.ceil(batches / config.train.accumulate) * config.train.epochs
    last_steps = total_steps // config.train.epochs * config.data.augment.count_last(config.train.epochs)
    trainer = Trainer(config, accelerator, wrapped, optimizer, ema, total_steps, last_steps)
    if config.train.cuda_graphs and not config.train.compile and can_record(accelerator, config.train.accumulate):
        record_features(trainer.bare_model)
    return trainer


def _finish_run(trainer: Trainer, run: RunFolder, validation: list[Validation]) -> None:
    """Evaluate the best weights once more, as a user would load them, and write their figures and pictures."""
    accelerator, progress = trainer.accelerator, trainer.progress
    best = load(str(run.path / BEST)).to(accelerator.device)
    figures = evaluate_all(best, validation, accelerator=accelerator)
    if accelerator.is_main_process:
        analyses = analyse_all(validation)
        run.write_text("metrics.json", json.dumps(with_analyses(figures, analyses), indent=2) + "\n")
        accelerator.print("\n\n".join([*tables(validation), *analysis_tables(analyses)]))
        write_thresholds(run.path / BEST, best_thresholds(analyses))
        write_curves(analyses, run.path)
        loader = validation[0].loader
        assert isinstance(loader, Loader)
        dataset = loader.dataset
        assert isinstance(dataset, Dataset)
        write_prediction_grid(best, dataset, run.path / "predictions.jpg", log=_printer(accelerator))
        run.mark_finished(progress.epoch)
        kind = "best" if progress.best >= 0 else "newest"
        accelerator.print(f"{kind} weights (epoch {progress.best_epoch + 1}): {run.path / BEST}")


def _printer(accelerator: Accelerator) -> Callable[[str], None]:
    """Prints in the main process alone, with control characters in names written out."""
    return lambda text: accelerator.print(printable_lines(text))

"""``mvision val``: evaluate weights on a split of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mvision.commands.results import ResultsFile, results_path
from mvision.config import Config, DataConfig, config_of_run, data_of_run
from mvision.config.tiles import TileConfig
from mvision.data import CocoSplit, build_eval_loader, read_validation
from mvision.data.loading.tiles import lines_of_tiles
from mvision.deploy.exported import is_exported
from mvision.deploy.runtimes import open_fastest
from mvision.errors import UserError
from mvision.evaluation import Evaluated, Validation, evaluate_all, make_metrics, tables
from mvision.evaluation.analyses import (
    analyse_all,
    analysis_tables,
    best_thresholds,
    with_analyses,
    write_curves,
)
from mvision.inference.tiles import make_tiling
from mvision.machine import PrecisionOption, keep_freed_memory, resolve_device, resolve_precision, torch_dtype
from mvision.storage.atomic import remove_partial_files, write_text
from mvision.weights import load
from mvision.weights.thresholds import thresholds_file
from mvision.weights.thresholds import write_thresholds as put_thresholds

METRICS = "metrics.json"


def validate(
    weights: str,
    *,
    tasks: Sequence[str] = (),
    family: str | None = None,
    data: str | None = None,
    split: str | None = None,
    output: Path | None = None,
    write_thresholds: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    precision: PrecisionOption | None = None,
    device: str | None = None,
    tile: tuple[int, int] | None = None,
    overlap: float | None = None,
    whole: bool = True,
) -> str:
    """Evaluate weights; returns what to print: the data, the COCO table and AP by class of every task.

    Args:
        weights, family: any source that ``mvision.load`` takes.
        tasks: the tasks to evaluate; empty: all that the weights have.
        data, split: folder and name of the split; None: those of the weights' run if they lie in one, else the built-in
            data set and ``val``.
        output: folder for ``metrics.json``, pictures, and ``predictions.json``, a COCO results list of what was
            evaluated: every score, not rounded. Several tasks or data sets have a list each.
        write_thresholds: put the best thresholds of the classes into the weights file, see ``thresholds_file``.
        batch_size, workers: images per step (None: 16), and loading processes (None: by the number of cores).
        precision: None: that of the run, so that the metrics are those at the end of training. Otherwise, and for an
            exported model always, the model is opened as ``mvision predict`` does, see ``open_fastest``.
        device: None: the first GPU, else the CPU.
        tile, overlap, whole: evaluate on tiles, whose results are merged before they are measured, see ``make_tiling``;
            None: as in training; (0, 0): without tiles.

    Raises:
        UserError: the weights, data, device or folder cannot be used.
    """
    written = thresholds_file(weights) if write_thresholds else None  # fail before the evaluation, not after it
    keep_freed_memory()
    chosen, run = resolve_device(device), config_of_run(weights)
    model, runtime = _open(weights, tasks, chosen, precision, family)
    config, split = _data_config(run, data, split)
    tiles = _tiles(tile, overlap, whole, None if run is None else run.data.tile)
    messages, parts = read_validation(config, split, model.tasks, seed=0 if run is None else run.train.seed)
    _make_folder(output)  # fail before the evaluation, not after it
    loading = DataConfig(workers=workers, tile=tiles)
    validation = _validation(model, parts, loading, batch_size or 16, chosen)
    messages += lines_of_tiles(None, *(part.loader for part in validation))
    messages += [] if tiles is None else [f"evaluated on {tiles.tiling.text}"]
    trained_in = "auto" if run is None else run.train.precision
    autocast = "fp32" if runtime is not None else resolve_precision(trained_in, chosen)
    with ExitStack() as files:
        results = _results_files(files, output, model, parts)
        with torch.autocast(chosen.type, torch_dtype(autocast), enabled=autocast != "fp32"):
            metrics = evaluate_all(model, validation, keep=partial(_keep, results) if results else None)
        if output is not None:
            (output / METRICS).unlink(missing_ok=True)  # an earlier one does not belong to the new predictions
    analysed = _analysed(validation, metrics, output, written)
    return "\n".join([*messages, *_left_out(results), *filter(None, [runtime]), *tables(validation), *analysed])


def _data_config(run: Config | None, data: str | None, split: str | None) -> tuple[DataConfig, str | None]:
    """The data set that was asked for, else that of the run, else the built-in one; and the name of a whole split.

    The split that the run validated on by name, but divided into folds, or held out, has None: a part of the pictures.
    """
    config = data_of_run(run, data)
    if run is not None:
        config.ignore_iscrowd = run.data.ignore_iscrowd  # what an object is has to mean the same as in training
    is_part = split == config.val and (config.fold is not None or config.val_fraction > 0)
    return config, None if is_part else split


def _analysed(
    validation: Sequence[Validation], metrics: dict[str, dict[str, float]], output: Path | None, weights: Path | None
) -> list[str]:
    """The tables of the analyses; figures and pictures go into a folder, best thresholds into the weights."""
    analyses = analyse_all(validation)
    if output is not None:
        try:
            write_text(output / METRICS, json.dumps(with_analyses(metrics, analyses), indent=2) + "\n")
            write_curves(analyses, output)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--output {output}: cannot be written ({reason}); choose another") from error
    lines = analysis_tables(analyses)
    if weights is not None:
        put_thresholds(weights, best_thresholds(analyses))
        lines.append(f"best thresholds written into {weights}")
    return lines


def _validation(
    model: Evaluated,
    parts: Sequence[tuple[str, list[str], CocoSplit]],
    config: DataConfig,
    batch_size: int,
    device: torch.device,
) -> list[Validation]:
    """The images (or tiles) of every data set, with its metrics."""
    size, pixel_range = model.config.image_size, model.config.pixel_range
    load = partial(
        build_eval_loader, config=config, batch_size=batch_size, image_size=size, pixel_range=pixel_range, device=device
    )
    loaded = [(name, load(part), make_metrics(model, part, tasks)) for name, tasks, part in parts]
    return [Validation(name, loader, metrics, loader.tiles) for name, loader, metrics in loaded]


def _tiles(
    tile: tuple[int, int] | None, overlap: float | None, whole: bool, trained: TileConfig | None
) -> TileConfig | None:
    """The tiles to evaluate on: those that were asked for, else those of the training."""
    if tile is None and overlap is None and whole:
        return trained
    size = trained.size if tile is None and trained is not None else tile
    tiling = make_tiling(size, overlap, whole)
    return None if tiling is None else TileConfig(size=tiling.size, overlap=tiling.overlap, whole=tiling.whole)


def _results_files(
    files: ExitStack, output: Path | None, model: Evaluated, parts: Sequence[tuple[str, list[str], CocoSplit]]
) -> dict[tuple[int, str], ResultsFile]:
    """The open files by the position of the data set and the task; they are closed with ``files``."""
    if output is None:
        return {}
    several_tasks = len({task for _, tasks, _ in parts for task in tasks}) > 1
    results: dict[tuple[int, str], ResultsFile] = {}
    for number, (name, tasks, part) in enumerate(parts):
        for task in tasks:
            names = [name] * (len(parts) > 1) + [task] * several_tasks
            path = results_path(output, *names, taken=[result.path for result in results.values()])
            results[number, task] = files.enter_context(ResultsFile(path, model.head(task).classes, part.own))
    return results


def _keep(results: dict[tuple[int, str], ResultsFile], part: int, task: str, entries: list[dict[str, Any]]) -> None:
    results[part, task].add(entries)


def _left_out(results: dict[tuple[int, str], ResultsFile]) -> list[str]:
    return [
        f"! {result.path}: {result.left_out.total()} results left out, of classes that the data set does not have "
        f"({', '.join(list(result.left_out)[:5])})"
        for result in results.values()
        if result.left_out
    ]


def _open(
    weights: str, tasks: Sequence[str], device: torch.device, precision: PrecisionOption | None, family: str | None
) -> tuple[Evaluated, str | None]:
    """The model, and its runtime where ``open_fastest`` chose one."""
    if precision is not None or is_exported(weights):
        return open_fastest(weights, tasks, device, precision or "auto", family)
    return load(weights, list(tasks) or None, family=family).to(device), None


def _make_folder(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)  # of an evaluation that was killed
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror or error}); choose another") from error

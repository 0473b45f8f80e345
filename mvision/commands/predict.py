"""``mvision predict``: by default with the newest run, on sample images of its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from mvision.config import config_of_run, data_of_run
from mvision.data import CocoSplit
from mvision.data.loading.folders import Folder, open_folders
from mvision.deploy.runtimes import open_fastest
from mvision.errors import UserError
from mvision.evaluation import Evaluated
from mvision.heads import head_class, known_tasks, serving_task
from mvision.inference.output import ForMetrics
from mvision.inference.predict_sources import predict_sources
from mvision.inference.selection import (
    OTHERS,
    AskedThreshold,
    Selection,
    resolve_threshold,
    wants_best,
    without_best,
)
from mvision.inference.sources import Source, Sources, find_sources
from mvision.inference.summary import Summary
from mvision.inference.tiles import Tiling, make_tiling
from mvision.inference.tracking import check_tracker
from mvision.machine import PrecisionOption, keep_freed_memory, resolve_device
from mvision.storage.run_folder import BEST
from mvision.structures import Category
from mvision.structures.messages import decoder_messages_hidden
from mvision.weights import zoo

SAMPLES = 8
NAMED = 20  # classes with their thresholds in a line
RUNS = Path("runs")


def predict_job(
    sources: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    weights: str | None = None,
    family: str | None = None,
    data: str | None = None,
    split: str | None = None,
    threshold: AskedThreshold | None = None,
    multi_label: bool = False,
    nms: float | None = None,
    tile: tuple[int, int] | None = None,
    overlap: float | None = None,
    whole: bool = True,
    batch_size: int | None = None,
    output: Path | None = None,
    device: str | None = None,
    precision: PrecisionOption = "auto",
    pictures: bool = True,
    track: str | None = None,
    log: Callable[[str], None] = print,
) -> Summary:
    """Predict, and write ``predictions.json`` and pictures.

    Args:
        sources: see ``find_sources``; empty: the first validation images of the weights' run, else of built-in data.
        tasks: the tasks to run; empty: all that the weights have.
        weights, family: any source that ``mvision.load`` takes; None: the newest run with these tasks.
        data, split: a data set in place of ``sources``, and one of its splits, see ``images_of_split``.
        threshold, multi_label, nms: see ``predict_images``; None: 0.5. For a data set ``predictions.json`` has results
            of every score unless a threshold is given.
        tile, overlap, whole, batch_size: predict on tiles, see ``make_tiling``, so many of them (or of images) at once.
        output: a folder; None: ``predictions``.
        device, precision: None: the first GPU, else the CPU; see ``open_fastest``.
        pictures: without, ``predictions.json`` is written alone.
        track: follow the objects of videos by this method, see ``predict_sources``.
        log: is called with what names the runtime, and with what is left out of the results.

    Raises:
        UserError: there is no run, or the sources, data, weights, device or folder cannot be used.
    """
    _check_before(tasks, sources, is_data=data is not None or split is not None, track=track)
    Selection(without_best(threshold), multi_label, nms)  # mistakes are reported before the model is opened
    tiling = make_tiling(tile, overlap, whole)
    folder = output or Path("predictions")
    source = str(newest_run(tasks)) if weights is None else weights
    of_split = _folder_of(source, data) if data is not None or split is not None else None
    keep_freed_memory()
    model, runtime = open_fastest(source, tasks, resolve_device(device), precision, family)
    _check_objects(track, model.tasks)
    chosen = Selection(resolve_threshold(threshold, model), multi_label, nms)
    if of_split is None:
        found, for_metrics = find_sources(sources, leave_out=folder) if sources else _samples(source), None
    else:
        found, for_metrics = _of_split(of_split, split, model, chosen, every_score=threshold is None)
    about = [*_about_tiles(source, tile, tiling), *about_results(threshold, chosen, model)]
    log("\n".join([runtime, *about]))
    run = partial(predict_sources, multi_label=multi_label, nms=nms, for_metrics=for_metrics, pictures=pictures)
    with decoder_messages_hidden():
        return run(model, found, folder, chosen.threshold, batch_size, tiling=tiling, track=track)


def _check_before(tasks: Sequence[str], sources: Sequence[str], is_data: bool, track: str | None) -> None:
    """Raise a ``UserError`` for what can be known before the model is loaded."""
    for task in tasks:
        head_class(task)  # report an unknown task, not that it has no run
    if sources and is_data:
        raise UserError(f"source {sources[0]}: give either sources or --data with --split, not both")
    if track is not None:
        check_tracker(track)
        if not sources:
            raise UserError("--track: name a video, a stream or a camera; sample images and data sets are pictures")


def _check_objects(track: str | None, tasks: Sequence[str]) -> None:
    """Raise a ``UserError`` where no task finds objects that could be followed."""
    if track is not None and all(head_class(task).kind == "regions" for task in tasks):
        raise UserError(f"--track: {', '.join(tasks)} finds regions of a class, no objects that could be followed")


def _of_split(
    folder: Folder, split: str | None, model: Evaluated, chosen: Selection, every_score: bool
) -> tuple[Sources, ForMetrics | None]:
    """The images of a split, and what ``predictions.json`` holds of them."""
    sources, categories = images_of_split(folder, split, model.tasks)
    every = Selection(0.0 if every_score else chosen.threshold, multi_label=True, nms=chosen.nms)
    return sources, ForMetrics(every, model.config.categories, categories)


def images_of_split(folder: Folder, split: str | None, tasks: Sequence[str]) -> tuple[Sources, list[Category]]:
    """The images of a split with their numbers in the data set, and its classes.

    Raises:
        UserError: there is no such split, or it cannot be read.
    """
    files = folder.validation(tasks) if split is None else folder.split(split, tasks)
    part = CocoSplit(files, keep_annotations=False)
    sources = Sources(
        Source(
            "image",
            str(part.folder / record.file),
            Path(record.file).as_posix(),
            required=False,
            image_id=record.id,
            size=(record.height, record.width),
        )
        for record in part.records
    )
    return sources, part.own


def newest_run(tasks: Sequence[str] = (), runs: Path = RUNS) -> Path:
    """The newest run among those whose folder names all of these tasks.

    Of the runs of one folder that is the one with the highest number, whatever the clock says: copies and machines with
    another clock change the times of files. Runs of different tasks have no common numbers, so there the time of the
    weights decides.

    Raises:
        UserError: there is no such run.
    """
    weights = [best for best in runs.glob(f"*/*/{BEST}") if set(tasks) <= set(best.parent.parent.name.split("+"))]
    if not weights:
        wanted = " ".join(f"--task {task}" for task in tasks or known_tasks()[:1])
        published = " or the published model dfine-s" if set(tasks) <= {zoo.MODELS["dfine-s"].task} else ""
        raise UserError(
            f"no run to predict with in {runs.resolve()}: train one with 'mvision train {wanted}', or give --weights, "
            f"such as a .safetensors file{published}"
        )
    newest: dict[Path, Path] = {}  # the numbered runs' by their folder; one that has a name is an entry of its own
    for best in weights:
        run = best.parent
        key = run.parent if run.name.isdecimal() else run
        if key not in newest or int(run.name) > int(newest[key].parent.name):
            newest[key] = best
    return max(newest.values(), key=lambda best: best.stat().st_mtime).parent


def sample_images(weights: str, count: int = SAMPLES) -> list[str]:
    """Files of the first validation images of the run that the weights lie in, else of the built-in data set."""
    run = config_of_run(weights)
    files = _folder_of(weights, None).validation([] if run is None else list(run.model.heads))
    part = CocoSplit(files, keep_annotations=False)
    return [str(part.folder / record.file) for record in part.records[:count]]


def _samples(weights: str) -> Sources:
    return Sources(Source("image", file, Path(file).name, required=False) for file in sample_images(weights))


def _folder_of(weights: str, data: str | None) -> Folder:
    """A data set; without ``data`` that of the run which the weights lie in, else the built-in one."""
    run = config_of_run(weights)
    return open_folders(data_of_run(run, data), 0 if run is None else run.train.seed)[0]


def about_results(asked: AskedThreshold | None, selection: Selection, model: Evaluated) -> list[str]:
    """Lines on the thresholds, where the best ones are asked for, and on heads whose results are not among them."""
    return [*_best_thresholds(asked, selection, model), *left_out_of_pictures(model.tasks)]


def _best_thresholds(asked: AskedThreshold | None, selection: Selection, model: Evaluated) -> list[str]:
    """A line that says which thresholds are used, where the best ones are asked for."""
    chosen = selection.threshold
    if not wants_best(asked) or not isinstance(chosen, Mapping):
        return []
    names = [category.name for category in model.config.categories]
    given = [f"{name} {chosen[name]:g}" for name in names if name in chosen]
    without = [name for name in names if name not in chosen]
    more = f", ... ({len(given) - NAMED} more)" if len(given) > NAMED else ""
    others = f"; {chosen[OTHERS]:g} for {len(without)} without one, such as {without[0]}" if without else ""
    return [f"thresholds: {', '.join(given[:NAMED])}{more}{others}"]


def _about_tiles(weights: str, tile: tuple[int, int] | None, tiling: Tiling | None) -> list[str]:
    """A line on the tiles, or that the run of the weights was trained on some."""
    run = config_of_run(weights) if tile is None else None
    if run is not None and run.data.tile is not None:
        height, width = run.data.tile.size
        return [f"! trained on tiles of {width} x {height} pixels: add --tile {height}x{width} to predict on such"]
    return [] if tiling is None else [f"on {tiling.text}"]


def left_out_of_pictures(tasks: Sequence[str]) -> list[str]:
    """A line where several heads find objects: their results cannot be told apart in one picture."""
    own = [task for task in tasks if serving_task(task, tasks) == task]
    objects = [task for task in own if head_class(task).kind == "objects"]
    if len(objects) < 2:
        return []
    others = ", ".join(objects[1:])
    return [f"results are those of {objects[0]}; not those of {others}, which finds objects too (choose with --task)"]

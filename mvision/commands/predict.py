"""``mvision predict``: by default with the newest run, on sample images of its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mvision.config import DataConfig, config_of_run
from mvision.data import CocoSplit
from mvision.data.loading.folders import Folder, open_folders
from mvision.deploy.runtimes import open_fastest
from mvision.errors import UserError
from mvision.heads import head_class, known_tasks, serving_task
from mvision.inference.output import ForMetrics
from mvision.inference.predict_sources import predict_sources
from mvision.inference.selection import DEFAULT_THRESHOLD, Selection, Threshold
from mvision.inference.sources import Source, Sources, find_sources
from mvision.inference.summary import Summary
from mvision.machine import PrecisionOption, keep_freed_memory, resolve_device
from mvision.storage.run_folder import BEST
from mvision.structures import Category
from mvision.structures.messages import decoder_messages_hidden
from mvision.weights import zoo

SAMPLES = 8
RUNS = Path("runs")


def predict_job(
    sources: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    weights: str | None = None,
    family: str | None = None,
    data: str | None = None,
    split: str | None = None,
    threshold: Threshold | None = None,
    multi_label: bool = False,
    nms: float | None = None,
    output: Path | None = None,
    device: str | None = None,
    precision: PrecisionOption = "auto",
    pictures: bool = True,
    batch_size: int | None = None,
    log: Callable[[str], None] = print,
) -> Summary:
    """Predict, and write ``predictions.json`` and pictures.

    Args:
        sources: see ``find_sources``; empty: the first validation images of the run that the weights lie in, else of
            the built-in data set.
        tasks: the tasks to run; empty: all that the weights have.
        weights, family: any source that ``mvision.load`` takes; None: the newest run with these tasks.
        data: a data set in place of ``sources``, see ``images_of_split``; None with ``split``: that of the run.
        split: the name of its split; None: the one that a run evaluates on.
        threshold: the lowest score that is kept, 0..1, or one for each class, see ``predict_images``; None: 0.5. For a
            data set ``predictions.json`` has results of every score unless a threshold is given.
        multi_label, nms: see ``predict_images``.
        output: a folder; None: ``predictions``.
        device, precision: see ``open_fastest``; None: the first GPU, else the CPU.
        pictures, batch_size: see ``predict_sources``.
        log: is called with what names the runtime, and with what is left out of the results.

    Raises:
        UserError: there is no run, or the sources, data, weights, device or folder cannot be used.
    """
    for task in tasks:
        head_class(task)  # report an unknown task, not that it has no run
    if sources and (data is not None or split is not None):
        raise UserError(f"source {sources[0]}: give either sources or --data with --split, not both")
    chosen = Selection(DEFAULT_THRESHOLD if threshold is None else threshold, multi_label, nms)
    folder = output or Path("predictions")
    source = str(newest_run(tasks)) if weights is None else weights
    of_split = _folder_of(source, data) if data is not None or split is not None else None
    keep_freed_memory()
    model, runtime = open_fastest(source, tasks, resolve_device(device), precision, family)
    found = find_sources(sources, leave_out=folder) if sources else None
    log("\n".join([runtime, *_left_out_of_pictures(model.tasks)]))
    for_metrics = None
    if of_split is not None:
        found, categories = images_of_split(of_split, split, model.tasks)
        every = Selection(0.0 if threshold is None else threshold, multi_label=True, nms=nms)
        for_metrics = ForMetrics(every, model.config.categories, categories)
    elif found is None:
        found = _samples(source)
    run = partial(predict_sources, multi_label=multi_label, nms=nms, for_metrics=for_metrics, pictures=pictures)
    with decoder_messages_hidden():
        return run(model, found, folder, chosen.threshold, batch_size)


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
    config = run.data if run is not None and data is None else DataConfig(root=data)
    return open_folders(config, 0 if run is None else run.train.seed)[0]


def _left_out_of_pictures(tasks: Sequence[str]) -> list[str]:
    """A line where several heads find objects: their results cannot be told apart in one picture."""
    own = [task for task in tasks if serving_task(task, tasks) == task]
    objects = [task for task in own if head_class(task).kind == "objects"]
    if len(objects) < 2:
        return []
    others = ", ".join(objects[1:])
    return [f"results are those of {objects[0]}; not those of {others}, which finds objects too (choose with --task)"]

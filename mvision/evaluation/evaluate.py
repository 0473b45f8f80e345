"""Evaluation of a model on data sets, by one process or several, with the same figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from mvision.errors import printable
from mvision.evaluation.metric import Metric
from mvision.evaluation.tiles import TileCollector, Tiles
from mvision.inference.predict import Predictor, eval_mode
from mvision.structures import Category, Targets

if TYPE_CHECKING:
    from accelerate import Accelerator


class Annotated(Protocol):
    """What ``make_metrics`` reads of a split of a data set."""

    @property
    def coco_dict(self) -> dict[str, Any]:
        """The annotations in COCO's format."""


class EvaluationBatch(Protocol):
    """What is read of a batch; ``mvision.data.Batch`` has these attributes."""

    images: Tensor
    targets: list[Targets]
    skipped: list[tuple[str, str]]


class HasClasses(Protocol):
    """What is read of a head."""

    @property
    def classes(self) -> list[Category]:
        """The classes that it predicts."""

    @property
    def kind(self) -> str:
        """What it finds: ``objects``, ``poses`` or ``regions``."""


class Evaluated(Predictor, Protocol):
    """A model that can be evaluated: ``mvision.model.Model``, or an exported one."""

    def head(self, task: str) -> HasClasses:
        """The head that serves a task."""

    def evaluators(self, task: str) -> list[type[Metric]]:
        """The metrics of a task, its main one first."""


Metrics = dict[str, list[Metric]]
"""Task -> its main metric, then those that are reported besides."""


@dataclass
class Validation:
    """A data set that a model is evaluated on, with the metrics of the tasks that it is used for.

    ``tiles``: where the loader has tiles of its pictures, what tells to which a sample belongs.
    """

    name: str
    loader: Iterable[EvaluationBatch]
    metrics: Metrics
    tiles: Tiles | None = None


def make_metrics(model: Evaluated, split: Annotated, tasks: Sequence[str] | None = None) -> Metrics:
    """The metrics of the model's tasks (or of these), prepared for the annotations of a split.

    They are prepared once and can be used for any number of evaluations. A head is evaluated on the classes that it
    predicts only: a keypoint head not on classes without keypoints.
    """
    annotations = split.coco_dict
    return {
        task: [metric(annotations, model.head(task).classes) for metric in model.evaluators(task)]
        for task in (model.tasks if tasks is None else tasks)
    }


def tables(validation: Sequence[Validation]) -> list[str]:
    """The table of every metric, for a terminal; with a heading if there are several."""
    entries = [
        (f"{part.name}, " if len(validation) > 1 else "", task, metric)
        for part in validation
        for task, metrics in part.metrics.items()
        for metric in metrics
    ]
    if len(entries) == 1:
        return [entries[0][2].table()]
    return [f"{name}{task}, {metric.name}\n{metric.table()}" for name, task, metric in entries]


def evaluate_all(
    model: Evaluated,
    validation: Sequence[Validation],
    *,
    accelerator: Accelerator | None = None,
    keep: Callable[[int, str, list[dict[str, Any]]], None] | None = None,
) -> dict[str, dict[str, float]]:
    """``evaluate`` on every data set.

    The first data set that is used for a task gives its figures their plain names; those of the others have the name of
    the data set in front: ``OTHER/AP``.

    Args:
        keep: is called with the results that this process evaluates, as entries of COCO's result format, with the
            position of the data set and the task.
    """
    figures: dict[str, dict[str, float]] = {}
    for number, part in enumerate(validation):
        kept = None if keep is None else partial(keep, number)
        found = evaluate(model, part.loader, part.metrics, accelerator=accelerator, keep=kept, tiles=part.tiles)
        for task, values in found.items():
            if task not in figures:
                figures[task] = values
            else:
                figures[task] |= {f"{part.name}/{name}": value for name, value in values.items()}
    return {task: figures[task] for task in model.tasks}


def evaluate(
    model: Evaluated,
    loader: Iterable[EvaluationBatch],
    metrics: Metrics,
    *,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    keep: Callable[[str, list[dict[str, Any]]], None] | None = None,
    tiles: Tiles | None = None,
) -> dict[str, dict[str, float]]:
    """The figures of a model by task, over every image that the loaders of all processes yield, each counted once.

    Args:
        model: in any mode, which it keeps; not wrapped for distribution. Results of all scores are evaluated.
        loader: batches of uint8 or float images and their targets, of which ``image_id`` and ``size`` are read. With
            several processes each has its own share; repeated images that fill up the last batch do no harm.
        metrics: by task, see ``make_metrics``. They are reset first, and hold the results afterwards (``tables``).
        accelerator: for precision and the other processes; None is this process alone, in the weights' precision.
        progress: show a progress bar on the main process.
        keep: is called with a task and the results of some images, see ``evaluate_all``.
        tiles: see ``Validation``; ``image_id`` of a target is then the number of a sample.

    Returns:
        ``{task: {"AP": ..., ...}}``, the same on every process. The figures of further metrics have the metric's name
        in front: ``bbox/AP``.
    """
    all_metrics = [metric for of_task in metrics.values() for metric in of_task]
    for metric in all_metrics:
        metric.reset()
    regions = [task for task in metrics if tiles is not None and model.head(task).kind == "regions"]
    collector = None if tiles is None else TileCollector(tiles, regions)
    quiet = not progress or (accelerator is not None and not accelerator.is_main_process)
    with eval_mode(model):
        # With disable=None there is a bar in a terminal only.
        for batch in tqdm(loader, desc="evaluating", disable=True if quiet else None, leave=False):
            for file, reason in batch.skipped:
                tqdm.write(printable(f"skipped {file}: {reason}"))
            if batch.targets:
                _evaluate_batch(model, batch, metrics, accelerator, keep, collector)
    if accelerator is not None and accelerator.num_processes > 1:
        for measurements in gather_object([[metric.measured for metric in all_metrics]]):
            for metric, measured in zip(all_metrics, measurements):
                metric.merge(measured)
    figures = {}
    for task, (main, *others) in metrics.items():
        figures[task] = main.compute()
        for metric in others:
            figures[task] |= {f"{metric.name}/{name}": value for name, value in metric.compute().items()}
    return figures


def _evaluate_batch(
    model: Evaluated,
    batch: EvaluationBatch,
    metrics: Metrics,
    accelerator: Accelerator | None,
    keep: Callable[[str, list[dict[str, Any]]], None] | None,
    collector: TileCollector | None,
) -> None:
    """Measure what every head predicts, with its own scores; poses are not linked to other heads' objects."""
    images = batch.images.to(model.device, non_blocking=True)
    with nullcontext() if accelerator is None else accelerator.autocast():
        outputs = model(images)
    sizes = [target.size for target in batch.targets]
    image_ids = [target.image_id for target in batch.targets]
    predicted = model.results(outputs, sizes, threshold=0.0)
    if collector is not None:
        complete = list(collector.complete(image_ids, predicted))
        image_ids = [image_id for image_id, _ in complete]
        predicted = {task: [found[task] for _, found in complete] for task in predicted}
    for task, of_task in metrics.items():
        entries = [entry for i, instances in zip(image_ids, predicted[task]) for entry in instances.to_coco(i)]
        if keep is not None:
            keep(task, entries)
        for metric in of_task:
            metric.update(entries, image_ids)

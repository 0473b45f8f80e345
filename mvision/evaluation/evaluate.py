"""Evaluation of a model on a validation loader, on one process or many, with the same figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from mvision.evaluation.metric import Metric
from mvision.inference.predict import Predictor, eval_mode
from mvision.structures import Category, Targets

if TYPE_CHECKING:
    from accelerate import Accelerator


class Annotated(Protocol):
    """What ``make_metrics`` needs of a split: the annotations in COCO's format."""

    @property
    def coco_dict(self) -> dict[str, Any]: ...


class EvaluationBatch(Protocol):
    """What is read of a batch; ``mvision.data.Batch`` has it all."""

    images: Tensor
    targets: list[Targets]
    skipped: list[tuple[str, str]]


class Finder(Protocol):
    """What is read of a head."""

    @property
    def classes(self) -> list[Category]:
        """The classes that it finds."""
        ...


class Evaluated(Predictor, Protocol):
    """A model that can be evaluated: ``mvision.model.Model``, or one that was exported."""

    def head(self, task: str) -> Finder:
        """The head that serves a task."""
        ...

    def evaluators(self, task: str) -> list[type[Metric]]:
        """The metrics of a task, its main one first."""
        ...


Metrics = dict[str, list[Metric]]
"""By task: the metric of its head, then those that are reported beside it."""


@dataclass
class Validation:
    """A data set that a model is evaluated on, with the metrics of the tasks that it is used for."""

    name: str
    loader: Iterable[EvaluationBatch]
    metrics: Metrics


def make_metrics(model: Evaluated, split: Annotated, tasks: Sequence[str] | None = None) -> Metrics:
    """The metrics of the model's tasks (or of these) on the annotations of a split; made once, used every time.

    A head is asked for the classes that it can find alone: one that finds keypoints, not for the boxes of classes that
    have none.
    """
    annotations = split.coco_dict
    return {
        task: [metric(annotations, model.head(task).classes) for metric in model.evaluators(task)]
        for task in (model.tasks if tasks is None else tasks)
    }


def tables(validation: Sequence[Validation]) -> list[str]:
    """COCO's table of every metric, for a terminal; with a heading where there are several."""
    found = [
        (f"{part.name}, " if len(validation) > 1 else "", task, metric)
        for part in validation
        for task, of_task in part.metrics.items()
        for metric in of_task
    ]
    if len(found) == 1:
        return [found[0][2].table()]
    return [f"{name}{task}, {metric.name}\n{metric.table()}" for name, task, metric in found]


def evaluate_all(
    model: Evaluated, validation: Sequence[Validation], *, accelerator: Accelerator | None = None
) -> dict[str, dict[str, float]]:
    """``evaluate`` on every data set. Figures of a task on a second one have that one's name before theirs."""
    figures: dict[str, dict[str, float]] = {}
    for part in validation:
        for task, found in evaluate(model, part.loader, part.metrics, accelerator=accelerator).items():
            if task not in figures:
                figures[task] = found
            else:
                figures[task] |= {f"{part.name}/{name}": value for name, value in found.items()}
    return {task: figures[task] for task in model.tasks}


def evaluate(
    model: Evaluated,
    loader: Iterable[EvaluationBatch],
    metrics: Metrics,
    *,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """COCO's figures of a model by task, on every image that the loaders of all processes yield, each counted once.

    Args:
        model: in any mode, which it keeps; not wrapped for distribution. Boxes of all scores are evaluated.
        loader: batches of uint8 or float images and their targets, of which ``image_id`` and ``size`` are read. With
            several processes each has its own part; repetitions that fill up the last batch do no harm.
        metrics: by task, see ``make_metrics``. They are reset first and hold the results afterwards (``tables``).
        accelerator: gives device, precision and the other processes; None is this process, at the weights' precision.
        progress: show a bar on the main process.

    Returns:
        ``{task: {"AP": ..., ...}}``, the same on every process. The figures of further metrics have the metric's name
        before theirs: ``bbox/AP``.
    """
    every = [metric for of_task in metrics.values() for metric in of_task]
    for metric in every:
        metric.reset()
    quiet = not progress or (accelerator is not None and not accelerator.is_main_process)
    with eval_mode(model):
        # None switches the bar off where there is no terminal.
        for batch in tqdm(loader, desc="evaluating", disable=True if quiet else None, leave=False):
            for file, reason in batch.skipped:
                tqdm.write(f"skipped {file}: {reason}")
            if batch.targets:
                _evaluate_batch(model, batch, metrics, accelerator)
    if accelerator is not None and accelerator.num_processes > 1:
        for states in gather_object([[metric.state() for metric in every]]):
            for metric, state in zip(every, states):
                metric.merge(state)
    figures = {}
    for task, (main, *others) in metrics.items():
        figures[task] = main.compute()
        for metric in others:
            figures[task] |= {f"{metric.name}/{name}": value for name, value in metric.compute().items()}
    return figures


def _evaluate_batch(
    model: Evaluated, batch: EvaluationBatch, metrics: Metrics, accelerator: Accelerator | None
) -> None:
    """Every head's own results, with its own scores: linking them is for who looks at objects, not at tasks."""
    images = batch.images.to(model.device, non_blocking=True)
    if accelerator is None:
        outputs = model(images)
    else:
        with accelerator.autocast():
            outputs = model(images)
    sizes = [target.size for target in batch.targets]
    image_ids = [target.image_id for target in batch.targets]
    found = model.results(outputs, sizes, threshold=0.0)
    for task, of_task in metrics.items():
        results = [entry for image_id, each in zip(image_ids, found[task]) for entry in each.to_coco(image_id)]
        for metric in of_task:
            metric.update(results, image_ids)

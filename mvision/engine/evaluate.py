"""Evaluation of a model on a validation loader, on one process or many, with the same figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import gather_object
from tqdm import tqdm

from mvision.engine.metrics import CocoMetric
from mvision.inference.predict import eval_mode

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mvision.data import Batch
    from mvision.model import Model


class Annotated(Protocol):
    """What ``make_metrics`` needs of a split: the annotations in COCO's format."""

    @property
    def coco_dict(self) -> dict[str, Any]: ...


Metrics = dict[str, list[CocoMetric]]
"""By task: the metric of its head, then those that are reported beside it."""


def make_metrics(model: Model, split: Annotated) -> Metrics:
    """The metrics of every head of the model on the annotations of a split; made once, used at every evaluation.

    A head is asked for the classes that it can find alone: one that finds keypoints, not for the boxes of classes that
    have none.
    """
    annotations = split.coco_dict
    heads = {task: model.head(task) for task in model.tasks}
    return {
        task: [CocoMetric(annotations, head.classes, kind) for kind in (head.metric, *head.also)]
        for task, head in heads.items()
    }


def tables(metrics: Metrics) -> list[str]:
    """COCO's table of every metric, for a terminal; with a heading where there are several."""
    several = sum(map(len, metrics.values())) > 1
    return [
        f"{task}, {metric.metric}\n{metric.table()}" if several else metric.table()
        for task, of_task in metrics.items()
        for metric in of_task
    ]


def evaluate(
    model: Model,
    loader: Iterable[Batch],
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
                _evaluate_batch(model, batch, every, accelerator)
    if accelerator is not None and accelerator.num_processes > 1:
        for states in gather_object([[metric.state() for metric in every]]):
            for metric, state in zip(every, states):
                metric.merge(state)
    figures = {}
    for task, (main, *others) in metrics.items():
        figures[task] = main.compute()
        for metric in others:
            figures[task] |= {f"{metric.metric}/{name}": value for name, value in metric.compute().items()}
    return figures


def _evaluate_batch(model: Model, batch: Batch, metrics: list[CocoMetric], accelerator: Accelerator | None) -> None:
    images = batch.images.to(model.device, non_blocking=True)
    if accelerator is None:
        outputs = model(images)
    else:
        with accelerator.autocast():
            outputs = model(images)
    found = model.postprocess(outputs, [target.size for target in batch.targets], threshold=0.0)
    image_ids = [target.image_id for target in batch.targets]
    results = [entry for image_id, instances in zip(image_ids, found) for entry in instances.to_coco(image_id)]
    for metric in metrics:
        metric.update(results, image_ids)

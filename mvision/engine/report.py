"""The pictures in a run's folder: the curves, and validation images with ground truth beside predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mvision.data import Dataset
from mvision.drawing import grid, side_by_side
from mvision.heads import head_class
from mvision.model import Model
from mvision.storage.atomic import whole_file
from mvision.structures.images import write_image

NAMED = 3  # files that cannot be read and are named; more are counted


def plot_run(records: list[dict[str, Any]], path: Path) -> None:
    """Losses and AP over the epochs, from the lines of ``metrics.jsonl``, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [record["epoch"] + 1 for record in records]
    for name in records[0]["loss"]:
        losses.plot(epochs, [record["loss"].get(name) for record in records], label=name, linewidth=1.2)
    losses.set(xlabel="epoch", ylabel="loss (weighted terms, mean of the epoch)", yscale="log")
    evaluated = [record for record in records if "metrics" in record]
    for task in evaluated[0]["metrics"] if evaluated else []:
        for figure_name, style in ((head_class(task).primary_metric, "-"), ("AP50", "--")):
            if figure_name in evaluated[0]["metrics"][task]:
                values = [record["metrics"][task][figure_name] for record in evaluated]
                scores.plot([r["epoch"] + 1 for r in evaluated], values, style, label=f"{task} {figure_name}")
    scores.set(xlabel="epoch", ylabel="validation AP or mIoU", ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if entries := len(axes.get_legend_handles_labels()[0]):
            # Joint models have dozens of terms.
            axes.legend(fontsize=8 if entries <= 16 else 4.5, ncols=1 + entries // 17, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_prediction_grid(
    model: Model,
    dataset: Dataset,
    path: Path,
    count: int = 8,
    threshold: float = 0.4,
    log: Callable[[str], None] = print,
) -> None:
    """The first ``count`` images that can be read, each with ground truth (left) and predictions (right), as one JPEG.

    Ground truth is shown for the model's classes only: a keypoint head has none of the classes without keypoints.

    Args:
        model: in any mode, which it keeps.
        dataset: the validation images.
        path: the file; it is not written if no image can be read.
        count: number of images at most.
        threshold: predictions with a lower score (0..1) are left out.
        log: receives a line about images that cannot be read, if there are any.
    """
    samples = dataset.truths(count)
    _log_unreadable(dataset, [gt.path for _, gt in samples], count, path, log)
    if not samples:
        return
    names = {category.name for task in model.tasks for category in model.head(task).classes}
    halves = []
    for (image, gt), pred in zip(samples, model.predict([image for image, _ in samples], threshold=threshold)):
        keep = np.array([gt.names[label] in names for label in gt.labels.tolist()], dtype=bool)
        halves.append(side_by_side(image, gt.filter(keep), pred))
    write_image(path, grid(halves))


def _log_unreadable(
    dataset: Dataset, read: list[str | None], count: int, path: Path, log: Callable[[str], None]
) -> None:
    """Log the images before the last of those that were read (of all, if there are fewer than ``count``)."""
    files = [str(dataset.path(index)) for index in range(len(dataset))]
    if read and len(read) == count:
        files = files[: files.index(str(read[-1])) + 1]
    unreadable = [file for file in files if file not in read]
    if unreadable:
        named = ", ".join(unreadable[:NAMED]) + (", ..." if len(unreadable) > NAMED else "")
        missing = f"{path.name} leaves out" if read else f"no {path.name}:"
        log(f"{missing} {len(unreadable)} of {len(files)} validation images that cannot be read: {named}")

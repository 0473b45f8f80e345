"""The pictures in a run's folder: the curves, and validation images with ground truth beside predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mvision.data import Dataset
from mvision.drawing import grid, side_by_side
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.inference.predict import predict_images
from mvision.model import Model
from mvision.storage.atomic import whole_file
from mvision.structures.images import BadImage, write_image

NAMED = 3  # files that cannot be read and are named; more are counted
# What reading, resizing and drawing raise for pictures that are damaged, far too large or of an impossible shape.
UNSHOWABLE = (BadImage, UserError, cv2.error, ValueError, OverflowError, MemoryError, OSError)


def plot_run(records: list[dict[str, Any]], path: Path) -> None:
    """Losses and AP over the epochs, from the lines of ``metrics.jsonl``, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2, sharex=True)
    epochs = [record["epoch"] + 1 for record in records]
    for name in records[0]["loss"]:
        losses.plot(epochs, [record["loss"].get(name) for record in records], label=name, linewidth=1.2)
    losses.set(xlabel="epoch", ylabel="loss (weighted terms, mean of the epoch)", yscale="log")
    evaluated = [record for record in records if "metrics" in record]
    for task in evaluated[0]["metrics"] if evaluated else []:
        for figure_name, style in ((head_class(task).primary_metric, "-"), ("AP50", "--")):
            if figure_name in evaluated[0]["metrics"][task]:
                values = [record["metrics"][task][figure_name] for record in evaluated]
                label = f"{task} {figure_name}"
                scores.plot([r["epoch"] + 1 for r in evaluated], values, style, marker=".", label=label)
    scores.set(xlabel="epoch", ylabel="validation AP or mIoU", ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    """The first ``count`` images that can be shown, each with ground truth (left) and predictions (right), as one JPEG.

    Ground truth is shown for the model's classes only: a keypoint head has none of the classes without keypoints.

    Args:
        model: in any mode, which it keeps.
        dataset: the validation images.
        path: the file. If no image can be shown, it is not written, and one of an earlier time is removed.
        count: number of images at most.
        threshold: predictions with a lower score (0..1) are left out.
        log: receives a line about images that cannot be read or drawn, if there are any.
    """
    names = {category.name for task in model.tasks for category in model.head(task).classes}
    shown: list[np.ndarray] = []
    failed: list[str] = []
    tried = 0
    while len(shown) < count and tried < len(dataset):
        try:
            shown.append(_compared(model, dataset, tried, names, threshold))
        except UNSHOWABLE as error:
            reason = error.reason if isinstance(error, BadImage) else " ".join(str(error).split())[:80]
            failed.append(f"{dataset.path(tried)} ({reason or type(error).__name__})")
        tried += 1
    if failed:
        named = ", ".join(failed[:NAMED]) + (", ..." if len(failed) > NAMED else "")
        missing = f"{path.name} leaves out" if shown else f"no {path.name}:"
        log(f"{missing} {len(failed)} of {tried} validation images that cannot be read or drawn: {named}")
    if shown:
        write_image(path, grid(shown))
    else:
        path.unlink(missing_ok=True)


def _compared(model: Model, dataset: Dataset, index: int, names: set[str], threshold: float) -> np.ndarray:
    """One image with ground truth of these classes, beside its prediction."""
    image, gt = dataset.truth(index)
    keep = np.array([gt.names[label] in names for label in gt.labels.tolist()], dtype=bool)
    (pred,) = predict_images(model, [image], threshold)
    return side_by_side(image, gt.filter(keep), pred)

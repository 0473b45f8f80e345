"""Pictures that a run leaves: the curves, and validation images with ground truth beside predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mvision.data import Dataset
from mvision.heads import head_class
from mvision.model import Model


def plot_run(records: list[dict[str, Any]], path: Path) -> None:
    """Losses and AP over the epochs, from the lines of ``metrics.jsonl``, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    epochs = [record["epoch"] + 1 for record in records]
    for name in records[0]["loss"]:
        losses.plot(epochs, [record["loss"].get(name) for record in records], label=name, linewidth=1.2)
    losses.set(xlabel="epoch", ylabel="loss (weighted terms, mean of the epoch)", yscale="log")
    evaluated = [record for record in records if "metrics" in record]
    for task in evaluated[0]["metrics"] if evaluated else []:
        for figure_name, style in ((head_class(task).primary_metric, "-"), ("AP50", "--")):
            if figure_name not in evaluated[0]["metrics"][task]:
                continue
            values = [record["metrics"][task][figure_name] for record in evaluated]
            scores.plot([r["epoch"] + 1 for r in evaluated], values, style, label=f"{task} {figure_name}")
    scores.set(xlabel="epoch", ylabel="validation AP or mIoU", ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if entries := len(axes.get_legend_handles_labels()[0]):
            # Joint models have dozens of terms.
            axes.legend(fontsize=8 if entries <= 16 else 4.5, ncols=1 + entries // 17, frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def write_prediction_grid(model: Model, dataset: Dataset, path: Path, count: int = 8, threshold: float = 0.4) -> None:
    """The first ``count`` validation images, each with ground truth (left) and predictions (right), as one JPEG.

    Of the ground truth the classes that the model finds: keypoints are not found on a class that has none.
    """
    import cv2

    from mvision.drawing.draw import grid, side_by_side

    images, truths = zip(*(dataset.truth(index) for index in range(min(count, len(dataset)))))
    names = {category.name for task in model.tasks for category in model.head(task).classes}
    truths = tuple(
        truth.filter(np.array([truth.names[label] in names for label in truth.labels.tolist()], dtype=bool))
        for truth in truths
    )
    found = model.predict(images, threshold=threshold)
    picture = grid([side_by_side(*row) for row in zip(images, truths, found)])
    cv2.imwrite(str(path), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])

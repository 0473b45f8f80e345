"""Pictures of an ``Analysis``: the confusion matrix, the curves of precision, recall and F1, and the calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mvision.drawing.fonts import font_with
from mvision.errors import printable, shortened
from mvision.evaluation.analysis import BINS, GRID, IOU, LOWEST, Analysis
from mvision.storage.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

LEGEND = 20  # classes with a line in the legend; of more, the mean alone
NUMBERS = 30  # classes up to which cells have numbers
LONGEST = 30  # characters of a name
NAMES = 120  # classes up to which rows and columns have names


def write_pictures(analysis: Analysis, folder: Path, suffix: str = "") -> list[Path]:
    """``confusion_matrix.png``, ``curves.png`` and ``calibration.png``, with ``suffix`` behind the names.

    Raises:
        OSError: a file cannot be written.
    """
    draw: dict[str, Callable[[Analysis], Figure]] = {
        "confusion_matrix": draw_confusion,
        "curves": draw_curves,
        "calibration": draw_calibration,
    }
    paths = []
    for name, function in draw.items():
        paths.append(folder / f"{name}{suffix}.png")
        with whole_file(paths[-1]) as temporary:
            function(analysis).savefig(temporary, format="png", dpi=110)
    return paths


def draw_confusion(analysis: Analysis) -> Figure:
    """Colours are shares of a row's objects, numbers are counts."""
    from matplotlib.figure import Figure

    matrix, names = analysis.confusion, [*map(_label, analysis.names), "background"]
    count = len(names)
    side = min(max(4.5, 1.5 + (0.45 if count <= NUMBERS else 0.16) * count), 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the row")
    if count <= NAMES:
        size = 9 if count <= NUMBERS else 5
        font = _font(analysis.names)
        font.set_size(size)
        axes.set_xticks(range(count), names, rotation=90, fontproperties=font)
        axes.set_yticks(range(count), names, fontproperties=font)
    if count <= NUMBERS:
        for row, column in np.argwhere(matrix > 0).tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="result", ylabel="object")
    axes.set_title(f"at the best thresholds, {analysis.similarity}={IOU:.2f}", fontsize=10)
    return figure


def draw_curves(analysis: Analysis) -> Figure:
    """Precision over recall, and F1 over the threshold, of every class; the bold line is the mean over classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_recall, by_threshold = figure.subplots(1, 2)
    known = [(index, curve) for index, curve in enumerate(analysis.curves) if curve is not None]
    named = len(known) <= LEGEND
    for index, curve in known:
        best = analysis.best[index]
        style = {"linewidth": 1.2 if named else 0.5, "alpha": 0.9 if named else 0.5}
        name = _label(analysis.names[index])
        precision = analysis.precision[:, index]
        by_recall.plot(GRID, precision, label=f"{name} ({precision.mean():.3f})" if named else None, **style)
        mark = "" if best is None else f" ({best.f1:.3f} at {best.threshold:g})"
        by_threshold.plot(GRID, curve.at(GRID).f1, label=f"{name}{mark}" if named else None, **style)
    if known:
        mean = analysis.precision[:, [index for index, _ in known]].mean(1)
        by_recall.plot(GRID, mean, color="black", linewidth=2.2, label=f"mean (AP{IOU * 100:.0f} {mean.mean():.3f})")
    if (mean_f1 := analysis.mean_f1) is not None:
        top = int(mean_f1.argmax())
        label = f"mean ({mean_f1[top]:.3f} at {GRID[top]:g})"
        by_threshold.plot(GRID, mean_f1, color="black", linewidth=2.2, label=label)
    by_recall.set(xlabel="recall", ylabel=f"precision at {analysis.similarity}={IOU:.2f}")
    by_threshold.set(xlabel="threshold", ylabel=f"F1 at {analysis.similarity}={IOU:.2f}")
    for axes in (by_recall, by_threshold):
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if known:
            font = _font(analysis.names if named else [])
            font.set_size(7)
            axes.legend(prop=font, frameon=False, loc="lower left" if axes is by_recall else "upper right")
    return figure


def draw_calibration(analysis: Analysis) -> Figure:
    """The reliability diagram: the share of right results in every bin of scores, and how many results there are."""
    from matplotlib.figure import Figure

    found = analysis.calibration
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    shares.plot((0, 1), (0, 1), "--", color="grey", linewidth=1, label="calibrated")
    shares.plot(found.scores, found.precision, "o-", color="tab:blue", linewidth=1.2, markersize=4, label="results")
    shares.set(ylabel=f"share of right results ({analysis.similarity}={IOU:.2f})", ylim=(0, 1.02), xlim=(0, 1))
    error = "no results" if found.error < 0 else f"D-ECE {found.error:.3f}"
    shares.set_title(f"{error}, scores from {LOWEST}", fontsize=10)
    left = np.floor(found.scores * BINS).clip(max=BINS - 1) / BINS
    counts.bar(left, found.counts, width=0.9 / BINS, align="edge", color="tab:blue", alpha=0.6)
    counts.set(xlabel="score", ylabel="results")
    if len(found.counts):
        counts.set_yscale("log")
    for axes in (shares, counts):
        axes.grid(alpha=0.3)
    shares.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def _label(name: str) -> str:
    """A name as matplotlib shows it as it is: no formula between dollars, no underscore that hides a line."""
    shown = shortened(printable(name), LONGEST).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _font(names: Sequence[str]) -> FontProperties:
    """A font that can write the names; matplotlib's own where it can."""
    from matplotlib.font_manager import FontProperties

    return FontProperties() if all(map(str.isascii, names)) else FontProperties(fname=font_with(tuple(names)))

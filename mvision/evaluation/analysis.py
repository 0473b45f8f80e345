"""What AP does not say: which classes are taken for which, at which score to cut, and whether scores can be believed.

All of it is of results as a user gets them (of one place the best class alone) at an overlap of 0.5 (IoU of boxes or of
masks, OKS of poses), matched by COCO's evaluator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvision.evaluation.coco import CocoMetric
from mvision.evaluation.matches import NONE, Matches, Results, match, results_of
from mvision.evaluation.tables import figure_text, text_table
from mvision.inference.selection import DEFAULT_THRESHOLD

IOU = 0.5
BINS = 20  # of scores, equally wide
LOWEST = 0.05
"""Results with lower scores do not count in the calibration. A model gives as many results as it has queries: nearly
all of them have scores near 0 and are of no object, so that with them every model would seem to be calibrated."""
GRID = np.linspace(0, 1, 101)  # thresholds of the curves


@dataclass
class Best:
    """The threshold of a class with the largest F1, and what results with at least this score have there."""

    threshold: float
    f1: float
    precision: float
    recall: float


@dataclass
class Curve:
    """Precision and recall of a class at every score that a result has, the highest first; each (n,)."""

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(n,) the harmonic mean of both, 0 where they are 0."""
        total = self.precision + self.recall
        return np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0)

    def best(self) -> Best | None:
        """None where no result is right."""
        if not len(self.scores) or not self.f1.any():
            return None
        index = int(self.f1.argmax())  # of equal ones that of the highest score
        below = float(self.scores[index + 1]) if index + 1 < len(self.scores) else 0.0
        threshold = between(below, float(self.scores[index]))
        return Best(threshold, float(self.f1[index]), float(self.precision[index]), float(self.recall[index]))

    def at(self, thresholds: np.ndarray) -> Curve:
        """The curve at these thresholds; without a result that reaches one, precision is 1 and recall 0."""
        index = np.searchsorted(-self.scores, -thresholds, side="right")  # how many scores reach it
        return Curve(thresholds, *(np.append(first, values)[index] for first, values in self._from_the_top()))

    def _from_the_top(self) -> tuple[tuple[float, np.ndarray], tuple[float, np.ndarray]]:
        return (1.0, self.precision), (0.0, self.recall)


@dataclass
class Calibration:
    """How often results with a score are right; a bin per row. Bins without results are left out.

    Attributes:
        counts: (n,) int64.
        scores, precision: (n,) the mean score and the share of right results.
    """

    counts: np.ndarray
    scores: np.ndarray
    precision: np.ndarray

    @property
    def error(self) -> float:
        """The detection expected calibration error (D-ECE) over confidence, 0..1; -1 without a result.

        The mean over results of the distance between the mean score of their bin and its precision.

        Source: Kueppers et al., "Multivariate Confidence Calibration for Object Detection", CVPR Workshops 2020,
        equation 4, with confidence alone.
        """
        total = self.counts.sum()
        return float((self.counts * np.abs(self.scores - self.precision)).sum() / total) if total else -1.0


@dataclass
class Analysis:
    """The analysis of one metric.

    Attributes:
        names: of the classes that the data has.
        objects: (classes,) how many count.
        similarity: ``IoU`` or ``OKS``.
        curves, best: by class; None for a class without objects (best: also where no result is right).
        precision: (101, classes) as AP is computed from it, see ``CocoMetric.precision_at``.
        confusion: (classes + 1, classes + 1) int64: rows are objects, columns results at the best thresholds (or 0.5);
            the last row are results of no object, the last column are objects without a result.
        calibration: of the results of all classes.
    """

    names: list[str]
    objects: np.ndarray
    similarity: str
    curves: list[Curve | None]
    best: list[Best | None]
    precision: np.ndarray
    confusion: np.ndarray
    calibration: Calibration

    @property
    def thresholds(self) -> dict[str, float]:
        """The best one of every class that has one."""
        return {name: best.threshold for name, best in zip(self.names, self.best) if best is not None}

    def figures(self) -> dict[str, float]:
        """Numbers by name, for ``metrics.json``.

        ``F1``, ``precision`` and ``recall`` are the means over the classes with objects at the best threshold of each,
        ``threshold`` is the one for all classes with the largest mean F1, in hundredths. ``F1/<class>``,
        ``precision/<class>``, ``recall/<class>`` and ``threshold/<class>`` belong to the best threshold of a class, and
        ``D-ECE`` is the error of the calibration. -1: there is no such object. A class that has objects and no right
        result has no threshold, and 0 for the others.
        """
        figures: dict[str, float] = {}
        for figure, attribute in (("F1", "f1"), ("precision", "precision"), ("recall", "recall")):
            values = [0.0 if best is None else getattr(best, attribute) for best in self.best]
            known = [value for value, count in zip(values, self.objects) if count]
            figures[figure] = float(np.mean(known)) if known else -1.0
            of_classes = zip(self.names, values, self.objects)
            figures |= {f"{figure}/{name}": value if count else -1.0 for name, value, count in of_classes}
        figures["threshold"] = -1.0 if self.mean_f1 is None else float(GRID[self.mean_f1.argmax()])
        of_best = zip(self.names, self.best)
        figures |= {f"threshold/{name}": -1.0 if best is None else best.threshold for name, best in of_best}
        return {**figures, "D-ECE": self.calibration.error}

    @property
    def mean_f1(self) -> np.ndarray | None:
        """(101,) the mean over classes at the thresholds ``GRID``; None where no class has a right result."""
        known = [curve.at(GRID).f1 for curve in self.curves if curve is not None]
        mean = np.mean(known, axis=0) if known else np.zeros(1)
        return mean if mean.any() else None

    def lists(self) -> dict[str, Any]:
        """The numbers of the pictures, for ``curves.json``; those of the calibration are score, share and count."""
        found = self.calibration
        columns = zip(found.scores.tolist(), found.precision.tolist(), found.counts.tolist())
        by_class = {}
        for index, (name, curve) in enumerate(zip(self.names, self.curves)):
            if curve is not None:
                at = curve.at(GRID)
                by_class[name] = {
                    "precision_at_recall": _rounded(self.precision[:, index]),
                    "precision_at_threshold": _rounded(at.precision),
                    "recall_at_threshold": _rounded(at.recall),
                }
        return {
            "confusion_matrix": {"classes": [*self.names, "background"], "objects_by_results": self.confusion.tolist()},
            "calibration": [[round(score, 4), round(right, 4), count] for score, right, count in columns],
            "classes": by_class,
        }

    def table(self) -> str:
        """The best thresholds with what they give, and the calibration, for a terminal."""
        rows = [["class", "objects", "threshold", "F1", "precision", "recall"]]
        for name, best, count in zip(self.names, self.best, self.objects):
            values = ["-"] * 4
            if best is not None:
                values = [f"{best.threshold:g}", *map(figure_text, (best.f1, best.precision, best.recall))]
            rows.append([name, str(count), *values])
        figures = self.figures()
        lines = [
            f"Best thresholds: the largest F1 of every class at {self.similarity}={IOU:.2f}; the mean F1 is "
            f"{figure_text(figures['F1'])}",
            *text_table(rows),
            f"Calibration: D-ECE = {figure_text(figures['D-ECE'])} of {self.calibration.counts.sum()} results with "
            f"scores from {LOWEST}",
        ]
        return "\n".join(lines)


def analyse(metric: CocoMetric) -> Analysis:
    """The analysis of the results that a metric has measured."""
    results = results_of(metric)
    matches = match(metric, results, IOU)
    chosen = [number - 1 for number in sorted(metric.ground_truth.in_data)]
    curves = [curve_of(results, matches, index) if matches.objects[index] else None for index in chosen]
    best = [None if curve is None else curve.best() for curve in curves]
    thresholds = np.full(len(metric.categories), DEFAULT_THRESHOLD)
    for index, found in zip(chosen, best):
        if found is not None:
            thresholds[index] = found.threshold
    kept = results.at(results.scores >= thresholds[results.labels])
    confusion = confusion_matrix(kept, match(metric, kept, IOU, across_classes=True), len(metric.categories))
    return Analysis(
        names=[metric.categories[index].name for index in chosen],
        objects=matches.objects[chosen],
        similarity=metric.similarity,
        curves=curves,
        best=best,
        precision=metric.precision_at(IOU)[:, chosen],
        confusion=confusion[np.ix_([*chosen, -1], [*chosen, -1])],
        calibration=calibrated(results, matches),
    )


def curve_of(results: Results, matches: Matches, index: int) -> Curve:
    """The curve of the class at this index, which has objects."""
    of_class = np.flatnonzero((results.labels == index) & ~matches.ignored)
    of_class = of_class[np.argsort(-results.scores[of_class], kind="stable")]
    scores, right = results.scores[of_class], matches.matched[of_class] != NONE
    # A threshold takes all results of one score or none: their last place counts.
    last = np.flatnonzero(np.diff(scores, append=-1.0))
    found = right.cumsum()[last]
    return Curve(scores[last], found / (last + 1), found / matches.objects[index])


def confusion_matrix(results: Results, matches: Matches, classes: int) -> np.ndarray:
    """See ``Analysis.confusion``, of results that were matched across classes."""
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    counted = ~matches.ignored
    # NONE is -1, which is the last row.
    np.add.at(matrix, (matches.matched[counted], results.labels[counted]), 1)
    matrix[:-1, classes] += np.bincount(matches.missed, minlength=classes)
    return matrix


def calibrated(results: Results, matches: Matches) -> Calibration:
    """The calibration of the results with scores from ``LOWEST`` on."""
    counted = ~matches.ignored & (results.scores >= LOWEST)
    scores, right = results.scores[counted], matches.matched[counted] != NONE
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    used = counts > 0
    means = (np.bincount(bins, values, minlength=BINS)[used] / counts[used] for values in (scores, right))
    return Calibration(counts[used], *means)


def between(low: float, high: float) -> float:
    """A number above ``low`` and up to ``high``, near the middle, with as few decimals as there are."""
    middle = (low + high) / 2
    for decimals in range(2, 17):
        short = round(middle, decimals)
        if low < short <= high:
            return short
    return high


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]

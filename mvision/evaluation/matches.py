"""Which result was matched with which object: what COCO's evaluator decides, read out of it.

The curves, the confusion matrix and the calibration all come from these decisions; nothing is matched a second time.
pycocotools and hotcoco decide alike.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from mvision.evaluation.coco import CocoMetric

NONE = -1  # in place of the class of an object: there is none
NO_LIMIT = 10**6  # of results per image: all that a user sees count


@dataclass
class Results:
    """The N results of all measured images, as a user gets them: of one place the best class alone.

    Attributes:
        image: (N,) int64 numbers of the images.
        rows: (N, 6) float64 of x, y, w, h, score, class number.
        shapes: N masks or lists of points; none for boxes.
    """

    image: np.ndarray
    rows: np.ndarray
    shapes: list[Any]

    @property
    def scores(self) -> np.ndarray:
        """(N,) in 0..1."""
        return self.rows[:, 4]

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 indices of the classes."""
        return self.rows[:, 5].astype(np.int64) - 1

    def at(self, keep: np.ndarray) -> Results:
        """Those that a bool mask or indices (N,) choose."""
        index = np.arange(len(self.image))[keep]
        shapes = [self.shapes[number] for number in index.tolist()] if self.shapes else []
        return Results(self.image[index], self.rows[index], shapes)


@dataclass
class Matches:
    """What became of N results and M objects at one overlap; classes are indices.

    Attributes:
        matched: (N,) int64, the class of the object that a result was matched with, or ``NONE``.
        ignored: (N,) bool: the result counts neither as right nor as wrong, as one in a crowd region.
        missed: (M',) int64, the classes of the objects without a result.
        objects: (classes,) int64, the number of objects that count.
    """

    matched: np.ndarray
    ignored: np.ndarray
    missed: np.ndarray
    objects: np.ndarray


def results_of(metric: CocoMetric) -> Results:
    """The results that a metric has measured, of the classes that the data has.

    Metrics take every class of a query (or grid point), a user gets the best one: of several results in exactly one box
    those of another class than the best one's are left out, as ``Model.postprocess`` does.
    """
    in_data = np.array(sorted(metric.ground_truth.in_data))
    parts = []
    for image_id, (rows, shapes) in metric.measured.items():
        kept = np.flatnonzero(np.isin(rows[:, 5], in_data))
        kept = kept[_of_best_class(rows[kept])]
        number = metric.ground_truth.image_numbers[image_id]
        parts.append((number, rows[kept], [shapes[index] for index in kept.tolist()] if shapes else []))
    parts.sort(key=lambda part: part[0])
    return Results(
        np.repeat([number for number, _, _ in parts], [len(rows) for _, rows, _ in parts]).astype(np.int64),
        np.concatenate([np.zeros((0, 6)), *(rows for _, rows, _ in parts)]),
        [shape for _, _, shapes in parts for shape in shapes],
    )


def _of_best_class(rows: np.ndarray) -> np.ndarray:
    """(n,) bool: the results (n, 6) of an image whose class is that of the best result in the same box."""
    if len(rows) < 2:
        return np.ones(len(rows), dtype=bool)
    order = np.argsort(-rows[:, 4], kind="stable")
    _, first, place = np.unique(rows[order, :4], axis=0, return_index=True, return_inverse=True)
    same = np.empty(len(rows), dtype=bool)
    same[order] = rows[order, 5] == rows[order[first[place.ravel()]], 5]
    return same


def match(metric: CocoMetric, results: Results, iou: float, across_classes: bool = False) -> Matches:
    """Match results with the objects of the measured images, the ones with the highest scores first.

    Args:
        metric: that has measured the images.
        results: of ``results_of``, or some of them.
        iou: the overlap (for keypoints the OKS) from which a result matches.
        across_classes: a result may be matched with an object of any class. Poses of classes with other keypoints, or
            other tolerances of these, cannot be compared and are never matched.
    """
    matches = Matches(
        matched=np.full(len(results.image), NONE),
        ignored=np.zeros(len(results.image), dtype=bool),
        missed=np.zeros(0, dtype=np.int64),
        objects=np.zeros(len(metric.categories), dtype=np.int64),
    )
    images = sorted(metric.ground_truth.image_numbers[image_id] for image_id in metric.measured)
    class_of = metric.ground_truth.classes_of_objects()
    for classes, sigmas in metric.ground_truth.groups if images else []:
        own = np.flatnonzero(np.isin(results.rows[:, 5], classes))
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
            entries = _entries(metric, results.at(own), classes[0] if across_classes else None)
            evaluator = metric.new_evaluator(entries, images, classes, sigmas, as_one=across_classes)
            params = evaluator.params
            params.iouThrs, params.maxDets = np.array([iou]), [NO_LIMIT]
            params.areaRng, params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluator.evaluate()
        _read([entry for entry in evaluator.evalImgs if entry is not None], own, class_of, matches)
    return matches


def _read(entries: list[dict[str, Any]], own: np.ndarray, class_of: np.ndarray, matches: Matches) -> None:
    """Put what the evaluator says into ``matches``.

    Args:
        entries: one for every image and class that has an object or a result.
        own: places of the evaluator's results among all; it numbers them from 1.
        class_of: index of the class by the number of an object.
    """

    def joined(values: Iterable[Iterable[Any]]) -> np.ndarray:
        return np.fromiter(chain.from_iterable(values), dtype=np.int64)

    # The evaluator's matches have a row for every overlap, of which there is one.
    place = own[joined(entry["dtIds"] for entry in entries) - 1]
    found = joined(entry["dtMatches"][0] for entry in entries)
    matches.matched[place] = np.where(found > 0, class_of[found], NONE)
    matches.ignored[place] = joined(entry["dtIgnore"][0] for entry in entries) > 0
    is_object = joined(entry["gtIgnore"] for entry in entries) == 0
    classes = class_of[joined(entry["gtIds"] for entry in entries)][is_object]
    is_missed = joined(entry["gtMatches"][0] for entry in entries)[is_object] == 0
    matches.objects += np.bincount(classes, minlength=len(matches.objects))
    matches.missed = np.append(matches.missed, classes[is_missed])


def _entries(metric: CocoMetric, results: Results, label: int | None) -> np.ndarray | list[dict[str, Any]]:
    """Results in the form that an evaluator takes, see ``CocoMetric``, with ``label`` in place of their classes."""
    if label is not None:
        results = Results(results.image, results.rows.copy(), results.shapes)
        results.rows[:, 5] = label
    if metric.key == "bbox":
        return np.insert(results.rows, 0, results.image, axis=1)
    columns = results.image.tolist(), results.rows[:, 5].astype(np.int64).tolist(), results.scores.tolist()
    return [
        {"image_id": image, "category_id": label, "score": score, metric.key: shape}
        for image, label, score, shape in zip(*columns, results.shapes)
    ]

"""PCK, the share of keypoints that were found: a figure for data that has neither areas nor sigmas of its own.

Source: Yang and Ramanan, "Articulated Human Detection with Flexible Mixtures of Parts", TPAMI 2013: a point is correct
within a fraction of the longer side of the object's box. There the objects' places are given; here they have to be
found as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FRACTION = 0.1
SAME_OBJECT = 0.5  # mean distance of all points, in longer sides of the box, up to which a result means the object
MOST_RESULTS = 20  # per image, as in COCO's figures of keypoints


def correct_points(
    objects: Sequence[dict[str, Any]], scores: np.ndarray, classes: np.ndarray, points: Sequence[Sequence[float]]
) -> tuple[int, int]:
    """Correct and labelled keypoints of one image.

    Args:
        objects: COCO annotations with ``category_id``, ``bbox`` (xywh) and ``keypoints``.
        scores: (R,) of the results, in any order.
        classes: (R,) their category ids.
        points: R flat lists of x, y, score.

    From the best of the ``MOST_RESULTS`` on, each result stands for the nearest object of its class that no better one
    stands for. The points of objects without result are not correct.
    """
    labelled = [np.reshape(entry["keypoints"], (-1, 3)) for entry in objects]
    sides = [max(*entry["bbox"][2:], 1e-9) for entry in objects]
    free = {index for index, truth in enumerate(labelled) if (truth[:, 2] > 0).any()}
    total = sum(int((labelled[index][:, 2] > 0).sum()) for index in free)
    correct = 0
    for result in np.argsort(-scores, kind="stable")[:MOST_RESULTS]:
        found = np.reshape(points[result], (-1, 3))[:, :2]
        distances = {
            index: _distances(found, labelled[index]) / sides[index]
            for index in free
            if objects[index]["category_id"] == classes[result]
        }
        nearest = min(distances, key=lambda index: distances[index].mean(), default=None)
        if nearest is not None and distances[nearest].mean() <= SAME_OBJECT:
            correct += int((distances[nearest] <= FRACTION).sum())
            free.remove(nearest)
    return correct, total


def _distances(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of the labelled points."""
    seen = truth[:, 2] > 0
    return np.hypot(*(found[seen] - truth[seen, :2]).T)

"""PCK, the share of correct keypoints: a figure that needs neither areas nor sigmas from the data.

Source: Yang and Ramanan, "Articulated Human Detection with Flexible Mixtures of Parts", TPAMI 2013: a keypoint is
correct if it is nearer to its labelled place than a fraction of the longer side of the object's box. In the paper it is
given which object a prediction belongs to; here predictions are matched to objects first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FRACTION = 0.1
MATCH_DISTANCE = 0.5  # largest mean distance of a matched prediction's points, as a fraction of the box's longer side


def correct_points(
    objects: Sequence[dict[str, Any]],
    scores: np.ndarray,
    classes: np.ndarray,
    points: Sequence[Sequence[float]],
    max_results: int = 20,
) -> tuple[int, int]:
    """The number of correct and of labelled keypoints in one image.

    The ``max_results`` predictions with the highest scores are matched in the order of their scores, each to the
    nearest object of its class that is not matched yet. The points of objects without a prediction are not correct.

    Args:
        objects: COCO annotations with ``category_id``, ``bbox`` (xywh) and ``keypoints``.
        scores: (R,) of the predictions, in any order.
        classes: (R,) category ids of the predictions.
        points: R flat lists of x, y, score.
        max_results: predictions of an image that count; 20 as for COCO's figures of keypoints.
    """
    gt_points = [np.reshape(entry["keypoints"], (-1, 3)) for entry in objects]
    sides = [max(*entry["bbox"][2:], 1e-9) for entry in objects]
    unmatched = {index for index, gt in enumerate(gt_points) if (gt[:, 2] > 0).any()}
    total = sum(int((gt_points[index][:, 2] > 0).sum()) for index in unmatched)
    correct = 0
    for prediction in np.argsort(-scores, kind="stable")[:max_results]:
        predicted = np.reshape(points[prediction], (-1, 3))[:, :2]
        distances = {
            index: _distances(predicted, gt_points[index]) / sides[index]
            for index in unmatched
            if objects[index]["category_id"] == classes[prediction]
        }
        nearest = min(distances, key=lambda index: distances[index].mean(), default=None)
        if nearest is not None and distances[nearest].mean() <= MATCH_DISTANCE:
            correct += int((distances[nearest] <= FRACTION).sum())
            unmatched.remove(nearest)
    return correct, total


def _distances(predicted: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """Distances in pixels of the labelled points."""
    labelled = gt[:, 2] > 0
    return np.hypot(*(predicted[labelled] - gt[labelled, :2]).T)

"""Object keypoint similarity: how near found keypoints are to the labelled ones, and the tolerance of each point.

Source: cocodataset.org/#keypoints-eval, and the reference implementation, ``COCOeval.computeOks`` of pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvision.structures.category import Category

# COCO's 17 points of a person with their standard deviations, in the order of cocodataset.org/#keypoints-eval.
COCO_SIGMAS: dict[str, float] = {
    "nose": 0.026,
    "left_eye": 0.025,
    "right_eye": 0.025,
    "left_ear": 0.035,
    "right_ear": 0.035,
    "left_shoulder": 0.079,
    "right_shoulder": 0.079,
    "left_elbow": 0.072,
    "right_elbow": 0.072,
    "left_wrist": 0.062,
    "right_wrist": 0.062,
    "left_hip": 0.107,
    "right_hip": 0.107,
    "left_knee": 0.087,
    "right_knee": 0.087,
    "left_ankle": 0.089,
    "right_ankle": 0.089,
}
DEFAULT_SIGMA = round(sum(COCO_SIGMAS.values()) / len(COCO_SIGMAS), 3)

# What pycocotools adds to areas, so that an object without area divides nothing by zero.
_EPS = 2.0**-52


def keypoint_sigmas(category: Category, count: int | None = None) -> tuple[float, ...]:
    """The standard deviation of every keypoint of a class, as a fraction of the object's scale (root of its area).

    Those of the data set (``category.sigmas``), else COCO's where the names are those of COCO's 17 points, else
    ``DEFAULT_SIGMA`` for every one of the ``count`` points (None: as many as the category names).
    """
    if category.sigmas:
        return tuple(category.sigmas)
    if category.keypoints == list(COCO_SIGMAS):
        return tuple(COCO_SIGMAS.values())
    return (DEFAULT_SIGMA,) * (len(category.keypoints) if count is None else count)


def check_sigmas(sigmas: Sequence[float], count: int) -> str | None:
    """What is wrong with these sigmas for ``count`` keypoints, as the end of a sentence; None if nothing is."""
    if len(sigmas) != count:
        return f"{len(sigmas)} sigmas for {count} keypoints"
    # Not "<= 0", which NaN passes.
    bad = [value for value in sigmas if not 0 < value < float("inf")]
    return f"sigma {bad[0]} is not above 0" if bad else None


def similarity(found: Tensor, truth: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """Similarity of every point, 1 where it is exact, falling as a Gaussian of its distance.

    Args:
        found: (..., K, 2) x, y.
        truth: (..., K, 2) x, y in the same unit.
        areas: (...) of the objects, in the square of that unit.
        sigmas: (..., K), see ``keypoint_sigmas``.

    Returns:
        (..., K) in 0..1; all arguments are broadcast.
    """
    variances = (2 * sigmas).square()
    distance = (found - truth).square().sum(-1)
    return torch.exp(-distance / variances / (areas + _EPS)[..., None] / 2)


def oks(found: Tensor, truth: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """The mean similarity over an object's labelled points, 0..1: what COCO's evaluation takes for the IoU.

    Args:
        found: (..., K, 2) x, y.
        truth: (..., K, 3) x, y in the same unit and visibility; 0 means not labelled: the point does not count.
        areas, sigmas: see ``similarity``.

    Returns:
        (...), 0 for objects without labelled points.
    """
    return labelled_mean(similarity(found, truth[..., :2], areas, sigmas), truth[..., 2])


def labelled_mean(values: Tensor, visibility: Tensor) -> Tensor:
    """Mean over the points (..., K) whose visibility is above 0, and 0 where no point's is: similarities to the OKS."""
    labelled = visibility > 0
    return torch.where(labelled, values, 0).sum(-1) / labelled.sum(-1).clamp(min=1)

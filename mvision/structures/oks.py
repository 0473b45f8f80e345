"""Object keypoint similarity (OKS): how close predicted keypoints are to the labelled ones, measured by a tolerance of
each point.

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
# CrowdPose's 14 points of a person in the order of its annotation files: Li et al., "CrowdPose: Efficient Crowded
# Scenes Pose Estimation and A New Benchmark", CVPR 2019; figures as in the evaluation of crowdpose-api and of DETRPose
# (src/data/crowdpose_eval.py). The body's are COCO's.
CROWDPOSE_SIGMAS: dict[str, float] = {
    **{name: sigma for name, sigma in COCO_SIGMAS.items() if not name.endswith(("nose", "eye", "ear"))},
    "head": 0.079,
    "neck": 0.079,
}
PERSONS: dict[int, tuple[dict[str, float], str]] = {
    len(COCO_SIGMAS): (COCO_SIGMAS, "COCO"),
    len(CROWDPOSE_SIGMAS): (CROWDPOSE_SIGMAS, "CrowdPose"),
}
"""Number of points -> their names with their sigmas, and the data set."""
DEFAULT_SIGMA = round(sum(COCO_SIGMAS.values()) / len(COCO_SIGMAS), 3)

# pycocotools adds this to areas, so that an object of zero area does not divide by zero.
_EPS = 2.0**-52


def keypoint_sigmas(category: Category, count: int | None = None) -> tuple[float, ...]:
    """Sigma of every keypoint of a class: its standard deviation as a fraction of the object's scale (root of area).

    In this order: those of the data set (``category.sigmas``); COCO's or CrowdPose's, if the names are those of all of
    COCO's 17 or CrowdPose's 14 points, in any order; ``DEFAULT_SIGMA`` for each of ``count`` points (None: as many as
    the category names).
    """
    if category.sigmas:
        return tuple(category.sigmas)
    if (published := _published_sigmas(category.keypoints)) is not None:
        return published
    return (DEFAULT_SIGMA,) * (len(category.keypoints) if count is None else count)


def describe_default_sigmas(category: Category) -> str | None:
    """A line that says which sigma the keypoints of a class have for lack of better ones; None if theirs are known."""
    if category.sigmas or not category.keypoints or _published_sigmas(category.keypoints) is not None:
        return None
    count = len(category.keypoints)
    points = "its only point" if count == 1 else f"each of its {count} points"
    return (
        f"OKS of '{category.name}' uses sigma {DEFAULT_SIGMA} (the mean of COCO's) for {points}; better ones go into "
        "info.keypoint_sigmas of the annotations or -o model.heads.keypoints.sigmas=[...]"
    )


def _published_sigmas(names: Sequence[str]) -> tuple[float, ...] | None:
    """Those of COCO's or CrowdPose's points by their names, if all of one of them are there and no other."""
    plain = ["_".join(name.lower().replace("-", " ").replace("_", " ").split()) for name in names]
    plain = ["head" if name == "top_head" else name for name in plain]  # so in the files of other libraries
    sigmas, _ = PERSONS.get(len(plain), ({}, ""))
    return tuple(sigmas[name] for name in plain) if names and set(plain) == set(sigmas) else None


def check_sigmas(sigmas: Sequence[float], count: int) -> str | None:
    """The first mistake in the sigmas of ``count`` keypoints, as part of an error message; None if all are valid."""
    if len(sigmas) != count:
        return f"{len(sigmas)} sigmas for {count} keypoints"
    # "value <= 0" would accept NaN.
    invalid = [value for value in sigmas if not 0 < value < float("inf")]
    if not invalid:
        return None
    return f"sigma {invalid[0]} is not above 0" if invalid[0] <= 0 else f"sigma {invalid[0]} is not a finite number"


def point_similarity(pred: Tensor, gt: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """Similarity of every point: 1 at the labelled place, falling as a Gaussian of the distance to it.

    Args:
        pred: (..., K, 2) x, y.
        gt: (..., K, 2) x, y in the same unit.
        areas: (...) of the objects, in the square of that unit.
        sigmas: (..., K), see ``keypoint_sigmas``.

    Returns:
        (..., K) in 0..1; all arguments are broadcast.
    """
    variances = (2 * sigmas).square()
    distance = (pred - gt).square().sum(-1)
    return torch.exp(-distance / variances / (areas + _EPS)[..., None] / 2)


def oks(pred: Tensor, gt: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """The mean similarity over an object's labelled points, 0..1: COCO's evaluation uses it in place of the IoU.

    Args:
        pred: (..., K, 2) x, y.
        gt: (..., K, 3) x, y in the same unit and visibility; 0 means not labelled: the point does not count.
        areas, sigmas: see ``point_similarity``.

    Returns:
        (...), 0 for objects without labelled points.
    """
    return labelled_mean(point_similarity(pred, gt[..., :2], areas, sigmas), gt[..., 2])


def labelled_mean(values: Tensor, visibility: Tensor) -> Tensor:
    """Mean of values (..., K) over the points whose visibility (..., K) is above 0; 0 where there are none.

    Of point similarities it is the OKS.
    """
    labelled = visibility > 0
    return torch.where(labelled, values, 0).sum(-1) / labelled.sum(-1).clamp(min=1)

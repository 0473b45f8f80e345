"""Poses drawn by a seed, on which the losses here are compared with those of the original DETRPose.

``docs/scripts/golden_pose_losses.py`` gave them to the original code and wrote ``tests/golden_pose_losses.json``;
``tests/test_golden_pose_losses.py`` gives them to ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS, CLASSES, LAYERS, QUERIES = 32, 2, 3, 12
SIGMAS = {
    17: (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89),
    14: (79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89, 79, 79),
}
"""By the number of points, in thousandths: COCO's and CrowdPose's."""


@dataclass
class PoseInputs:
    """Float64 predictions for a batch, as a decoder with L layers gives them in training.

    Attributes:
        labels, points, areas: of each image's objects: (N,), (N, K, 3) with visibility 0 or 1, and (N,).
        groups: of denoising queries; 0 where the batch has no object.
        matched, denoising: of the queries that are matched, and of the denoising queries (None without objects).
    """

    labels: list[Tensor]
    points: list[Tensor]
    areas: list[Tensor]
    groups: int
    matched: PredictedPoses
    denoising: PredictedPoses | None


@dataclass
class PredictedPoses:
    """Predictions of N queries.

    Attributes:
        logits: (L + 2, B, N, C) of the layers, then "pre", then the selected tokens; the latter not for the denoising
            queries.
        points: (L + 2, B, N, K, 2), the same.
        corners: (L, B, N, K, 2, BINS + 1).
    """

    logits: Tensor
    points: Tensor
    corners: Tensor


def make_pose_inputs(seed: int, counts: tuple[int, ...], num_points: int) -> PoseInputs:
    """Inputs for images with these numbers of objects; two and two of the objects are close to each other."""
    random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    points = [_objects(random, count, num_points) for count in counts]
    labels = [torch.from_numpy(random.randint(0, CLASSES, count)) for count in counts]
    areas = [torch.from_numpy(random.uniform(0.03, 0.12, count)) for count in counts]
    most = max(counts)
    groups = 2 if most else 0
    # Every query is about an object of its image, those for denoising about the one that they are made from.
    about = [random.randint(0, max(count, 1), QUERIES) for count in counts]
    matched = _predicted(random, points, about)
    about = [np.tile(np.arange(most) % max(count, 1), 2 * groups) for count in counts]
    return PoseInputs(labels, points, areas, groups, matched, _predicted(random, points, about) if groups else None)


def _objects(random: np.random.RandomState, count: int, num_points: int) -> Tensor:
    centres = random.uniform(0.3, 0.7, (count, 1, 2))
    centres[1::2] = centres[0::2][: count // 2] + random.uniform(-0.02, 0.02, (count // 2, 1, 2))
    places = centres + random.uniform(-0.15, 0.15, (count, num_points, 2))
    visible = random.uniform(size=(count, num_points, 1)) < 0.8
    visible[:, :2] = True
    return torch.from_numpy(np.concatenate((places * visible, visible), -1))


def _predicted(random: np.random.RandomState, points: list[Tensor], about: list[np.ndarray]) -> PredictedPoses:
    shape = (LAYERS + 2, len(about), len(about[0]))
    nothing = torch.full_like(points[0][:1] if len(points[0]) else points[0].new_zeros(1, *points[0].shape[1:]), 0.5)
    objects = torch.stack([(of_image if len(of_image) else nothing)[index] for of_image, index in zip(points, about)])
    places = objects[..., :2]
    noise = random.normal(0, 0.02, (LAYERS + 2, *places.shape)) + random.normal(0, 0.02, (*places.shape[:2], 1, 2))
    return PredictedPoses(
        logits=torch.from_numpy(random.normal(-1, 1.5, (*shape, CLASSES))),
        points=places + torch.from_numpy(noise),
        corners=torch.from_numpy(random.normal(0, 1, (LAYERS, *places.shape, BINS + 1))),
    )

"""Labels for query poses, and predictions of them; for several test files."""

from __future__ import annotations

import torch
from torch import Tensor

from mvision.heads.keypoints.settings import with_sigmas
from mvision.heads.keypoints.targets import ClassTables
from mvision.heads.poses.outputs import Decoded
from mvision.heads.poses.targets import PoseTargets, pose_targets
from mvision.structures import Targets
from tests.keypoint_heads import make_categories

LIKE = torch.zeros((), dtype=torch.float64)
QUERIES = 8


def make_labels(count: int, num_points: int = 3, visible: float = 2.0, label: int = 0, seed: int = 0) -> Targets:
    """An image with objects of one class, whose points are spread over boxes of a third of the image."""
    random = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=random) * 0.1 + torch.tensor([0.4, 0.4, 0.3, 0.3])
    places = boxes[:, None, :2] + (torch.rand(count, num_points, 2, generator=random) - 0.5) * 0.3
    points = torch.cat((places, torch.full((count, num_points, 1), visible)), -1)
    return Targets(boxes, torch.full((count,), label), torch.full((count,), 0.06), keypoints=points, size=(64, 96))


def collect(
    targets: list[Targets], *counts: int, sigmas: list[float] | None = None, layers: int = 3, **settings
) -> PoseTargets:
    """The labels for classes with these numbers of points (3 for one class); there are 8 queries."""
    categories = with_sigmas(make_categories(*(counts or (3,))), sigmas or [])
    classes = [row for row, category in enumerate(categories) if category.keypoints]
    settings = {"num_queries": QUERIES, "num_layers": layers + 1, **settings}
    return pose_targets(targets, classes, ClassTables.of(categories), (64, 96), LIKE, **settings)


def predictions(targets: PoseTargets, layers: int = 3, classes: int = 1, seed: int = 0) -> Decoded:
    """Outputs of a decoder, as leaves: queries predict poses anywhere in the image, with D of them for denoising."""
    random = torch.Generator().manual_seed(seed)
    batch, _, num_points = targets.points.shape[:3]
    noisy = 0 if targets.denoising is None else targets.denoising.labels.shape[1]

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64).requires_grad_()

    every = (batch, noisy + QUERIES)
    return Decoded(
        logits=draw(layers, *every, classes),
        points=draw(layers, *every, num_points, 2),
        boxes=draw(layers, *every, 4),
        visibility=draw(layers, *every, num_points),
        corners=draw(layers, *every, num_points, 2, 9),
        initial=draw(*every, num_points, 2).detach(),
        pre_logits=draw(*every, classes),
        pre_points=draw(*every, num_points, 2),
        encoder_logits=draw(batch, QUERIES, classes),
        encoder_points=draw(batch, QUERIES, num_points, 2),
    )

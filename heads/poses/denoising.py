"""Contrastive denoising of poses: queries made from labelled poses with noise, whose loss needs no matching.

Every labelled point is moved by a distance that is drawn as a point similarity, the term of the OKS: that of positives
lies between 0.5 and 1, that of negatives between 0.1 and 0.5. So the noise fits any sigmas and sizes of objects.

Source: Janampa and Pattichis, "DETRPose: Real-time end-to-end transformer model for multi-person pose estimation",
2025, section 3, and Zhang et al., "DINO", ICLR 2023, section 3.3. The direction of the noise is any here; in DETRPose's
code all points move to the right and down.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POSITIVE = (1.0, 0.5)  # point similarities between which positives have their points
NEGATIVE = (0.5, 0.1)


def noisy_poses(
    labels: Tensor,
    points: Tensor,
    boxes: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    scale: Tensor,
    valid: Tensor,
    groups: int,
    num_classes: int,
    label_noise: float,
) -> tuple[Tensor, Tensor]:
    """Groups of one positive and one negative copy of every pose: in each group come the positives, then the negatives.

    Args:
        labels, points, boxes, areas, sigmas, scale: of the batch, see ``PoseTargets``.
        valid: (B, T) bool, False where padded.
        groups: G copies of both kinds.
        num_classes: C, which random classes are drawn from.
        label_noise: half of this share of the copies gets a random class, 0..1.

    Returns:
        (B, D) int64 the classes, C where padded, with D = 2 * G * T; and (B, D, K + 1, 2) x, y in 0..1, first the
        centre of the points. Points without a label start at the centre of the object's box, without noise; padding
        lies in the middle of the image.
    """
    batch, most, num_points, _ = points.shape
    shape = (batch, groups, 2, most)
    classes = torch.where(valid, labels, num_classes)[:, None, None].expand(shape)
    flip = (torch.rand(shape) < label_noise * 0.5) & valid[:, None, None]
    classes = torch.where(flip, torch.randint(0, num_classes, shape), classes)

    # d^2 = 2 * area * (2 sigma)^2 * -ln(similarity), in an image of area 1.
    bounds = torch.tensor([POSITIVE, NEGATIVE], dtype=points.dtype).log().neg()
    nearest, farthest = bounds[:, :, None, None].unbind(1)
    draw = torch.rand(*shape, num_points, dtype=points.dtype)
    negative_log = nearest + draw * (farthest - nearest)
    distance = (2 * negative_log * areas[:, None, None, :, None]).sqrt() * (2 * sigmas[:, None, None])
    angle = 2 * math.pi * torch.rand(*shape, num_points, dtype=points.dtype)
    direction = torch.stack((angle.cos(), angle.sin()), -1) / scale[:, None, None, None, None]
    labelled = (points[..., 2:] > 0)[:, None, None]
    moved = (points[:, None, None, ..., :2] + distance[..., None] * direction).clamp(0, 1)
    moved = torch.where(labelled, moved, boxes[:, None, None, :, None, :2])
    centre = torch.where(labelled, moved, 0).sum(-2, keepdim=True) / labelled.sum(-2, keepdim=True).clamp(min=1)
    poses = torch.where(valid[:, None, None, :, None, None], torch.cat((centre, moved), -2), 0.5)
    return classes.flatten(1), poses.flatten(1, 3)

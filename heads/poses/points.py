"""Points as distributions: x and y are the means of distributions over fixed distances from a first point.

The distances are the bin values of ``mvision.heads.query.distribution``; the unit is 1 / ``bin_scale`` of the image's
width or height, to the right and downwards positive. Each layer of the decoder adds to the logits of the distributions
("corners"), so that all layers refine one distribution instead of moving a point.

Source: Janampa and Pattichis, "DETRPose: Real-time end-to-end transformer model for multi-person pose estimation",
2025, section 3, after the boxes of D-FINE (Peng et al., ICLR 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvision.heads.query.deformable import sample_values
from mvision.heads.query.distribution import TOP, BoxDistribution
from mvision.structures.boxes import xyxy_to_cxcywh

STATISTICS = TOP + 1
"""Numbers that ``features_at`` gives for a point."""
MARGIN = 1.2
"""Width and height of an untrained box in those of the extent of its points."""
SMALLEST = 0.02
"""Smallest width and height of an untrained box, of 0..1: a single point has no extent."""
LARGEST_CHANGE = 4.0
"""Largest logarithm of what a box is wider or higher than its untrained size."""
LOGIT_LIMIT = 1e-3
"""Points nearer to the sides of the image than this fraction count as that far away in ``logit_of_points``."""


class PointDistribution(BoxDistribution):
    """The way from the logits of the distributions to points."""

    def points(self, corners: Tensor, initial: Tensor) -> Tensor:
        """(..., 2) x, y in 0..1 of the image.

        Args:
            corners: (..., 2, num_bins + 1) logits, float32 or better.
            initial: (..., 2) the first points.
        """
        # Not as a matrix product, which autocast, and OpenVINO whatever it is told, would compute in bf16.
        distances = (corners.softmax(-1) * self.values(corners.dtype, corners.device)).sum(-1)
        return initial + distances / self.scale


def logit_of_points(points: Tensor) -> Tensor:
    """Logits of x and y, whose absolute values are at most 6.9; points outside of the image count as on its side."""
    points = points.clamp(0, 1)
    return (points.clamp(min=LOGIT_LIMIT) / (1 - points).clamp(min=LOGIT_LIMIT)).log()


def features_at(points: Tensor, memory: Tensor, shape: tuple[int, int]) -> Tensor:
    """The largest features of a map at every point: what tells how good the points are.

    Args:
        points: (B, N, K, 2) x, y in 0..1; outside of it features are zero.
        memory: (B, h * w, D) the map, row by row.
        shape: h and w.

    Returns:
        (B, N, K * ``STATISTICS``), the ``TOP`` largest features of every point and their mean.
    """
    batch, queries, number, _ = points.shape
    locations = points.reshape(batch, queries * number, 1, 1, 2)
    weights = torch.ones_like(locations[..., 0])
    sampled = sample_values(memory.unsqueeze(2), locations, weights.to(memory.dtype), [shape], [1])
    top = sampled.topk(min(TOP, sampled.shape[-1]), -1).values
    return torch.cat((top, top.mean(-1, keepdim=True)), -1).view(batch, queries, -1)


def boxes_around(points: Tensor, change: Tensor, exists: Tensor | None) -> Tensor:
    """Boxes (..., 4) cxcywh from the extent of the points and what a layer predicts relative to it.

    Args:
        points: (..., K, 2).
        change: (..., 4): movement of the centre in widths and heights, and the logarithms of the factors of both. With
            zeros the box is ``MARGIN`` times as large as the extent.
        exists: (..., K) bool: which points count; None: all.
    """
    low = high = points
    if exists is not None:
        low, high = (torch.where(exists[..., None], points, far) for far in (torch.inf, -torch.inf))
    centre, extent = xyxy_to_cxcywh(torch.cat((low.amin(-2), high.amax(-2)), -1)).split(2, -1)
    move, grow = change.to(points.dtype).split(2, -1)
    size = (MARGIN * extent).clamp(min=SMALLEST)
    return torch.cat((centre + size * move, size * grow.clamp(max=LARGEST_CHANGE).exp()), -1)

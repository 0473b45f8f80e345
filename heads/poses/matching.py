"""Which query has to predict which pose: one-to-one matching by class, by distance and by OKS of the points.

Source: Janampa and Pattichis, "DETRPose", 2025, section 3; only labelled points have a cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mvision.heads.poses.targets import PoseTargets
from mvision.heads.query.matching import (
    CLASS_COST,
    Matches,
    box_distances,
    class_costs,
    no_matches,
    start_assignment,
)
from mvision.structures.oks import point_similarity

LARGEST_BLOCK = 2**24
"""Distances between points that are in memory at once: 133 points of 60 poses in a large batch would take gigabytes."""


class BoxCosts(NamedTuple):
    """Boxes (B, Q, 4) cxcywh in 0..1 of the queries, and the weights of the L1 distance and of the GIoU."""

    boxes: Tensor
    box_weight: float
    giou_weight: float


@torch.no_grad()
def start_pose_matching(
    logits: Tensor,
    points: Tensor,
    targets: PoseTargets,
    point_weight: float,
    oks_weight: float,
    shared: bool,
    box_costs: BoxCosts | None = None,
) -> Callable[[], Matches]:
    """Start the matching of every layer, and return a function that finishes it, see ``start_matching``.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        points: (L, B, Q, K, 2) x, y in 0..1.
        point_weight, oks_weight: of the costs: the L1 distance, summed over the labelled points, and one minus the OKS.
        shared: whether to fill in ``Matches.shared``.
        box_costs: of queries that have the box of an object.
    """
    if not any(targets.counts):
        return no_matches(logits, shared)
    points = points.to(targets.points.dtype)
    distance, oks = _distance_and_oks(points, targets)
    class_cost = class_costs(logits, targets.labels, points.dtype)
    costs = CLASS_COST * class_cost + point_weight * distance - oks_weight * oks
    if box_costs is not None:
        l1, giou = box_distances(box_costs.boxes[None].to(points.dtype), targets.boxes)
        costs = costs + box_costs.box_weight * l1 - box_costs.giou_weight * giou
    return start_assignment(costs, targets.counts, shared)


def _distance_and_oks(points: Tensor, targets: PoseTargets) -> tuple[Tensor, Tensor]:
    """(L, B, Q, T) L1 distance, summed over the labelled points, and OKS of all pairs of a query and a pose."""
    layers, batch, queries, num_points, _ = points.shape
    pairs = layers * batch * queries * targets.labels.shape[1]
    labelled = targets.points[:, None, ..., 2] > 0  # (B, 1, T, K)
    scale = targets.scale[:, None, None, None]
    areas = targets.areas[:, None]
    distance = similarity = points.new_zeros(())
    step = max(1, LARGEST_BLOCK // max(1, pairs))
    for first in range(0, num_points, step):
        these = slice(first, first + step)
        pred, gt = points[:, :, :, None, these], targets.points[:, None, :, these, :2]
        counts = labelled[..., these]
        l1 = (pred - gt).abs().sum(-1)
        near = point_similarity(pred * scale, gt * scale, areas, targets.sigmas[:, None, :, these])
        distance = distance + torch.where(counts, l1, 0).sum(-1)
        similarity = similarity + torch.where(counts, near, 0).sum(-1)
    return distance, similarity / labelled.sum(-1).clamp(min=1)

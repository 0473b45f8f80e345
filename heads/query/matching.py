"""Who learns which object: one-to-one matching for the decoder, one-to-many assignment for dense predictions.

Both return the index of an object for every prediction, -1 for none: the form that the losses take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy, iou


@dataclass
class PaddedTargets:
    """The ground truth of a batch as rectangles, T being the largest number of objects in one of its images.

    Attributes:
        boxes: (B, T, 4) cxcywh in 0..1; zeros where padded.
        labels: (B, T) int64; 0 where padded.
        valid: (B, T) bool.
        counts: objects per image.
        total: mean number of objects per process, at least 1: what losses are divided by.
        labelled_classes: (B, C) or (B, 1) bool, see ``Targets.labelled_classes``; None: all classes in all images.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: list[int]
    total: float
    labelled_classes: Tensor | None = None


def pad_targets(targets: list[Targets], device: torch.device, dtype: torch.dtype = torch.float32) -> PaddedTargets:
    """Stack the boxes and labels of a batch."""
    counts = [len(target) for target in targets]
    most = max(counts, default=0)
    boxes = torch.zeros(len(targets), most, 4, dtype=dtype)
    labels = torch.zeros(len(targets), most, dtype=torch.int64)
    valid = torch.zeros(len(targets), most, dtype=torch.bool)
    for index, (target, count) in enumerate(zip(targets, counts)):
        boxes[index, :count] = target.boxes.to(boxes)
        labels[index, :count] = target.labels.to("cpu")
        valid[index, :count] = True
    total = mean_over_processes(torch.tensor(float(sum(counts)), device=device)).item()
    return PaddedTargets(
        boxes.to(device),
        labels.to(device),
        valid.to(device),
        counts,
        max(total, 1.0),
        labelled_classes(targets, device),
    )


def labelled_classes(targets: list[Targets], device: torch.device) -> Tensor | None:
    """(B, C) or (B, 1) bool, see ``Targets.labelled_classes``; None where all classes are labelled in every image."""
    if all(target.labelled_classes is None for target in targets):
        return None
    one = torch.ones(1, dtype=torch.bool)
    rows = [one if target.labelled_classes is None else target.labelled_classes.cpu() for target in targets]
    width = max(map(len, rows))
    return torch.stack([row.expand(width) for row in rows]).to(device)


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes; divided by it, averaged gradients are those of the whole batch."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the terms in the matching cost (DETR's, with focal loss' class term)."""

    cls: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


@torch.no_grad()
def hungarian(
    logits: Tensor, boxes: Tensor, targets: PaddedTargets, costs: MatchingCosts, more: Tensor | None = None
) -> Tensor:
    """One-to-one matching of every layer and image with the smallest total cost.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        boxes: (L, B, Q, 4) cxcywh in 0..1.
        more: (L, B, Q, T) further costs, already weighted.

    Returns:
        (L, B, Q) int64, the object of each query, -1 for none. Costs that are not finite are matched last.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """
    layers, batch, queries, _ = logits.shape
    assigned = np.full((layers, batch, queries), -1, dtype=np.int64)
    if any(targets.counts):
        cost = _matching_cost(logits, boxes, targets, costs, more).cpu().numpy()
        for image, count in enumerate(targets.counts):
            for layer in range(layers if count else 0):
                query, target = linear_sum_assignment(cost[layer, image, :, :count])
                assigned[layer, image, query] = target
    return torch.from_numpy(assigned).to(logits.device)


def _matching_cost(
    logits: Tensor, boxes: Tensor, targets: PaddedTargets, costs: MatchingCosts, more: Tensor | None
) -> Tensor:
    """(L, B, Q, T)."""
    layers, _, queries, _ = logits.shape
    prob = logits.to(boxes.dtype).sigmoid()
    negative = (1 - costs.alpha) * prob**costs.gamma * -(1 - prob + 1e-8).log()
    positive = costs.alpha * (1 - prob) ** costs.gamma * -(prob + 1e-8).log()
    index = targets.labels[None, :, None].expand(layers, -1, queries, -1)
    class_cost = (positive - negative).gather(-1, index)
    l1 = torch.cdist(boxes, targets.boxes[None].expand(layers, -1, -1, -1), p=1)
    _, giou = iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(targets.boxes)[None, :, None])
    cost = costs.cls * class_cost + costs.l1 * l1 - costs.giou * giou
    if more is not None:
        cost = cost + more
    # scipy refuses NaN; a huge value keeps such pairs for last.
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=1e6)


@torch.no_grad()
def anchor_assignment(anchors: Tensor, targets: PaddedTargets, top_k: int = 9) -> Tensor:
    """One-to-many assignment for dense predictions: for each object the cells whose anchors overlap it most.

    It depends on the geometry alone, so training starts with the assignment that it ends with. (By the quality of
    predictions, as in TOOD, it has to wait until there is some: from random weights that learned more slowly here.)

    Args:
        anchors: (S, 4) cxcywh in 0..1, one per cell; their sizes tell the levels apart.
        top_k: cells per object.

    Returns:
        (B, S) int64, -1 for none. Only cells whose centre lies in the object are taken, and at least the nearest one; a
        cell wanted by several objects goes to the smallest.

    Source: the level and centre priors of Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free
    Detection" (ATSS), CVPR 2020, with a fixed number of cells in place of the statistical threshold.
    """
    batch, most = targets.labels.shape
    cells = len(anchors)
    if most == 0:
        return torch.full((batch, cells), -1, dtype=torch.int64, device=anchors.device)
    truth = cxcywh_to_xyxy(targets.boxes)
    centres = anchors[:, :2]
    inside = ((centres > truth[:, :, None, :2]) & (centres < truth[:, :, None, 2:])).all(-1)
    distance = (centres - targets.boxes[:, :, None, :2]).square().sum(-1)
    inside = inside.scatter(2, distance.argmin(-1, keepdim=True), True) & targets.valid[..., None]
    overlap, _ = iou(truth[:, :, None], cxcywh_to_xyxy(anchors))
    # Ties (cells that all lie inside a large object) go to the cells nearer to its centre.
    rank = torch.where(inside, 1 + overlap - 1e-3 * distance, torch.zeros_like(overlap))
    best, index = rank.topk(min(top_k, cells), dim=-1)
    chosen = torch.zeros_like(inside).scatter(2, index, best > 0)
    area = targets.boxes[..., 2] * targets.boxes[..., 3]
    wanted = torch.where(chosen, area[..., None], torch.inf)
    smallest, owner = wanted.min(1)
    return torch.where(smallest.isfinite(), owner, -1)

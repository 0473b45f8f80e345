"""Who learns which object: one-to-one matching for the decoder, one-to-many assignment for dense predictions.

Both return the index of an object for every prediction, -1 for none: the form that the losses take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mvision.boxes import cxcywh_to_xyxy, iou
from mvision.structures import Targets


@dataclass
class PaddedTargets:
    """The ground truth of a batch as rectangles, T being the largest number of objects in one of its images.

    Attributes:
        boxes: (B, T, 4) cxcywh in 0..1; zeros where padded.
        labels: (B, T) int64; 0 where padded.
        valid: (B, T) bool.
        counts: objects per image.
        total: mean number of objects per process, at least 1: what losses are divided by.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: list[int]
    total: float


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
    return PaddedTargets(boxes.to(device), labels.to(device), valid.to(device), counts, max(total, 1.0))


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes: what each divides by, so that averaged gradients are the whole batch's."""
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
def hungarian(logits: Tensor, boxes: Tensor, targets: PaddedTargets, costs: MatchingCosts) -> Tensor:
    """One-to-one matching of every layer and image with the smallest total cost.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        boxes: (L, B, Q, 4) cxcywh in 0..1.

    Returns:
        (L, B, Q) int64, the object of each query, -1 for none. Costs that are not finite are matched last.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """
    layers, batch, queries, _ = logits.shape
    assigned = np.full((layers, batch, queries), -1, dtype=np.int64)
    if any(targets.counts):
        cost = _matching_cost(logits, boxes, targets, costs).cpu().numpy()
        for image, count in enumerate(targets.counts):
            for layer in range(layers if count else 0):
                query, target = linear_sum_assignment(cost[layer, image, :, :count])
                assigned[layer, image, query] = target
    return torch.from_numpy(assigned).to(logits.device)


def _matching_cost(logits: Tensor, boxes: Tensor, targets: PaddedTargets, costs: MatchingCosts) -> Tensor:
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
    # scipy refuses NaN; a huge value keeps such pairs for last.
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=1e6)


@torch.no_grad()
def task_aligned(
    logits: Tensor,
    boxes: Tensor,
    centres: Tensor,
    targets: PaddedTargets,
    top_k: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """One-to-many assignment for dense predictions: for each object the cells inside it that predict it best.

    Args:
        logits: (B, S, C); boxes: (B, S, 4) cxcywh in 0..1; centres: (S, 2) of the cells in 0..1.
        top_k: cells per object.

    Returns:
        assigned (B, S) int64, -1 for none, and the class target (B, S) in 0..1: the alignment of score and overlap,
        scaled so that the best cell of an object has its best overlap.

    Source: Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021, equations 3 and 4.
    """
    batch, cells, _ = logits.shape
    most = targets.labels.shape[1]
    if most == 0:
        return logits.new_full((batch, cells), -1, dtype=torch.int64), boxes.new_zeros(batch, cells)
    truth = cxcywh_to_xyxy(targets.boxes)
    low, high = truth[:, :, None, :2], truth[:, :, None, 2:]
    inside = ((centres > low) & (centres < high)).all(-1) & targets.valid[..., None]
    # An object smaller than a cell may hold no centre: the nearest cell then stands for it.
    distance = (centres - targets.boxes[:, :, None, :2]).square().sum(-1)
    nearest = distance.argmin(-1, keepdim=True)
    inside = inside.scatter(2, nearest, targets.valid[..., None])
    overlap, _ = iou(truth[:, :, None], cxcywh_to_xyxy(boxes)[:, None])
    overlap = overlap * inside
    index = targets.labels[:, :, None].expand(-1, -1, cells)
    score = logits.to(boxes.dtype).sigmoid().transpose(1, 2).gather(1, index)
    alignment = (score**alpha * overlap**beta + 1e-9) * inside
    top, rank = alignment.topk(min(top_k, cells), dim=-1)
    chosen = torch.zeros_like(alignment).scatter_(2, rank, (top > 0).to(alignment.dtype)) > 0
    # A cell wanted by several objects goes to the one that it overlaps most.
    wanted = torch.where(chosen, overlap + 1e-9, torch.zeros_like(overlap))
    best, owner = wanted.max(1)
    assigned = torch.where(best > 0, owner, -1)
    mine = chosen & (assigned[:, None] == torch.arange(most, device=logits.device)[None, :, None])
    alignment, overlap = alignment * mine, overlap * mine
    scale = overlap.amax(-1, keepdim=True) / alignment.amax(-1, keepdim=True).clamp(min=1e-9)
    return assigned, (alignment * scale).amax(1)

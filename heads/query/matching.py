"""Assignment of objects to predictions: one-to-one matching for the decoder, one-to-many for predictions of all tokens.

Both return the index of an object for every prediction, -1 for none, which is the form that the losses take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy, iou

# The class term of the matching cost is a focal loss, as in Deformable DETR and RT-DETR.
CLASS_COST, FOCAL_ALPHA, FOCAL_GAMMA = 2.0, 0.25, 2.0


@dataclass
class PaddedTargets:
    """The ground truth of a batch in tensors, padded to the largest number T of objects in one of its images.

    Attributes:
        boxes: (B, T, 4) cxcywh in 0..1; zeros where padded.
        labels: (B, T) int64; 0 where padded.
        valid: (B, T) bool.
        counts: number of objects in each image.
        total: the batch's number of objects, averaged over processes, at least 1; losses are divided by it.
        labelled_classes: see ``labelled_classes``.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: list[int]
    total: float
    labelled_classes: Tensor | None = None


def pad_targets(targets: list[Targets], device: torch.device, dtype: torch.dtype = torch.float32) -> PaddedTargets:
    """Stack the boxes and labels of a batch on ``device``; ``dtype`` is that of the boxes."""
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
    """``Targets.labelled_classes`` of a batch, (B, C) or (B, 1) bool; None if every image has all classes labelled."""
    if all(target.labelled_classes is None for target in targets):
        return None
    one = torch.ones(1, dtype=torch.bool)
    rows = [one if target.labelled_classes is None else target.labelled_classes.cpu() for target in targets]
    width = max(map(len, rows))
    return torch.stack([row.expand(width) for row in rows]).to(device)


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes.

    Processes average their gradients; if each divides its loss by this mean of their numbers of objects, the average is
    the gradient of one loss over the whole batch.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


@torch.no_grad()
def hungarian(
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    box_weight: float = 5.0,
    giou_weight: float = 2.0,
    more_costs: Tensor | None = None,
) -> Tensor:
    """One-to-one matching with the smallest total cost, for every layer and image.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        boxes: (L, B, Q, 4) cxcywh in 0..1.
        box_weight, giou_weight: of the L1 and GIoU terms of the cost.
        more_costs: (L, B, Q, T), added to those of class and box; already weighted.

    Returns:
        (L, B, Q) int64, the object of each query, -1 for none. Pairs whose cost is not finite are matched only if
        nothing else is left.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """
    layers, batch, queries, _ = logits.shape
    assignment = np.full((layers, batch, queries), -1, dtype=np.int64)
    if any(targets.counts):
        costs = _pair_costs(logits, boxes, targets, box_weight, giou_weight)
        if more_costs is not None:
            costs = costs + more_costs
        # scipy refuses NaN; a huge cost has such pairs matched last.
        finite = torch.nan_to_num(costs, nan=1e6, posinf=1e6, neginf=1e6).cpu().numpy()
        for image, count in enumerate(targets.counts):
            for layer in range(layers if count else 0):
                query, gt_index = linear_sum_assignment(finite[layer, image, :, :count])
                assignment[layer, image, query] = gt_index
    return torch.from_numpy(assignment).to(logits.device)


def _pair_costs(logits: Tensor, boxes: Tensor, targets: PaddedTargets, box_weight: float, giou_weight: float) -> Tensor:
    """(L, B, Q, T) costs of class and box of all pairs of a query and an object of its image."""
    layers, _, queries, _ = logits.shape
    prob = logits.to(boxes.dtype).sigmoid()
    negative = (1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * -(1 - prob + 1e-8).log()
    positive = FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * -(prob + 1e-8).log()
    index = targets.labels[None, :, None].expand(layers, -1, queries, -1)
    class_cost = (positive - negative).gather(-1, index)
    l1 = torch.cdist(boxes, targets.boxes[None].expand(layers, -1, -1, -1), p=1)
    _, giou = iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(targets.boxes)[None, :, None])
    return CLASS_COST * class_cost + box_weight * l1 - giou_weight * giou


@torch.no_grad()
def anchor_assignment(anchors: Tensor, targets: PaddedTargets, top_k: int = 9) -> Tensor:
    """One-to-many assignment for dense predictions: for each object the tokens whose anchors overlap it most.

    It depends on the anchors alone, so it is the same from the first step to the last. (An assignment by the quality of
    predictions, as in TOOD, changes while that quality grows; from random weights it trained more slowly here.)

    Args:
        anchors: (S, 4) cxcywh in 0..1, one per token, larger on coarser levels.
        top_k: largest number of tokens per object.

    Returns:
        (B, S) int64, -1 for none. An object gets the token nearest to its centre, and otherwise only tokens whose
        centre lies inside its box. A token chosen for several objects is assigned to the one with the smallest box.

    Source: the level and centre priors of Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free
    Detection" (ATSS), CVPR 2020, with a fixed number of tokens in place of the statistical threshold.
    """
    batch, most = targets.labels.shape
    tokens = len(anchors)
    if most == 0:
        return torch.full((batch, tokens), -1, dtype=torch.int64, device=anchors.device)
    gt_boxes = cxcywh_to_xyxy(targets.boxes)
    centres = anchors[:, :2]
    inside = ((centres > gt_boxes[:, :, None, :2]) & (centres < gt_boxes[:, :, None, 2:])).all(-1)
    distance = (centres - targets.boxes[:, :, None, :2]).square().sum(-1)
    inside = inside.scatter(2, distance.argmin(-1, keepdim=True), True) & targets.valid[..., None]
    anchor_iou, _ = iou(gt_boxes[:, :, None], cxcywh_to_xyxy(anchors))
    # Of tokens with one IoU (all anchors inside a large object have the same) those nearer to its centre come first.
    score = torch.where(inside, 1 + anchor_iou - 1e-3 * distance, torch.zeros_like(anchor_iou))
    best, index = score.topk(min(top_k, tokens), dim=-1)
    chosen = torch.zeros_like(inside).scatter(2, index, best > 0)
    area = targets.boxes[..., 2] * targets.boxes[..., 3]
    smallest, gt_index = torch.where(chosen, area[..., None], torch.inf).min(1)
    return torch.where(smallest.isfinite(), gt_index, -1)

"""Loss terms of set prediction, computed for all decoder layers at once.

An assignment is a tensor of object indices, -1 for none (see matching.py).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.query.matching import PaddedTargets
from mvision.structures.boxes import cxcywh_to_xyxy, iou


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    assignment: Tensor,
    targets: PaddedTargets,
    kind: Literal["vfl", "mal"] = "vfl",
    alpha: float = 0.75,
    gamma: float = 2.0,
    total: float | None = None,
) -> dict[str, Tensor]:
    """Class, L1 and GIoU terms of every layer.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        boxes: (L, B, Q, 4) cxcywh in 0..1.
        assignment: (L, B, Q) int64, index of the object in its image, -1 for none.
        kind, alpha, gamma: of the class term, see ``quality_focal``.
        total: number that the sums over the batch are divided by; None: ``targets.total``.

    Returns:
        ``class``, ``box`` (L1) and ``giou``, each (L,). A class that is not labelled in an image
        (``targets.labelled_classes``) has a loss only at queries that an object of it is assigned to.
    """
    total = targets.total if total is None else total
    positive = assignment >= 0
    layer, image, query = positive.nonzero(as_tuple=True)
    gt_index = assignment[positive]
    pred_boxes, gt_boxes = boxes[positive], targets.boxes[image, gt_index]
    box_iou, giou = iou(cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(gt_boxes))
    l1 = (pred_boxes - gt_boxes).abs().sum(-1)

    where = (layer, image, query, targets.labels[image, gt_index])
    class_loss = quality_focal(logits, where, box_iou.detach(), kind, alpha, gamma, targets.labelled_classes)
    class_loss = class_loss.sum((1, 2, 3))

    def per_layer(values: Tensor) -> Tensor:
        return values.new_zeros(len(logits)).index_add(0, layer, values) / total

    return {"class": class_loss / total, "box": per_layer(l1), "giou": per_layer(1 - giou)}


def quality_focal(
    logits: Tensor,
    index: tuple[Tensor, ...],
    quality: Tensor,
    kind: Literal["vfl", "mal"],
    alpha: float,
    gamma: float,
    labelled_classes: Tensor | None = None,
) -> Tensor:
    """Element-wise classification loss whose target is the quality of a positive's prediction (IoU or OKS).

    Args:
        logits: (..., B, N, C) before the sigmoid.
        index: the P positives among them, as indices into every dimension, each (P,).
        quality: (P,) in 0..1, of their predictions.
        kind: ``vfl`` is the varifocal loss (Zhang et al., "VarifocalNet", CVPR 2021, equation 2); ``mal`` the
            matchability-aware loss (Huang et al., "DEIM", CVPR 2025, equation 3, gamma 1.5 in the paper).
        alpha: weight of negatives in ``vfl``.
        gamma: exponent of the probability in the weight of negatives; in ``mal`` also of the quality.
        labelled_classes: (B, C) or (B, 1) bool, see ``Targets.labelled_classes``: in an image, negatives of the other
            classes have no loss; None: all are labelled.
    """
    target = torch.zeros_like(logits, dtype=quality.dtype)
    target[index] = quality
    is_positive = torch.zeros_like(logits, dtype=torch.bool)
    is_positive[index] = True
    logits = logits.to(quality.dtype)
    prob = logits.detach().sigmoid()
    if kind == "vfl":
        weight = torch.where(is_positive, target, alpha * prob**gamma)
    else:
        weight = torch.where(is_positive, torch.ones_like(prob), prob**gamma)
        target = target**gamma
    loss = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")
    return loss if labelled_classes is None else torch.where(labelled_classes[:, None] | is_positive, loss, 0)

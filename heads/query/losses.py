"""Loss terms of set prediction, computed for all decoder layers at once, at the pairs that matching.py finds."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.query.matching import PaddedTargets, Pairs
from mvision.structures.boxes import cxcywh_to_xyxy, iou


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    pairs: Pairs,
    targets: PaddedTargets,
    kind: Literal["vfl", "mal"] = "vfl",
    alpha: float = 0.75,
    gamma: float = 2.0,
    total: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Class, L1 and GIoU terms of every layer.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        boxes: (L, B, Q, 4) cxcywh in 0..1.
        pairs: of queries and objects; all other queries have to predict none.
        kind, alpha, gamma: of the class term, see ``quality_focal``.
        total: number that the sums over the batch are divided by; None: ``targets.total``.

    Returns:
        ``class``, ``box`` (L1) and ``giou``, each (L,). A class that is not labelled in an image
        (``targets.labelled_classes``) has a loss only at queries that an object of it is assigned to.
    """
    total = targets.total if total is None else total
    layers, batch, queries, _ = logits.shape
    # One index into flattened tensors: the gradient is then one addition in place, not a sort of the indices.
    row = torch.add(pairs.query, torch.add(pairs.image, pairs.layer, alpha=batch), alpha=queries)
    gt_row = torch.add(pairs.object, pairs.image, alpha=targets.labels.shape[1])
    pred_boxes = boxes.flatten(0, 2).index_select(0, row)
    gt_boxes = targets.boxes.flatten(0, 1).index_select(0, gt_row)
    box_iou, giou = iou(cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(gt_boxes))
    values = torch.stack(((pred_boxes - gt_boxes).abs().sum(-1), 1 - giou), 1)
    if pairs.counted is not None:
        values = torch.where(pairs.counted[:, None], values, 0)
    l1_term, giou_term = (values.new_zeros(layers, 2).index_add(0, pairs.layer, values) / total).unbind(1)

    index = (pairs.layer, pairs.image, pairs.query, targets.labels.flatten().index_select(0, gt_row))
    quality = box_iou.detach()
    class_loss = quality_focal(logits, index, quality, kind, alpha, gamma, targets.labelled_classes, pairs.counted)
    return {"class": class_loss.sum((1, 2, 3)) / total, "box": l1_term, "giou": giou_term}


def quality_focal(
    logits: Tensor,
    index: tuple[Tensor, ...],
    quality: Tensor,
    kind: Literal["vfl", "mal"],
    alpha: float,
    gamma: float,
    labelled_classes: Tensor | None = None,
    counted: Tensor | None = None,
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
        counted: (P,) bool, which of the P are positives; the others may have the index of one that is. None: all.
    """
    target, is_positive = _class_targets(logits, index, quality, counted)
    logits = logits.to(quality.dtype)
    prob = logits.detach().sigmoid()
    if kind == "vfl":
        weight = torch.where(is_positive, target, alpha * prob**gamma)
    else:
        weight = torch.where(is_positive, torch.ones_like(prob), prob**gamma)
        target = target**gamma
    loss = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")
    return loss if labelled_classes is None else torch.where(labelled_classes[:, None] | is_positive, loss, 0)


def _class_targets(
    logits: Tensor, index: tuple[Tensor, ...], quality: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The quality wanted at every logit, 0 for negatives, and which logits are positives."""
    shape, size = logits.shape, logits.numel()
    flat = index[0]
    for length, further in zip(shape[1:], index[1:]):
        flat = torch.add(further, flat, alpha=length)
    if counted is not None:
        # What does not count is written behind the end: at its own place it could overwrite a positive.
        flat = torch.where(counted, flat, size)
    target = quality.new_zeros(size + 1)
    target[flat] = quality
    # Not by an assignment of True, for which the CPU waits: it would copy that value to a GPU.
    is_positive = torch.zeros(size + 1, dtype=torch.bool, device=logits.device).index_fill_(0, flat.flatten(), True)
    return target[:size].view(shape), is_positive[:size].view(shape)

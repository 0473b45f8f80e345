"""Loss terms of set prediction, computed for all decoder layers at once.

Every function takes the assignment as (..., Q) indices of objects, -1 for none (see matching.py), and returns one value
per leading layer, already divided by the number of objects.
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
    assigned: Tensor,
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
        assigned: (L, B, Q) int64, index of the object in its image, -1 for none.
        kind: ``vfl`` is the varifocal loss (Zhang et al., "VarifocalNet", CVPR 2021, equation 2); ``mal`` the
            matchability-aware loss (Huang et al., "DEIM", CVPR 2025, equation 3, gamma 1.5 in the paper).
        total: what sums are divided by; None is the number of objects, ``targets.total``.

    Classes that were not looked for in an image (``targets.labelled_classes``) are not taught there as absent.

    Returns:
        ``class``, ``box`` and ``giou``, each (L,), summed over the batch and divided.
    """
    total = targets.total if total is None else total
    positive = assigned >= 0
    layer, image, _ = positive.nonzero(as_tuple=True)
    target = assigned[positive]
    found, truth = boxes[positive], targets.boxes[image, target]
    overlap, giou = iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(truth))
    l1 = (found - truth).abs().sum(-1)

    quality = torch.zeros_like(logits, dtype=boxes.dtype)
    hot = torch.zeros_like(logits, dtype=torch.bool)
    where = (*positive.nonzero(as_tuple=True), targets.labels[image, target])
    quality[where] = overlap.detach()
    hot[where] = True
    class_loss = quality_focal(logits, quality, hot, kind, alpha, gamma)
    if targets.labelled_classes is not None:
        class_loss = torch.where(targets.labelled_classes[:, None] | hot, class_loss, 0)
    class_loss = class_loss.sum((1, 2, 3))

    def per_layer(values: Tensor) -> Tensor:
        return values.new_zeros(len(logits)).index_add(0, layer, values) / total

    return {"class": class_loss / total, "box": per_layer(l1), "giou": per_layer(1 - giou)}


def quality_focal(
    logits: Tensor, quality: Tensor, hot: Tensor, kind: Literal["vfl", "mal"], alpha: float, gamma: float
) -> Tensor:
    """Element-wise classification loss whose target is the quality (IoU) of a positive's box.

    Args:
        logits: any shape, before the sigmoid; quality: the same shape, 0..1; hot: True where the class is present.
    """
    logits = logits.to(quality.dtype)
    prob = logits.detach().sigmoid()
    if kind == "vfl":
        weight = torch.where(hot, quality, alpha * prob**gamma)
        return F.binary_cross_entropy_with_logits(logits, quality, weight=weight, reduction="none")
    weight = torch.where(hot, torch.ones_like(prob), prob**gamma)
    return F.binary_cross_entropy_with_logits(logits, quality**gamma, weight=weight, reduction="none")

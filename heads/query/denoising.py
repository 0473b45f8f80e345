"""Contrastive denoising: decoder queries made from ground truth with noise, which give a loss that needs no matching.

Source: Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes", ICLR 2023, section 3.3; with RT-DETR's noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mvision.heads.query.matching import PaddedTargets
from mvision.structures.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


@dataclass
class Denoising:
    """Objects with noise as decoder queries; ``PaddedTargets.denoising`` says which of them have to predict what.

    Attributes:
        labels: (B, D) int64, class with noise; ``num_classes`` for padding.
        boxes: (B, D, 4) cxcywh in 0..1, with noise.
        mask: (D + Q, D + Q) bool, True where the query of a row may attend to that of a column.
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor


def make_denoising(
    targets: PaddedTargets, num_classes: int, num_queries: int, label_noise: float, box_noise: float
) -> Denoising | None:
    """Groups of one positive and one negative copy of every object; None if ``targets`` are to have no groups.

    Args:
        targets: the ground truth.
        num_classes: the random classes are drawn from.
        num_queries: number of selected queries, which follow in the decoder and must not attend to these.
        label_noise: half of this share of the queries gets a random class, 0..1.
        box_noise: positives have each corner coordinate moved by up to this fraction of half the box's width or height,
            negatives by one to two times as much.
    """
    batch, most = targets.labels.shape
    groups, device = targets.groups, targets.boxes.device
    if not groups:
        return None
    # (B, groups, 2, T): in every group the positives come first, then the negatives.
    shape = (batch, groups, 2, most)
    valid = targets.valid[:, None, None]
    labels = torch.where(targets.valid, targets.labels, num_classes)[:, None, None]
    boxes = targets.boxes[:, None, None]

    flip = (torch.rand(shape, device=device) < label_noise * 0.5) & valid
    labels = torch.where(flip, torch.randint(0, num_classes, shape, device=device), labels)

    amount = torch.rand(*shape, 4, device=device, dtype=boxes.dtype)
    amount[:, :, 1] += 1.0
    sign = torch.randint(0, 2, amount.shape, device=device, dtype=boxes.dtype) * 2 - 1
    reach = boxes[..., 2:].repeat(1, 1, 1, 1, 2) * (0.5 * box_noise)
    corners = (cxcywh_to_xyxy(boxes) + amount * sign * reach).clamp(0, 1)
    # Strong noise can move a corner beyond the opposite one, so the corners are sorted again.
    low, high = corners[..., :2], corners[..., 2:]
    boxes = xyxy_to_cxcywh(torch.cat((torch.minimum(low, high), torch.maximum(low, high)), -1))
    return Denoising(
        labels=labels.flatten(1),
        boxes=boxes.flatten(1, 3),
        mask=attention_mask(groups, 2 * most, num_queries, device),
    )


def attention_mask(groups: int, size: int, num_queries: int, device: torch.device) -> Tensor:
    """Denoising queries attend to their own group and to the selected queries, selected queries to each other alone."""
    # The number of a query's group; the selected queries have one together, which comes last.
    group = (torch.arange(groups * size + num_queries, device=device) // size).clamp(max=groups)
    return (group[:, None] == group) | (group == groups)

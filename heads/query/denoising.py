"""Contrastive denoising: queries made from disturbed ground truth, so that the decoder learns before matching settles.

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
    """Disturbed objects as decoder queries.

    Attributes:
        labels: (B, D) int64, disturbed class; ``num_classes`` stands for padding.
        boxes: (B, D, 4) cxcywh in 0..1, disturbed.
        assigned: (B, D) int64, the object that a query has to restore, -1 for "no object" (negatives and padding).
        mask: (D + Q, D + Q) bool, True where a query may attend.
        groups: how many copies of the ground truth there are.
    """

    labels: Tensor
    boxes: Tensor
    assigned: Tensor
    mask: Tensor
    groups: int


def make_denoising(
    targets: PaddedTargets,
    num_classes: int,
    num_queries: int,
    num_denoising: int,
    label_noise: float,
    box_noise: float,
) -> Denoising | None:
    """Groups of one positive and one negative copy of every object; None where the batch has no object.

    Args:
        targets: the padded ground truth.
        num_queries: the ordinary queries that follow in the decoder: they must not see these.
        num_denoising: wished number of positives per image; there is at least one group.
        label_noise: half of this share of the queries gets a random class.
        box_noise: corners move by up to this many half sides (positives), by one to two times that (negatives).
    """
    batch, most = targets.labels.shape
    if num_denoising <= 0 or most == 0:
        return None
    groups = max(1, num_denoising // most)
    device = targets.boxes.device
    # (B, groups, 2, T): in every group first the positives, then the negatives.
    shape = (batch, groups, 2, most)
    valid = targets.valid[:, None, None].expand(shape)
    labels = torch.where(targets.valid, targets.labels, num_classes)[:, None, None].expand(shape)
    boxes = targets.boxes[:, None, None].expand(*shape, 4)

    flip = (torch.rand(shape, device=device) < label_noise * 0.5) & valid
    labels = torch.where(flip, torch.randint(0, num_classes, shape, device=device), labels)

    amount = torch.rand(*shape, 4, device=device, dtype=boxes.dtype)
    amount[:, :, 1] += 1.0
    sign = torch.randint(0, 2, amount.shape, device=device, dtype=boxes.dtype) * 2 - 1
    reach = boxes[..., 2:].repeat(1, 1, 1, 1, 2) * (0.5 * box_noise)
    corners = (cxcywh_to_xyxy(boxes) + amount * sign * reach).clamp(0, 1)
    # Strong noise can push a corner past the opposite one: such a box is turned round, not left inside out.
    low, high = corners[..., :2], corners[..., 2:]
    boxes = xyxy_to_cxcywh(torch.cat((torch.minimum(low, high), torch.maximum(low, high)), -1))

    index = torch.arange(most, device=device).expand(shape)
    assigned = torch.where(valid, index, -1).clone()
    assigned[:, :, 1] = -1
    return Denoising(
        labels=labels.flatten(1),
        boxes=boxes.flatten(1, 3),
        assigned=assigned.flatten(1),
        mask=_attention_mask(groups, 2 * most, num_queries, device),
        groups=groups,
    )


def _attention_mask(groups: int, size: int, num_queries: int, device: torch.device) -> Tensor:
    """Groups see themselves and the ordinary queries; ordinary queries see each other alone."""
    group = torch.arange(groups, device=device).repeat_interleave(size)
    group = torch.cat((group, group.new_full((num_queries,), -1)))
    return (group[:, None] == group[None]) | (group[None] == -1)

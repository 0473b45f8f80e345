"""Mask losses and matching costs on sampled points, so that memory grows with neither resolution nor mask size.

Sources: Kirillov et al., "PointRend", CVPR 2020, sections 3.1 and 3.3 (points where the prediction is undecided), as
Cheng et al., "Mask2Former", CVPR 2022, section 3.3 applies them to queries; Dice as in V-Net (Milletari et al., 2016),
per instance. One thing is different: the candidates are drawn per image and shared by its instances, half of them in
the image and half in the objects' boxes. A mask that is the product of an embedding and pixel features needs the
features at the candidates only once then, and small objects get their share of points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.neck.layers import without_autocast
from mvision.structures import Targets

OVERSAMPLE = 3
IMPORTANCE = 0.75
BOX_MARGIN = 1.3  # sides of the region that an object's points are drawn from, in sides of its box


@dataclass
class MaskPoints:
    """Where the masks of a batch are compared.

    Attributes:
        points: (B, P, 2) x, y in 0..1, in no order.
        labels: (B, T, P) in 0..1, the mask of every object there; T as in ``PaddedTargets``.
        valid: (B, T) bool: the object is there and has a mask.
    """

    points: Tensor
    labels: Tensor
    valid: Tensor


@torch.no_grad()
def sample_mask_points(targets: list[Targets], count: int, device: torch.device) -> MaskPoints:
    """Draw ``count`` points in every image and read the objects' masks there."""
    most = max((len(target) for target in targets), default=0)
    points = torch.stack([_draw_points(target.boxes.to(device), count) for target in targets])
    labels = points.new_zeros(len(targets), most, count)
    valid = torch.zeros(len(targets), most, dtype=torch.bool, device=device)
    for index, target in enumerate(targets):
        if target.masks is not None and len(target):
            masks = target.masks.to(device)
            labels[index, : len(masks)] = read_masks(masks, points[index])
            # A mask without a pixel stands for one that is not known (see ``Targets.masks``).
            valid[index, : len(masks)] = masks.flatten(1).any(1)
    return MaskPoints(points, labels, valid)


def _draw_points(boxes: Tensor, count: int) -> Tensor:
    """(count, 2): half of them anywhere, half in the slightly enlarged box of an object drawn for each."""
    points = torch.rand(count, 2, device=boxes.device)
    if len(boxes):
        near = torch.rand(count, device=boxes.device) < 0.5
        box = boxes[torch.randint(len(boxes), (count,), device=boxes.device)].to(points.dtype)
        inside = (box[:, :2] + (points - 0.5) * box[:, 2:] * BOX_MARGIN).clamp(0, 1)
        points = torch.where(near[:, None], inside, points)
    return points


def read_masks(masks: Tensor, points: Tensor) -> Tensor:
    """(N, P) float32: masks (N, h, w) of 0 and 1 at points (P, 2) in 0..1, bilinear between the cells' centres."""
    height, width = masks.shape[-2:]
    size = points.new_tensor([width, height])
    at = (points * size - 0.5).clamp(min=0).minimum(size - 1)
    low = at.floor()
    share = at - low
    x0, y0 = low.long().unbind(-1)
    x1, y1 = (x0 + 1).clamp(max=width - 1), (y0 + 1).clamp(max=height - 1)
    flat = masks.flatten(1)
    right, down = share.unbind(-1)
    values = torch.zeros(len(masks), len(points), device=masks.device)
    for y, part_y in ((y0, 1 - down), (y1, down)):
        for x, part_x in ((x0, 1 - right), (x1, right)):
            values += flat[:, y * width + x] * (part_y * part_x)
    return values


def read_features(features: Tensor, points: Tensor) -> Tensor:
    """(B, d, P) float32: maps (B, d, h, w) at points (B, P, 2) in 0..1, bilinear as masks are enlarged."""
    grid = (2 * points - 1).unsqueeze(1)
    with without_autocast(features):  # bf16 is too coarse for it, and wrong on some CPUs
        found = F.grid_sample(features.float().contiguous(), grid, padding_mode="border", align_corners=False)
    return found.squeeze(2)


@torch.no_grad()
def mask_costs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice of every query's mask with every object's, for matching.

    Args:
        logits: (..., Q, P) before the sigmoid; labels: (..., T, P) in 0..1, at the same points.

    Returns:
        Two tensors (..., Q, T).
    """
    labels = labels.transpose(-1, -2)
    # softplus(x) - x * label is the binary cross-entropy.
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ labels) / logits.shape[-1]
    prob = logits.sigmoid()
    total = prob.sum(-1, keepdim=True) + labels.sum(-2, keepdim=True)
    return cross_entropy, 1 - (2 * (prob @ labels) + 1) / (total + 1)


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (mean over the points) and Dice of pairs of masks.

    Args:
        logits: (M, P) before the sigmoid; labels: (M, P) in 0..1, at the same points.

    Returns:
        Two tensors (M,).
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    prob = logits.sigmoid()
    dice = 1 - (2 * (prob * labels).sum(-1) + 1) / (prob.sum(-1) + labels.sum(-1) + 1)
    return cross_entropy, dice


@torch.no_grad()
def undecided_points(logits: Tensor, count: int) -> Tensor:
    """(M, count) int64, of the points of (M, P) logits: three quarters where they are nearest to 0, others anywhere."""
    sure = int(IMPORTANCE * count)
    undecided = logits.abs().topk(sure, dim=1, largest=False, sorted=False).indices
    # The candidates are in no order, so the first of them are as random as any.
    anywhere = torch.arange(count - sure, device=logits.device).expand(len(logits), -1)
    return torch.cat((undecided, anywhere), 1)

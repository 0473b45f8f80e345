"""Mask losses and matching costs on sampled points, so that memory does not depend on the resolution of the masks.

Sources: Kirillov et al., "PointRend", CVPR 2020, sections 3.1 and 3.3 (more points where the prediction is uncertain),
as Cheng et al., "Mask2Former", CVPR 2022, section 3.3 applies it to queries; Dice as in V-Net (Milletari et al., 2016),
per instance. One deviation: candidate points are drawn per image and shared by its instances, half of them anywhere and
half in the objects' boxes. So the pixel features are read only once per candidate, and small objects get enough points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.neck.layers import without_autocast
from mvision.structures import Targets

OVERSAMPLE = 3  # candidates per point of the loss (PointRend's k)
UNCERTAIN = 0.75  # share of a mask's points that are the most uncertain candidates (PointRend's beta)
BOX_MARGIN = 1.3  # the points of an object are drawn from its box enlarged by this factor


@dataclass
class MaskPoints:
    """Points at which the masks of a batch are compared, T and padding as in ``PaddedTargets``.

    Attributes:
        points: (B, P, 2) x, y in 0..1, in random order.
        labels: (B, T, P) in 0..1, the masks of the objects at the points.
        valid: (B, T) bool, False for padding and for objects without a mask.
    """

    points: Tensor
    labels: Tensor
    valid: Tensor


@torch.no_grad()
def sample_mask_points(targets: list[Targets], count: int, device: torch.device) -> MaskPoints:
    """Draw ``count`` points in every image and read the objects' masks at them."""
    most = max((len(target) for target in targets), default=0)
    points = torch.stack([_draw_points(target.boxes.to(device), count) for target in targets])
    labels = points.new_zeros(len(targets), most, count)
    valid = torch.zeros(len(targets), most, dtype=torch.bool, device=device)
    for index, target in enumerate(targets):
        if target.masks is not None and len(target):
            masks = target.masks.to(device)
            labels[index, : len(masks)] = read_masks(masks, points[index])
            # Where only some objects of an image are labelled with a mask, the others have one without any pixel.
            valid[index, : len(masks)] = masks.flatten(1).any(1)
    return MaskPoints(points, labels, valid)


def _draw_points(boxes: Tensor, count: int) -> Tensor:
    """(count, 2) x, y in 0..1: each with a chance of a half anywhere, else in the enlarged box of a random object."""
    points = torch.rand(count, 2, device=boxes.device)
    if len(boxes):
        in_box = torch.rand(count, device=boxes.device) < 0.5
        box = boxes[torch.randint(len(boxes), (count,), device=boxes.device)].to(points.dtype)
        inside = (box[:, :2] + (points - 0.5) * box[:, 2:] * BOX_MARGIN).clamp(0, 1)
        points = torch.where(in_box[:, None], inside, points)
    return points


def read_masks(masks: Tensor, points: Tensor) -> Tensor:
    """(N, P) float32: masks (N, h, w) of 0 and 1 at points (P, 2) in 0..1, interpolated bilinearly between pixels."""
    height, width = masks.shape[-2:]
    size = points.new_tensor([width, height])
    place = (points * size - 0.5).clamp(min=0).minimum(size - 1)
    low = place.floor()
    x0, y0 = low.long().unbind(-1)
    x1, y1 = (x0 + 1).clamp(max=width - 1), (y0 + 1).clamp(max=height - 1)
    flat = masks.flatten(1)
    weight_x1, weight_y1 = (place - low).unbind(-1)
    values = torch.zeros(len(masks), len(points), device=masks.device)
    for y, weight_y in ((y0, 1 - weight_y1), (y1, weight_y1)):
        for x, weight_x in ((x0, 1 - weight_x1), (x1, weight_x1)):
            values += flat[:, y * width + x] * (weight_y * weight_x)
    return values


def read_features(features: Tensor, points: Tensor) -> Tensor:
    """(B, d, P) float32: maps (B, d, h, w) at points (B, P, 2) in 0..1, bilinear, as post-processing enlarges masks."""
    grid = (2 * points - 1).unsqueeze(1)
    with without_autocast(features):  # grid_sample is too imprecise in bf16, and wrong there on some CPUs
        values = F.grid_sample(features.float().contiguous(), grid, padding_mode="border", align_corners=False)
    return values.squeeze(2)


@torch.no_grad()
def mask_costs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice of every query's mask with every object's, for matching.

    Args:
        logits: (..., Q, P) before the sigmoid.
        labels: (..., T, P) in 0..1, at the same points.

    Returns:
        Cross-entropy (mean over the points) and Dice, each (..., Q, T).
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
        logits: (M, P) before the sigmoid.
        labels: (M, P) in 0..1, at the same points.

    Returns:
        Cross-entropy and Dice, each (M,).
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    prob = logits.sigmoid()
    dice = 1 - (2 * (prob * labels).sum(-1) + 1) / (prob.sum(-1) + labels.sum(-1) + 1)
    return cross_entropy, dice


@torch.no_grad()
def uncertain_points(logits: Tensor, count: int) -> Tensor:
    """(M, count) int64 indices into the candidates of (M, P) logits: mostly those nearest to 0, the others random."""
    number = int(UNCERTAIN * count)
    uncertain = logits.abs().topk(number, dim=1, largest=False, sorted=False).indices
    # Candidates are in random order, so the first of them are a random choice.
    anywhere = torch.arange(count - number, device=logits.device).expand(len(logits), -1)
    return torch.cat((uncertain, anywhere), 1)

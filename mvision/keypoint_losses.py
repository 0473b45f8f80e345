"""Loss terms of a dense keypoint head, on (M, n): M objects of a batch with n candidate cells each.

Sources: Lu et al., "RTMO", CVPR 2024 (scores whose target is the OKS, OKS loss, visibility), and Maji et al.,
"YOLO-Pose", CVPR Workshops 2022 (one minus OKS as the loss of the points).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.boxes import cxcywh_to_xyxy, iou
from mvision.keypoint_cells import FoundPoints
from mvision.keypoint_matching import KeypointTruth
from mvision.losses import quality_focal
from mvision.oks import labelled_mean, similarity

# Side of the smallest object that distances are measured by, as a fraction of the image: a speck would weigh most.
SMALLEST = 0.01
# What a score is taught at least, by a box that fits. COCO's figures begin at an OKS of 0.5, so the order among those
# below does not matter to them; with nothing but the OKS, which is near 0 in the beginning, objects would be taught to
# score like the background.
LEAST_TARGET = 0.4


@dataclass
class Compared:
    """Predictions beside the truth: ``near`` (M, n) OKS, ``each`` (M, n, K) similarity, boxes' IoU and GIoU (M, n)."""

    near: Tensor
    each: Tensor
    overlap: Tensor
    giou: Tensor


def compare(found: FoundPoints, truth: KeypointTruth, sigmas: Tensor) -> Compared:
    """OKS and overlaps; ``sigmas`` (M, K)."""
    scale = truth.scale[:, None, None]
    overlap, giou = iou(cxcywh_to_xyxy(found.boxes), cxcywh_to_xyxy(truth.boxes)[:, None])
    places, visibility = truth.points[:, None, :, :2], truth.points[:, None, :, 2]
    each = similarity(found.points * scale, places * scale, truth.areas[:, None], sigmas[:, None])
    return Compared(labelled_mean(each, visibility), each, overlap, giou)


def box_terms(found: FoundPoints, compared: Compared, truth: KeypointTruth, chosen: Tensor) -> dict[str, Tensor]:
    """Sums of L1 and one minus GIoU over the ``chosen`` (M, n) cells."""
    l1 = (found.boxes - truth.boxes[:, None]).abs().sum(-1)
    return {"box": _sum(l1, chosen), "giou": _sum(1 - compared.giou, chosen)}


def point_terms(
    found: FoundPoints, compared: Compared, truth: KeypointTruth, chosen: Tensor, exists: Tensor | None
) -> dict[str, Tensor]:
    """Sums over the ``chosen`` (M, n) cells of the losses of points, each a mean over an object's labelled points.

    ``oks`` is one minus the OKS. ``point`` is the L1 distance by the object's scale: it still pulls where the OKS of a
    point far away has no gradient left. ``visible`` is the cross-entropy of "labelled" over the points that the class
    has, ``exists`` (M, K); None leaves it out.
    """
    visibility = truth.points[:, None, :, 2]
    size = truth.areas.clamp(min=SMALLEST**2).sqrt()[:, None, None]
    distance = ((found.points - truth.points[:, None, :, :2]) * truth.scale[:, None, None]).abs().sum(-1) / size
    terms = {
        "oks": _sum(1 - compared.near, chosen),
        "point": _sum(labelled_mean(distance, visibility), chosen),
    }
    if exists is not None:
        target = (visibility > 0).to(found.visibility).expand_as(found.visibility)
        entropy = F.binary_cross_entropy_with_logits(found.visibility, target, reduction="none")
        terms["visible"] = _sum(labelled_mean(entropy, exists[:, None].to(entropy)), chosen)
    return terms


@torch.no_grad()
def score_target(near: Tensor, overlap: Tensor) -> Tensor:
    """What scores are taught: the OKS (or a point's similarity), or less than any that counts by the box's IoU."""
    return torch.maximum(near, LEAST_TARGET * overlap)


def score_term(
    logits: Tensor,
    where: tuple[Tensor, ...],
    quality: Tensor,
    ignored: Tensor,
    kind: Literal["vfl", "mal"],
    alpha: float,
    gamma: float,
) -> Tensor:
    """Sum of the score's loss over all cells.

    Args:
        logits: (B, S, C) before the sigmoid.
        where: image, cell and class of the P positives, each (P,).
        quality: (P,) in 0..1, their targets.
        ignored: (B, S) bool: cells that are neither positive nor negative, unless they are in ``where``.
    """
    target = torch.zeros_like(logits, dtype=quality.dtype)
    target[where] = quality
    hot = torch.zeros_like(logits, dtype=torch.bool)
    hot[where] = True
    loss = quality_focal(logits, target, hot, kind, alpha, gamma)
    return torch.where(ignored[..., None] & ~hot.any(-1, keepdim=True), 0, loss).sum()


@torch.no_grad()
def ignored_cells(inside: Tensor, truth: KeypointTruth) -> Tensor:
    """(B, S) bool: cells in objects without labelled points, and all of images without any labels of points.

    COCO's evaluation ignores such objects, and whoever finds them: an annotator who gave a box alone has seen somebody
    there. Taught as background, a person in the distance would speak against the person in front; taught as a positive,
    it has no OKS to be taught.

    Args:
        inside: (M, S) bool, see ``Candidates``.
    """
    vague = (inside & ~truth.labelled[:, None]).to(torch.float32)
    counts = vague.new_zeros(len(truth.unlabelled), inside.shape[1]).index_add(0, truth.image, vague)
    return (counts > 0) | truth.unlabelled[:, None]


def _sum(values: Tensor, chosen: Tensor) -> Tensor:
    # where, not a product: zero times a value that is not finite would be none.
    return torch.where(chosen, values, 0).sum()

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

from mvision.heads.keypoints.assignment import Candidates, KeypointTruth
from mvision.heads.keypoints.grid import FoundPoints
from mvision.heads.keypoints.heatmaps import LARGEST_SIGMA, PointMaps, in_window, map_loss, pad_rows
from mvision.heads.query.losses import quality_focal
from mvision.heads.query.matching import mean_over_processes
from mvision.structures.boxes import cxcywh_to_xyxy, iou
from mvision.structures.oks import labelled_mean, similarity

# Side of the smallest object that distances are measured by, as a fraction of the image: a speck would weigh most.
SMALLEST = 0.01
# What a score is taught at least, by a box that fits. COCO's figures begin at an OKS of 0.5, so the order among those
# below does not matter to them; with nothing but the OKS, which is near 0 in the beginning, objects would be taught to
# score like the background.
LEAST_TARGET = 0.4


MAP_CELLS = 4  # of an object's best cells make maps of its points in training
PRIOR_NOISE = 0.05  # of what they expect of a point, in sides of the box: it is known better in training than later
WINDOW_NOISE = 0.08  # of a true box, in sides of it, where the predicted one is too far off to be looked at
WINDOW_IOU = 0.5  # with the true box, from which on a predicted box is looked at


@dataclass
class Compared:
    """Predictions beside the truth: ``near`` (M, n) OKS, ``each`` (M, n, K) similarity, boxes' IoU and GIoU (M, n)."""

    near: Tensor
    each: Tensor
    overlap: Tensor
    giou: Tensor


@dataclass
class Assigned:
    """What one set of last layers learns: M objects with n candidate cells each.

    Attributes:
        sigmas, exists: (M, K) of the objects' classes: the tolerance of each point, and which of the K they have.
        values: (M, n), see ``cell_values``.
        chosen: (M, n) bool: cells that learn the object.
        labelled_classes: (B, C) or (B, 1) bool: which of the classes were looked for in each image; None: all.
    """

    truth: KeypointTruth
    near: Candidates
    sigmas: Tensor
    exists: Tensor
    found: FoundPoints
    compared: Compared
    values: Tensor
    chosen: Tensor
    labelled_classes: Tensor | None = None


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
    labelled_classes: Tensor | None = None,
) -> Tensor:
    """Sum of the score's loss over all cells.

    Args:
        logits: (B, S, C) before the sigmoid.
        where: image, cell and class of the P positives, each (P,).
        quality: (P,) in 0..1, their targets.
        ignored: (B, S) bool: cells that are neither positive nor negative, unless they are in ``where``.
        labelled_classes: (B, C) bool, see ``Targets.labelled_classes``: of other classes a cell is no negative; None:
            all are labelled.
    """
    target = torch.zeros_like(logits, dtype=quality.dtype)
    target[where] = quality
    hot = torch.zeros_like(logits, dtype=torch.bool)
    hot[where] = True
    loss = quality_focal(logits, target, hot, kind, alpha, gamma)
    loss = torch.where(ignored[..., None] & ~hot.any(-1, keepdim=True), 0, loss)
    return (loss if labelled_classes is None else torch.where(labelled_classes[:, None] | hot, loss, 0)).sum()


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


def map_term(maps: PointMaps, pixels: Tensor, tokens: Tensor, taught: Assigned) -> Tensor:
    """The loss of the maps that every object's best cells make, a mean over those cells, labelled or not.

    Args:
        pixels, tokens: (B, d, h, w) pixel features and (B, S, width) cells.
    """
    truth = taught.truth
    values, column = taught.values.topk(min(MAP_CELLS, taught.values.shape[1]), dim=1)
    teaching = (values > 0) & taught.exists.any(-1)[:, None]
    row, rank = (teaching & truth.labelled[:, None]).nonzero(as_tuple=True)
    column = column[row, rank]
    image, true_boxes, points = truth.image[row], truth.boxes[row], truth.points[row]
    sides = true_boxes[:, 2:]
    noisy = true_boxes + WINDOW_NOISE * torch.randn_like(true_boxes) * sides.repeat(1, 2)
    noisy[:, 2:] = noisy[:, 2:].maximum(0.5 * sides)
    fits = taught.compared.overlap[row, column] > WINDOW_IOU
    boxes = torch.where(fits[:, None], taught.found.boxes[row, column].detach(), noisy)
    expected = taught.found.points[row, column].detach()
    expected = expected + PRIOR_NOISE * torch.randn_like(expected) * boxes[:, None, 2:]

    padded, index = pad_rows(image, len(pixels), boxes)
    cells = tokens[image, taught.near.cells[row, column]]
    logits = maps.logits(maps.read(pixels, padded)[index], cells, boxes, expected)
    # Half the width of the OKS itself: a place at the end of it is no longer a good one.
    sigmas = taught.sigmas[row].clamp(max=LARGEST_SIGMA)
    deviation = (sigmas * truth.areas[row].clamp(min=SMALLEST**2).sqrt()[:, None])[..., None]
    loss = map_loss(logits, boxes, points[..., :2], deviation / truth.scale[row][:, None])
    there = (points[..., 2] > 0) & in_window(boxes, points[..., :2])
    total = mean_over_processes(teaching.sum().to(loss)).clamp(min=1)
    # Keeps every parameter in the graph when no object has points: distributed training waits for all of them.
    return labelled_mean(loss, there.to(loss)).sum() / total + 0 * (pixels.sum() + maps.embed.bias.sum()).float()


def _sum(values: Tensor, chosen: Tensor) -> Tensor:
    # where, not a product: zero times a value that is not finite would be none.
    return torch.where(chosen, values, 0).sum()

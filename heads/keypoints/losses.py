"""Loss terms of a keypoint head, on (M, n): M objects of a batch with n candidate grid points each.

Sources: Lu et al., "RTMO", CVPR 2024 (scores whose target is the OKS, OKS loss, visibility), and Maji et al.,
"YOLO-Pose", CVPR Workshops 2022 (one minus OKS as the loss of the points).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.keypoints.assignment import KeypointTargets
from mvision.heads.keypoints.grid import Predictions
from mvision.heads.keypoints.heatmaps import MAX_SIGMA, Heatmaps, heatmap_loss, in_window, pad_per_image
from mvision.heads.query.matching import mean_over_processes
from mvision.structures.boxes import cxcywh_to_xyxy, iou
from mvision.structures.oks import labelled_mean, point_similarity

# Objects with a smaller side (root of the area, as a fraction of the image) count as this large where distances are
# divided by an object's size: else the smallest objects would dominate the loss.
MIN_SIDE = 0.01
# Lower limit of a score's target if the box fits exactly. COCO's metrics count an OKS of 0.5 and more, so the order of
# the scores below does not matter to them. With the OKS alone, which is near 0 at the start of training, objects would
# be trained to score like the background.
MIN_SCORE_TARGET = 0.4

# Training of heatmaps:
GRID_POINTS_PER_OBJECT = 4  # the best aligned grid points of every object that make heatmaps
PRIOR_NOISE = 0.05  # added to predicted points, in sides of the box: they are more exact in training than later
WINDOW_NOISE = 0.08  # added to a true box, in its sides, where that replaces a predicted box that is too far off
MIN_WINDOW_IOU = 0.5  # of a predicted box with the true one, above which the predicted box is used


@dataclass
class Comparison:
    """Predictions compared with the ground truth.

    ``oks`` (M, n), ``point_similarity`` (M, n, K), and ``iou`` and ``giou`` (M, n) of the boxes.
    """

    oks: Tensor
    point_similarity: Tensor
    iou: Tensor
    giou: Tensor


@dataclass
class Assignment:
    """What one set of last layers learns: M objects with n candidate grid points each.

    Attributes:
        gt: the objects.
        grid_points: (M, n) int64, their candidate grid points.
        inside: (M, S) bool: which grid points lie in the object's box.
        pred: the predictions of the candidates, (M, n, ...).
        comparison: of ``pred`` with ``gt``.
        alignment: (M, n), see ``compute_alignment``.
        is_positive: (M, n) bool: the candidate learns to predict the object.
    """

    gt: KeypointTargets
    grid_points: Tensor
    inside: Tensor
    pred: Predictions
    comparison: Comparison
    alignment: Tensor
    is_positive: Tensor


def compare(pred: Predictions, gt: KeypointTargets) -> Comparison:
    """OKS, IoU and GIoU of the predictions (M, n, ...) of every object's candidates."""
    scale = gt.scale[:, None, None]
    box_iou, giou = iou(cxcywh_to_xyxy(pred.boxes), cxcywh_to_xyxy(gt.boxes)[:, None])
    places, visibility = gt.points[:, None, :, :2], gt.points[:, None, :, 2]
    similarity = point_similarity(pred.points * scale, places * scale, gt.areas[:, None], gt.sigmas[:, None])
    return Comparison(labelled_mean(similarity, visibility), similarity, box_iou, giou)


def box_terms(assignment: Assignment) -> dict[str, Tensor]:
    """Sums of the L1 distance (``box``) and of one minus the GIoU (``giou``) over the positives."""
    l1 = (assignment.pred.boxes - assignment.gt.boxes[:, None]).abs().sum(-1)
    return {
        "box": _sum(l1, assignment.is_positive),
        "giou": _sum(1 - assignment.comparison.giou, assignment.is_positive),
    }


def point_terms(assignment: Assignment) -> dict[str, Tensor]:
    """Sums over the positives of objects with labelled points, each a mean over the labelled points.

    ``oks`` is one minus the OKS. ``point`` is the L1 distance divided by the root of the object's area: unlike the OKS
    it has a gradient at points that are far off.
    """
    pred, gt = assignment.pred, assignment.gt
    size = gt.areas.clamp(min=MIN_SIDE**2).sqrt()[:, None, None]
    distance = ((pred.points - gt.points[:, None, :, :2]) * gt.scale[:, None, None]).abs().sum(-1) / size
    is_positive = assignment.is_positive & gt.is_labelled[:, None]
    return {
        "oks": _sum(1 - assignment.comparison.oks, is_positive),
        "point": _sum(labelled_mean(distance, gt.points[:, None, :, 2]), is_positive),
    }


def visibility_term(assignment: Assignment) -> Tensor:
    """Sum over the positives of objects with labelled points: cross-entropy of "the point is labelled".

    It is a mean over the points that the object's class has.
    """
    pred, gt = assignment.pred, assignment.gt
    target = (gt.points[:, None, :, 2] > 0).to(pred.visibility).expand_as(pred.visibility)
    entropy = F.binary_cross_entropy_with_logits(pred.visibility, target, reduction="none")
    is_positive = assignment.is_positive & gt.is_labelled[:, None]
    return _sum(labelled_mean(entropy, gt.point_exists[:, None].to(entropy)), is_positive)


@torch.no_grad()
def score_target(oks: Tensor, iou: Tensor) -> Tensor:
    """The target of scores: the OKS (or a point's similarity), at least ``MIN_SCORE_TARGET`` times the box's IoU."""
    return torch.maximum(oks, MIN_SCORE_TARGET * iou)


@torch.no_grad()
def ignored_grid_points(inside: Tensor, gt: KeypointTargets) -> Tensor:
    """(B, S) bool: grid points inside objects without labelled points, and all of images without keypoint labels.

    COCO's evaluation ignores such objects, and predictions that match them. An annotator who gave a box alone has seen
    an object there. As a negative, a distant person would contradict the positives of people in front; as a positive,
    it would need an OKS as the target of its score.

    Args:
        inside: (M, S) bool, see ``candidates``.
    """
    unlabelled = (inside & ~gt.is_labelled[:, None]).to(torch.float32)
    counts = unlabelled.new_zeros(len(gt.images_without_keypoints), inside.shape[1])
    counts = counts.index_add(0, gt.image, unlabelled)
    return (counts > 0) | gt.images_without_keypoints[:, None]


def map_term(maps: Heatmaps, pixels: Tensor, tokens: Tensor, assignment: Assignment) -> Tensor:
    """The loss of the heatmaps of every object's best aligned grid points.

    The sum over those of objects with labelled points is divided by the number of all of them.

    Args:
        pixels: (B, d, h, w) pixel features.
        tokens: (B, S, width).
    """
    gt, alignment = assignment.gt, assignment.alignment
    best, column = alignment.topk(min(GRID_POINTS_PER_OBJECT, alignment.shape[1]), dim=1)
    is_used = (best > 0) & gt.class_has_points[:, None]
    row, rank = (is_used & gt.is_labelled[:, None]).nonzero(as_tuple=True)
    column = column[row, rank]
    image, points = gt.image[row], gt.points[row]
    boxes, expected = _noisy_windows_and_points(assignment, row, column)

    padded, index = pad_per_image(image, len(pixels), boxes)
    used_tokens = tokens[image, assignment.grid_points[row, column]]
    logits = maps.logits(maps.sample(pixels, padded)[index], used_tokens, boxes, expected)
    # Half the standard deviation of the point similarity: at one whole the similarity is down to 0.61.
    sigmas = gt.sigmas[row].clamp(max=MAX_SIGMA)
    target_std = (sigmas * gt.areas[row].clamp(min=MIN_SIDE**2).sqrt()[:, None])[..., None]
    loss = heatmap_loss(logits, boxes, points[..., :2], target_std / gt.scale[row][:, None])
    is_counted = (points[..., 2] > 0) & in_window(boxes, points[..., :2])
    total = mean_over_processes(is_used.sum().to(loss)).clamp(min=1)
    # The zero keeps every parameter in the graph when no object has points: distributed training waits for all of them.
    return labelled_mean(loss, is_counted.to(loss)).sum() / total + 0 * (pixels.sum() + maps.embed.bias.sum()).float()


def _noisy_windows_and_points(assignment: Assignment, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of the windows (P, 4) and expected points (P, K, 2) for the candidates (row, column) of ``assignment``.

    They are detached. The noise makes them as inexact as predictions are in images that were not trained on.
    """
    true_boxes = assignment.gt.boxes[row]
    sides = true_boxes[:, 2:]
    noisy = true_boxes + WINDOW_NOISE * torch.randn_like(true_boxes) * sides.repeat(1, 2)
    noisy[:, 2:] = noisy[:, 2:].maximum(0.5 * sides)
    fits = assignment.comparison.iou[row, column] > MIN_WINDOW_IOU
    boxes = torch.where(fits[:, None], assignment.pred.boxes[row, column].detach(), noisy)
    expected = assignment.pred.points[row, column].detach()
    return boxes, expected + PRIOR_NOISE * torch.randn_like(expected) * boxes[:, None, 2:]


def _sum(values: Tensor, is_positive: Tensor) -> Tensor:
    # where and not a product: zero times infinity or NaN is NaN.
    return torch.where(is_positive, values, 0).sum()

"""Loss terms of a keypoint head, on (M, n): M objects of a batch with n candidate grid points each.

Sources: Lu et al., "RTMO", CVPR 2024 (scores whose target is the OKS, OKS loss, visibility), and Maji et al.,
"YOLO-Pose", CVPR Workshops 2022 (one minus OKS as the loss of the points).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.keypoints.grid import Predictions, take_rows
from mvision.heads.keypoints.heatmaps import MAX_SIGMA, Heatmaps, heatmap_loss, in_window
from mvision.heads.keypoints.targets import KeypointTargets, Poses
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
class Candidates:
    """The n candidate grid points of each of the M objects, and what the layers that learn the object predict there.

    Attributes:
        gt: the objects.
        grid_points: (M, n) int64, their candidate grid points.
        inside: (M, S) bool: which grid points lie in the object's box.
        pred: the predictions of the candidates, (M, n, ...).
        comparison: of ``pred`` with ``gt``.
        alignment: (M, n), see ``compute_alignment``.
    """

    gt: KeypointTargets
    grid_points: Tensor
    inside: Tensor
    pred: Predictions
    comparison: Comparison
    alignment: Tensor


def compare(pred: Predictions, gt: KeypointTargets) -> Comparison:
    """OKS, IoU and GIoU of the predictions (M, n, ...) of every object's candidates."""
    scale = gt.scale[:, None, None]
    box_iou, giou = iou(cxcywh_to_xyxy(pred.boxes), cxcywh_to_xyxy(gt.boxes)[:, None])
    places, visibility = gt.points[:, None, :, :2], gt.points[:, None, :, 2]
    similarity = point_similarity(pred.points * scale, places * scale, gt.areas[:, None], gt.sigmas[:, None])
    return Comparison(labelled_mean(similarity, visibility), similarity, box_iou, giou)


def box_losses(found: Candidates) -> dict[str, Tensor]:
    """The L1 distance (``box``) and one minus the GIoU (``giou``) of every candidate, each (M, n)."""
    l1 = (found.pred.boxes - found.gt.boxes[:, None]).abs().sum(-1)
    return {"box": l1, "giou": 1 - found.comparison.giou}


def point_losses(found: Candidates) -> dict[str, Tensor]:
    """One minus the OKS (``oks``) and the distance of the points (``point``) of every candidate, each (M, n).

    The distance is a mean over the labelled points of the L1 distance divided by the root of the object's area: unlike
    the OKS it has a gradient at points that are far off.
    """
    pred, gt = found.pred, found.gt
    per_length = gt.scale / gt.areas.clamp(min=MIN_SIDE**2).sqrt()[:, None]
    distance = ((pred.points - gt.points[:, None, :, :2]) * per_length[:, None, None]).abs().sum(-1)
    return {"oks": 1 - found.comparison.oks, "point": labelled_mean(distance, gt.points[:, None, :, 2])}


def visibility_loss(found: Candidates) -> Tensor:
    """(M, n) cross-entropy of "the point is labelled": a mean over the points that the object's class has."""
    pred, gt = found.pred, found.gt
    target = (gt.points[:, None, :, 2] > 0).to(pred.visibility).expand_as(pred.visibility)
    entropy = F.binary_cross_entropy_with_logits(pred.visibility, target, reduction="none")
    return labelled_mean(entropy, gt.point_exists[:, None])


def sums_by_set(losses: dict[str, Tensor], is_counted: Tensor, sizes: list[int]) -> list[dict[str, Tensor]]:
    """For every set of last layers the sums of losses (M, n) over the counted candidates.

    Args:
        is_counted: (M, n) bool.
        sizes: see ``KeypointTargets``.
    """
    if not losses:
        return [{} for _ in sizes]
    # where and not a product: zero times infinity or NaN is NaN.
    counted = torch.where(is_counted, torch.stack(tuple(losses.values())), 0)
    return [dict(zip(losses, part.sum((1, 2)).unbind())) for part in counted.split(sizes, 1)]


@torch.no_grad()
def score_target(oks: Tensor, iou: Tensor) -> Tensor:
    """The target of scores: the OKS (or a point's similarity), at least ``MIN_SCORE_TARGET`` times the box's IoU."""
    return torch.maximum(oks, MIN_SCORE_TARGET * iou)


@torch.no_grad()
def ignored_grid_points(found: Candidates) -> Tensor | None:
    """(B, S) bool: grid points inside objects without labelled points, and all of images without keypoint labels.

    COCO's evaluation ignores such objects, and predictions that match them. An annotator who gave a box alone has seen
    an object there. As a negative, a distant person would contradict the positives of people in front; as a positive,
    it would need an OKS as the target of its score. Objects of classes that have no points are none of these. None if
    no grid point is ignored.
    """
    gt = found.gt
    if not gt.any_ignored:
        return None
    first = gt.sizes[0]  # the other sets learn the same objects, and perhaps some of classes without points
    is_unlabelled = (gt.class_has_points & ~gt.is_labelled)[:first, None]
    unlabelled = (found.inside[:first] & is_unlabelled).to(torch.float32)
    counts = unlabelled.new_zeros(len(gt.images_without_keypoints), unlabelled.shape[1])
    counts = counts.index_add(0, gt.image[:first], unlabelled)
    return (counts > 0) | gt.images_without_keypoints[:, None]


def map_term(maps: Heatmaps, pixels: Tensor, tokens: Tensor, found: Candidates) -> Tensor:
    """The loss of the heatmaps of every object's best aligned grid points; of the first set of last layers.

    The sum over those of objects with labelled points is divided by the number of all of them.

    Args:
        pixels: (B, d, h, w) pixel features.
        tokens: (B, S, width).
    """
    gt, alignment = found.gt, found.alignment[: found.gt.sizes[0]]
    poses = gt.poses
    best, column = alignment.topk(min(GRID_POINTS_PER_OBJECT, alignment.shape[1]), dim=1)
    is_used = (best > 0) & gt.class_has_points[: len(best), None]
    total = mean_over_processes(is_used.sum().to(alignment)).clamp(min=1)
    if not len(poses.row):
        # Every parameter stays in the graph when no object has points: distributed training waits for all of them.
        return 0 * (pixels.sum() + maps.embed.weight.sum() + maps.embed.bias.sum()).float()
    column = column.index_select(0, poses.row)
    boxes, expected = _noisy_windows_and_points(found, column)

    sampled = maps.sample(pixels, _by_image(boxes, poses, len(pixels)).flatten(1, 2))
    sampled = sampled.unflatten(1, (poses.most, -1))[poses.image, poses.number]
    grid_points = found.grid_points.index_select(0, poses.row).gather(1, column)
    rows = torch.add(grid_points, poses.image[:, None], alpha=tokens.shape[1])
    logits = maps.logits(sampled, take_rows(tokens, rows), boxes, expected)
    # Half the standard deviation of the point similarity: at one whole the similarity is down to 0.61.
    sigmas = poses.sigmas.clamp(max=MAX_SIGMA)
    target_std = (sigmas * poses.areas.clamp(min=MIN_SIDE**2).sqrt()[:, None])[..., None]
    points, visibility = poses.points[:, None, :, :2], poses.points[:, None, :, 2]
    loss = heatmap_loss(logits, boxes, points, (target_std / poses.scale[:, None])[:, None])
    is_counted = (visibility > 0) & in_window(boxes, points) & is_used.index_select(0, poses.row)[..., None]
    return labelled_mean(loss, is_counted).sum() / total


def _by_image(rows: Tensor, poses: Poses, batch: int) -> Tensor:
    """Rows (P, ...) of the poses as (B, most, ...), padded with zeros."""
    return rows.new_zeros(batch, poses.most, *rows.shape[1:]).index_put((poses.image, poses.number), rows)


def _noisy_windows_and_points(found: Candidates, column: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of the windows (P, k, 4) and expected points (P, k, K, 2) for k candidates (P, k) of every pose.

    They are detached. The noise makes them as inexact as predictions are in images that were not trained on.
    """
    poses = found.gt.poses
    rows = torch.add(column, poses.row[:, None], alpha=found.grid_points.shape[1])
    true_boxes = poses.boxes[:, None].expand(-1, column.shape[1], -1)
    sides = true_boxes[..., 2:]
    noisy = true_boxes + WINDOW_NOISE * torch.randn_like(true_boxes) * sides.repeat(1, 1, 2)
    noisy = torch.cat((noisy[..., :2], noisy[..., 2:].maximum(0.5 * sides)), -1)
    fits = take_rows(found.comparison.iou.detach(), rows) > MIN_WINDOW_IOU
    boxes = torch.where(fits[..., None], take_rows(found.pred.boxes.detach(), rows), noisy)
    expected = take_rows(found.pred.points.detach(), rows)
    return boxes, expected + PRIOR_NOISE * torch.randn_like(expected) * boxes[..., None, 2:]

"""Which grid points of a keypoint head are positives of which object.

The M objects of a batch form one list, each with the index of its image and with n candidate grid points of its own.
Assignment and losses work on (M, n), which is small however many grid points there are.

With random weights the quality of predictions carries no information, and an assignment by quality alone (SimOTA, TOOD)
has to wait until good predictions appear by chance. Here the alignment of a grid point with an object starts as its
location in the object, and the quality of its prediction is added to that; good predictions soon outweigh location.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mvision.heads.query.matching import labelled_classes
from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy, iou

PREDICTION_WEIGHT = 2.0  # of a prediction's quality relative to the location prior; both are in 0..1


@dataclass
class KeypointTargets:
    """The objects of a batch that a set of last layers learns, M in all.

    Attributes:
        image: (M,) int64, index of the object's image in the batch.
        classes: (M,) int64, index among the C classes that the layers predict.
        boxes: (M, 4) cxcywh in 0..1.
        points: (M, K, 3) x, y in 0..1 and visibility; 0 means not labelled.
        areas: (M,) as a fraction of the image.
        scale: (M, 2) factors for x and y that turn fractions of width and height into lengths in an image of area 1
            with the same aspect ratio.
        sigmas: (M, K) of the object's class.
        point_exists: (M, K) bool: which of the K points the object's class has.
        images_without_keypoints: (B,) bool: images whose annotations have no keypoints at all.
        labelled_classes: (B, C) or (B, 1) bool: which of the predicted classes were labelled in each image, see
            ``Targets.labelled_classes``; None: all in all images.
    """

    image: Tensor
    classes: Tensor
    boxes: Tensor
    points: Tensor
    areas: Tensor
    scale: Tensor
    sigmas: Tensor
    point_exists: Tensor
    images_without_keypoints: Tensor
    labelled_classes: Tensor | None

    @property
    def is_labelled(self) -> Tensor:
        """(M,) bool: at least one point of the object is labelled."""
        return (self.points[..., 2] > 0).any(-1)

    @property
    def class_has_points(self) -> Tensor:
        """(M,) bool: the object's class has keypoints, labelled or not."""
        return self.point_exists.any(-1)


def keypoint_targets(
    targets: list[Targets], class_labels: Tensor, sigmas: Tensor, point_exists: Tensor, shape: tuple[int, int]
) -> KeypointTargets:
    """Collect the objects that a keypoint head learns.

    Args:
        class_labels: (C,) int64, labels of the predicted classes.
        sigmas, point_exists: (categories, K) by label, see ``KeypointTargets``.
        shape: height and width of the input, used for images whose original size is not known.

    Returns:
        Everything on the device of ``class_labels``, and in the precision of ``sigmas``.
    """
    device, dtype, num_points = class_labels.device, sigmas.dtype, sigmas.shape[1]
    counts = torch.tensor([len(target) for target in targets])
    labels = torch.cat([target.labels for target in targets]).to(device)
    is_class = labels[:, None] == class_labels
    keep = is_class.any(1)
    image = torch.arange(len(targets)).repeat_interleave(counts).to(device)[keep]
    labels = labels[keep]
    points = [
        target.boxes.new_zeros(len(target), num_points, 3) if target.keypoints is None else target.keypoints
        for target in targets
    ]
    heights, widths = torch.tensor([target.size if all(target.size) else shape for target in targets], dtype=dtype).T
    aspect = (widths / heights).sqrt()
    labelled = labelled_classes(targets)
    labelled = None if labelled is None else labelled.to(device)
    return KeypointTargets(
        image=image,
        classes=is_class[keep].int().argmax(1),
        boxes=torch.cat([target.boxes for target in targets]).to(device, dtype)[keep],
        points=torch.cat(points).to(device, dtype)[keep],
        areas=torch.cat([target.areas for target in targets]).to(device, dtype)[keep],
        scale=torch.stack((aspect, 1 / aspect), -1).to(device)[image],
        sigmas=sigmas[labels],
        point_exists=point_exists[labels],
        images_without_keypoints=torch.tensor([target.keypoints is None for target in targets], device=device),
        labelled_classes=labelled if labelled is None or labelled.shape[1] == 1 else labelled[:, class_labels],
    )


@torch.no_grad()
def candidates(centres: Tensor, sizes: Tensor, boxes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid points that suit each object best: near its centre, on a level whose reference size is like its own.

    Args:
        centres: (S, 2) x, y of the grid points in 0..1.
        sizes: (S,) side of their reference boxes in 0..1.
        boxes: (M, 4) cxcywh in 0..1.
        count: the largest n.

    Returns:
        (M, n) int64, indices of the grid points; (M, n) in 0..1, the location prior: how well the location of a grid
        point suits the object, 0 where it is not a candidate; and (M, S) bool, which grid points lie in the object's
        box. Only these are candidates; if there is none, the one nearest to the box's centre is.
    """
    corners = cxcywh_to_xyxy(boxes)
    references = cxcywh_to_xyxy(torch.cat((centres, sizes[:, None].expand(-1, 2)), -1))
    reference_iou, _ = iou(corners[:, None], references)
    distance = centres - boxes[:, None, :2]
    # 1 in the centre of the box, 0 on its sides.
    centrality = 1 - (distance.abs() / (boxes[:, None, 2:] / 2).clamp(min=1e-6)).amax(-1)
    inside = centrality > 0
    prior = reference_iou * centrality.clamp(min=0)
    prior = prior / prior.amax(1, keepdim=True).clamp(min=1e-9)
    nearest = distance.square().sum(-1).argmin(1, keepdim=True)
    prior = prior.scatter(1, nearest, torch.where(inside.any(1, keepdim=True), prior.gather(1, nearest), 1.0))
    location_prior, grid_points = prior.topk(min(count, len(centres)), dim=1)
    return grid_points, location_prior, inside


@torch.no_grad()
def compute_alignment(location_prior: Tensor, scores: Tensor, oks: Tensor, iou: Tensor, is_labelled: Tensor) -> Tensor:
    """How well candidates suit their object, (M, n) in 0..3; 0 where the grid point is not a candidate.

    Args:
        location_prior: (M, n), see ``candidates``.
        scores: (M, n) in 0..1 for the object's class.
        oks: (M, n) of the predicted points.
        iou: (M, n) of the predicted box.
        is_labelled: (M,) bool: the object has labelled points; for the others the box alone counts.
    """
    quality = torch.where(is_labelled[:, None], (oks + iou) / 2, iou)
    alignment = location_prior + PREDICTION_WEIGHT * (scores * quality).sqrt()
    return torch.where(location_prior > 0, torch.nan_to_num(alignment), 0)


@torch.no_grad()
def assign_one2many(alignment: Tensor, grid_points: Tensor, image: Tensor, num_grid_points: int, top_k: int) -> Tensor:
    """The positives of one-to-many training, (M, n) bool: the ``top_k`` candidates of every object that suit it best.

    A grid point is a positive of one object at most: of the one that it is aligned with best.

    Args:
        alignment, grid_points: (M, n), see ``compute_alignment`` and ``candidates``.
        image: (M,), index of the objects' images.
        num_grid_points: S.
    """
    best = alignment.topk(min(top_k, alignment.shape[1]), dim=1).indices
    is_positive = torch.zeros_like(alignment, dtype=torch.bool).scatter(1, best, True) & (alignment > 0)
    if not len(alignment):
        return is_positive
    index = (image[:, None] * num_grid_points + grid_points).flatten()
    wanted = torch.where(is_positive, alignment, 0).flatten()
    largest = wanted.new_zeros(int(index.max()) + 1).scatter_reduce(0, index, wanted, "amax")
    # Of several objects with equal alignment the last one wins: any of them would do, as long as it is one.
    number = torch.arange(1, len(alignment) + 1, device=alignment.device)[:, None].expand_as(alignment).flatten()
    number = torch.where((wanted > 0) & (wanted == largest[index]), number, 0)
    owner = torch.zeros_like(largest, dtype=number.dtype).scatter_reduce(0, index, number, "amax")
    return ((number > 0) & (number == owner[index])).view_as(alignment)


@torch.no_grad()
def assign_one2one(alignment: Tensor, grid_points: Tensor, image: Tensor) -> Tensor:
    """The positives of one-to-one training, (M, n) bool: the matching of the largest total alignment in every image.

    An object whose candidates are all taken by others has no positive. Arguments as in ``assign_one2many``.
    """
    values, indices = alignment.cpu().numpy(), grid_points.cpu().numpy()
    is_positive = np.zeros(values.shape, dtype=bool)
    stop = 0
    for count in image.bincount().tolist():
        start, stop = stop, stop + count
        if count:
            # The matrix has a column for each candidate of this image's objects alone: the image has thousands of
            # grid points.
            used, column = np.unique(indices[start:stop], return_inverse=True)
            column = column.reshape(count, -1)
            matrix = np.zeros((count, len(used)))
            np.put_along_axis(matrix, column, values[start:stop], axis=1)
            rows, columns = linear_sum_assignment(matrix, maximize=True)
            is_positive[start + rows] = column[rows] == columns[:, None]
    return torch.from_numpy(is_positive).to(alignment.device) & (alignment > 0)

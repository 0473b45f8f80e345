"""Which grid points of a keypoint head are positives of which object.

The M objects of a batch form one list, each with the index of its image and with n candidate grid points of its own.
Assignment and losses work on (M, n), which is small however many grid points there are.

With random weights the quality of predictions carries no information, and an assignment by quality alone (SimOTA, TOOD)
has to wait until good predictions appear by chance. Here the alignment of a grid point with an object starts as its
location in the object, and the quality of its prediction is added to that; good predictions soon outweigh location.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mvision.structures.boxes import cxcywh_to_xyxy, iou
from mvision.structures.transfer import start_to_host, to_device

PREDICTION_WEIGHT = 2.0  # of a prediction's quality relative to the location prior; both are in 0..1


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
def assign_one2many(
    alignment: Tensor, grid_points: Tensor, image: Tensor, batch: int, num_grid_points: int, top_k: int
) -> Tensor:
    """The positives of one-to-many training, (M, n) bool: the ``top_k`` candidates of every object that suit it best.

    A grid point is a positive of one object at most: of the one that it is aligned with best.

    Args:
        alignment, grid_points: (M, n), see ``compute_alignment`` and ``candidates``.
        image: (M,), index of the objects' images.
        batch, num_grid_points: B and S.
    """
    best = alignment.topk(min(top_k, alignment.shape[1]), dim=1).indices
    is_positive = torch.zeros_like(alignment, dtype=torch.bool).scatter(1, best, True) & (alignment > 0)
    index = (image[:, None] * num_grid_points + grid_points).flatten()
    wanted = torch.where(is_positive, alignment, 0).flatten()
    largest = wanted.new_zeros(batch * num_grid_points).scatter_reduce(0, index, wanted, "amax")
    # Of several objects with equal alignment the last one wins: any of them would do, as long as it is one.
    number = torch.arange(1, len(alignment) + 1, device=alignment.device)[:, None].expand_as(alignment).flatten()
    number = torch.where((wanted > 0) & (wanted == largest[index]), number, 0)
    owner = torch.zeros_like(largest, dtype=number.dtype).scatter_reduce(0, index, number, "amax")
    return ((number > 0) & (number == owner[index])).view_as(alignment)


@torch.no_grad()
def start_one2one(alignment: Tensor, grid_points: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
    """Start to choose the positives of one-to-one training, and return a function that waits for them.

    They are (M, n) bool: the matching of the largest total alignment in every image. An object whose candidates are all
    taken by others has no positive. What is queued before the function is called keeps a GPU busy.

    Args:
        alignment, grid_points: as in ``assign_one2many``.
        counts: number of objects of every image.
    """
    if not any(counts):
        return lambda: torch.zeros_like(alignment, dtype=torch.bool)
    wait = start_to_host({"alignment": alignment, "grid_points": grid_points})

    def finish() -> Tensor:
        moved = wait()
        chosen = _best_matching(moved["alignment"].numpy(), moved["grid_points"].numpy(), counts)
        return to_device({"chosen": torch.from_numpy(chosen)}, alignment.device)["chosen"]

    return finish


def _best_matching(values: np.ndarray, indices: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The result of ``start_one2one``, on the CPU."""
    is_positive = np.zeros(values.shape, dtype=bool)
    stop = 0
    for count in counts:
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
    return is_positive & (values > 0)

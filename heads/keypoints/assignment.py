"""Which cells of a dense keypoint head learn which object.

The objects of a batch are kept in one list of M, each with the number of its image, and every object with its own n
candidate cells. What follows (assignment, losses) works on (M, n), which is small however many cells there are.

From random weights the quality of predictions says nothing, and assignments made by it alone (SimOTA, TOOD) wait for
some to appear by chance. Here a cell's value begins as its place in the object and gains what it predicts; whoever
predicts well soon outweighs whoever only lies well.
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

PREDICTED = 2.0  # weight of what a cell predicts beside where it lies; both are in 0..1


@dataclass
class KeypointTruth:
    """The objects of a batch whose class has keypoints.

    Attributes:
        image: (M,) int64, their images.
        classes: (M,) int64, index into the classes with keypoints.
        boxes: (M, 4) cxcywh in 0..1.
        points: (M, K, 3) x, y in 0..1 and visibility; 0: not labelled.
        areas: (M,) fraction of the image.
        scale: (M, 2) makes of fractions of width and height lengths in an image whose area is 1, whatever its shape.
        unlabelled: (B,) bool: images whose annotations say nothing about keypoints.
        labelled_classes: (B, categories) or (B, 1) bool: the labels that were looked for in each image; None: all.
    """

    image: Tensor
    classes: Tensor
    boxes: Tensor
    points: Tensor
    areas: Tensor
    scale: Tensor
    unlabelled: Tensor
    labelled_classes: Tensor | None

    @property
    def labelled(self) -> Tensor:
        """(M,) bool: at least one point of the object is labelled."""
        return (self.points[..., 2] > 0).any(-1)


def keypoint_truth(
    targets: list[Targets], table: Tensor, num_points: int, shape: tuple[int, int], dtype: torch.dtype
) -> KeypointTruth:
    """Collect the objects that a keypoint head learns.

    Args:
        table: (categories,) int64, for every label the index among the classes with keypoints, -1 for the others.
        num_points: K.
        shape: height and width of the input, for images whose original size is not known.

    Returns:
        Everything on the device of ``table``.
    """
    device = table.device
    counts = torch.tensor([len(target) for target in targets])
    image = torch.arange(len(targets)).repeat_interleave(counts).to(device)
    classes = table[torch.cat([target.labels for target in targets]).to(device)]
    points = [
        target.boxes.new_zeros(len(target), num_points, 3) if target.keypoints is None else target.keypoints
        for target in targets
    ]
    heights, widths = torch.tensor([target.size if all(target.size) else shape for target in targets], dtype=dtype).T
    aspect = (widths / heights).sqrt()
    keep = classes >= 0
    image = image[keep]
    return KeypointTruth(
        image=image,
        classes=classes[keep],
        boxes=torch.cat([target.boxes for target in targets]).to(device, dtype)[keep],
        points=torch.cat(points).to(device, dtype)[keep],
        areas=torch.cat([target.areas for target in targets]).to(device, dtype)[keep],
        scale=torch.stack((aspect, 1 / aspect), -1).to(device)[image],
        unlabelled=torch.tensor([target.keypoints is None for target in targets], device=device),
        labelled_classes=labelled_classes(targets, device),
    )


@dataclass
class Candidates:
    """Cells that may learn an object.

    Attributes:
        cells: (M, n) int64 index of the cell.
        closeness: (M, n) in 0..1, how well the cell lies for the object; 0: it is no candidate.
        inside: (M, S) bool: cells whose centre lies in the object's box.
    """

    cells: Tensor
    closeness: Tensor
    inside: Tensor


@torch.no_grad()
def candidates(centres: Tensor, sizes: Tensor, boxes: Tensor, count: int) -> Candidates:
    """The cells that lie best for each object: near its centre, on a level made for its size.

    Args:
        centres: (S, 2) x, y of the cells in 0..1.
        sizes: (S,) side of the objects that a cell's level is made for, in 0..1.
        boxes: (M, 4) cxcywh in 0..1.
        count: n, at most.

    Only cells inside the box are taken, and the nearest one of all if none is.
    """
    corners = cxcywh_to_xyxy(boxes)
    anchors = cxcywh_to_xyxy(torch.cat((centres, sizes[:, None].expand(-1, 2)), -1))
    overlap, _ = iou(corners[:, None], anchors)
    distance = centres - boxes[:, None, :2]
    # 1 in the centre of the box, 0 on its sides.
    centred = 1 - (distance.abs() / (boxes[:, None, 2:] / 2).clamp(min=1e-6)).amax(-1)
    inside = centred > 0
    place = overlap * centred.clamp(min=0)
    place = place / place.amax(1, keepdim=True).clamp(min=1e-9)
    nearest = distance.square().sum(-1).argmin(1, keepdim=True)
    place = place.scatter(1, nearest, torch.where(inside.any(1, keepdim=True), place.gather(1, nearest), 1.0))
    closeness, cells = place.topk(min(count, len(centres)), dim=1)
    return Candidates(cells, closeness, inside)


@torch.no_grad()
def cell_values(closeness: Tensor, scores: Tensor, near: Tensor, overlap: Tensor, labelled: Tensor) -> Tensor:
    """What a candidate is worth to its object, (M, n); 0 for cells that are no candidates.

    Args:
        closeness: (M, n), see ``Candidates``.
        scores: (M, n) in 0..1 for the object's class.
        near: (M, n) OKS of the predicted points.
        overlap: (M, n) IoU of the predicted box.
        labelled: (M,) bool: the object has points; else the box alone counts.
    """
    quality = torch.where(labelled[:, None], (near + overlap) / 2, overlap)
    value = closeness + PREDICTED * (scores * quality).sqrt()
    return torch.where(closeness > 0, torch.nan_to_num(value), 0)


@torch.no_grad()
def many_cells(values: Tensor, cells: Tensor, image: Tensor, num_cells: int, top_k: int) -> Tensor:
    """The ``top_k`` candidates of most value for every object, (M, n) bool; a cell learns one object, the one it suits.

    Args:
        values, cells: (M, n), see ``cell_values`` and ``Candidates``.
        image: (M,) of the objects.
        num_cells: S.
    """
    best = values.topk(min(top_k, values.shape[1]), dim=1).indices
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter(1, best, True) & (values > 0)
    if not len(values):
        return chosen
    place = (image[:, None] * num_cells + cells).flatten()
    wanted = torch.where(chosen, values, 0).flatten()
    most = wanted.new_zeros(int(place.max()) + 1).scatter_reduce(0, place, wanted, "amax")
    # Of two objects with equal values the later one: who it is does not matter, that it is one does.
    number = torch.arange(1, len(values) + 1, device=values.device)[:, None].expand_as(values).flatten()
    number = torch.where((wanted > 0) & (wanted == most[place]), number, 0)
    owner = torch.zeros_like(most, dtype=number.dtype).scatter_reduce(0, place, number, "amax")
    return ((number > 0) & (number == owner[place])).view_as(values)


@torch.no_grad()
def one_cell(values: Tensor, cells: Tensor, image: Tensor) -> Tensor:
    """One candidate for every object, (M, n) bool: the one-to-one matching with the largest sum of values.

    An object whose candidates all serve others remains without one. Arguments as in ``many_cells``.
    """
    worth, where = values.cpu().numpy(), cells.cpu().numpy()
    chosen = np.zeros(worth.shape, dtype=bool)
    stop = 0
    for count in image.bincount().tolist():
        start, stop = stop, stop + count
        if count:
            # Among the candidates of this image alone: a map has thousands of cells.
            taken, column = np.unique(where[start:stop], return_inverse=True)
            column = column.reshape(count, -1)
            table = np.zeros((count, len(taken)))
            np.put_along_axis(table, column, worth[start:stop], axis=1)
            rows, columns = linear_sum_assignment(table, maximize=True)
            chosen[start + rows] = column[rows] == columns[:, None]
    return torch.from_numpy(chosen).to(values.device) & (values > 0)

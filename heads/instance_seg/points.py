"""The points at which masks are compared, and what masks and features are there.

Masks come from the CPU as one bit per pixel, so that those of a whole batch go to a GPU in one small copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.neck.layers import without_autocast
from mvision.structures import Targets
from mvision.structures.transfer import to_device

BOX_MARGIN = 1.3  # the points of an object are drawn from its box enlarged by this factor
# Numbers of one tensor on the way, larger batches are done in parts: 128 MiB in float32, and what a CPU's caches hold.
MAX_NUMBERS = {"cuda": 2**25, "cpu": 2**22}


def at_once(device: torch.device, numbers: int) -> int:
    """How many rows with this many numbers each are done at once."""
    return max(1, MAX_NUMBERS.get(device.type, MAX_NUMBERS["cuda"]) // numbers)


@dataclass
class MaskPoints:
    """Points at which the masks of a batch are compared, T and padding as in ``PaddedTargets``.

    Attributes:
        points: (B, P, 2) x, y in 0..1, in random order.
        labels: (B, T, P) in 0..1, the masks of the objects at the points.
        valid: (B, T) bool, False for padding and for objects without a mask.
        known: the same as ``valid``, as a NumPy array on the CPU.
    """

    points: Tensor
    labels: Tensor
    valid: Tensor
    known: np.ndarray


@torch.no_grad()
def sample_mask_points(targets: list[Targets], count: int, device: torch.device) -> MaskPoints:
    """Draw ``count`` points in every image and read the objects' masks at them."""
    most = max((len(target) for target in targets), default=0)
    boxes = torch.zeros(len(targets), max(most, 1), 4)
    for row, target in zip(boxes, targets):
        row[: len(target)] = target.boxes
    known = np.zeros((len(targets), most), dtype=bool)
    bits, slots, size = pack_masks(targets, known)
    on_device = to_device({"boxes": boxes, "valid": torch.from_numpy(known), "bits": bits, "slots": slots}, device)
    points = _draw_points(on_device["boxes"], [len(target) for target in targets], count)
    labels = points.new_zeros(len(targets), most, count)
    read_masks(on_device["bits"], on_device["slots"], size, points, labels)
    return MaskPoints(points, labels, on_device["valid"], known)


def _draw_points(boxes: Tensor, counts: list[int], count: int) -> Tensor:
    """(B, count, 2) x, y in 0..1: each with a chance of a half anywhere, else in the enlarged box of a random object.

    ``boxes`` (B, T, 4) are padded, ``counts`` are the numbers of those that are not padding.
    """
    points = torch.empty(len(boxes), count, 2, device=boxes.device)
    chance = torch.ones(len(boxes), count, device=boxes.device)
    chosen = torch.zeros(len(boxes), count, dtype=torch.int64, device=boxes.device)
    for index, objects in enumerate(counts):
        points[index].uniform_()
        if objects:
            chance[index].uniform_()
            chosen[index].random_(objects)
    box = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    inside = (box[..., :2] + (points - 0.5) * box[..., 2:] * BOX_MARGIN).clamp(0, 1)
    return torch.where((chance < 0.5)[..., None], inside, points)


def pack_masks(targets: list[Targets], known: np.ndarray) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The masks of a batch of N objects that have one, on the CPU, at one bit per pixel.

    Args:
        targets: the labels.
        known: (B, T) bool, zeros; set to True for the objects whose mask has a pixel. (Where only some objects of an
            image are labelled with a mask, the others have one without any.)

    Returns:
        (N, S) uint8, eight pixels in each; (N,) int64, the place of each object in the flat (B * T); height and width.
    """
    rows, slots, size = [np.zeros((0, 1), np.uint8)], [np.zeros(0, np.int64)], (1, 1)
    for index, target in enumerate(targets):
        if target.masks is not None and len(target):
            size = (target.masks.shape[-2], target.masks.shape[-1])
            packed = np.packbits(target.masks.cpu().numpy().reshape(len(target), -1), axis=1)
            has_pixels = packed.any(axis=1)
            known[index, : len(target)] = has_pixels
            rows.append(packed[has_pixels])
            slots.append(index * known.shape[1] + np.flatnonzero(has_pixels))
    rows = rows if len(rows) == 1 else rows[1:]
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(slots)), size


def read_masks(bits: Tensor, slots: Tensor, size: tuple[int, int], points: Tensor, labels: Tensor) -> None:
    """Write masks at points in 0..1 into ``labels``, interpolated bilinearly between pixels.

    Args:
        bits, slots, size: see ``pack_masks``.
        points: (B, P, 2) x, y in 0..1.
        labels: (B, T, P) float32; only the rows of ``slots`` are changed.
    """
    height, width = size
    x, y = (points[..., 0] * width - 0.5).clamp(0, width - 1), (points[..., 1] * height - 0.5).clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    left, top = left.long(), top.long()
    right, lower = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    corners = [
        (row * width + column, row_share * column_share)
        for row, row_share in ((top, 1 - lower_share), (lower, lower_share))
        for column, column_share in ((left, 1 - right_share), (right, right_share))
    ]
    places = [(at >> 3, (7 - (at & 7)).to(torch.uint8), share) for at, share in corners]
    flat, most = labels.flatten(0, 1), labels.shape[1]
    for part, rows in zip(*(tensor.split(at_once(points.device, points.shape[1])) for tensor in (bits, slots))):
        image = rows // most
        values = torch.zeros(len(rows), points.shape[1], device=points.device)
        for byte, shift, share in places:
            bit = part.gather(1, byte[image]).bitwise_right_shift_(shift[image]).bitwise_and_(1)
            values += bit * share[image]
        flat.index_copy_(0, rows, values)


def read_features(features: Tensor, points: Tensor) -> Tensor:
    """(B, d, P) float32: maps (B, d, h, w) at points (B, P, 2) in 0..1, bilinear, as post-processing enlarges masks."""
    grid = (2 * points - 1).unsqueeze(1)
    with without_autocast(features):  # grid_sample is too imprecise in bf16, and wrong there on some CPUs
        values = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return values.squeeze(2)

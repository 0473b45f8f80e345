"""The results of a picture from those of its tiles and of the whole picture at low resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mvision.inference.selection import Selection
from mvision.inference.tile_masks import changes_of, enlarged, united
from mvision.inference.tile_merge import COVERED, SAME, WEAK, Candidates, Merged, cluster, joined
from mvision.inference.tiles import Grid
from mvision.structures import Instances
from mvision.structures.masks import decode_mask


def merge_tiles(
    grid: Grid,
    found: Sequence[Instances],
    whole: Instances | None,
    are_regions: bool = False,
    chosen: Selection | None = None,
) -> Merged:
    """One list of results.

    Args:
        found: of every tile, in pixels of it.
        whole: of the whole picture at ``whole.size``, or None.
        are_regions: they are one region for each class (semantic segmentation), and not objects.
        chosen: its ``nms`` is applied once more, between tiles.
    """
    if are_regions:
        return merge_regions(grid, found)
    merged, pieces = joined(cluster(Candidates.of_tiles(grid, found)))
    merged.categories = found[0].categories
    if whole is not None and len(whole):
        merged = _with_large(merged, pieces, whole, grid)
    regions = [one.regions for one in found]
    if all(one is not None for one in regions):
        merged.regions = merge_regions(grid, [one for one in regions if one is not None])
    order = np.argsort(-merged.scores, kind="stable")
    if chosen is not None and chosen.nms is not None:
        scores = merged.scores[order].astype(np.float32)
        plain = Instances(merged.boxes[order].astype(np.float32), scores, merged.labels[order], grid.size, query=order)
        order = np.asarray(chosen.without_overlaps(plain).query)
    return merged.filter(order)


def merge_regions(grid: Grid, found: Sequence[Instances]) -> Merged:
    """One region for each class of those of all tiles.

    Every pixel is taken from the tile whose middle is nearest. The score of a class is the mean over its pixels.
    """
    masks: dict[int, list[np.ndarray]] = {}
    sums: dict[int, np.ndarray] = {}
    for number, instances in enumerate(found):
        assert instances.masks is not None
        left, top, _, _ = grid.window(number)
        x0, y0, x1, y1 = grid.core(number)
        for label, score, rle in zip(instances.labels.tolist(), instances.scores.tolist(), instances.masks.rles):
            part = decode_mask(rle)[y0 - top : y1 - top, x0 - left : x1 - left]
            if pixels := int(part.sum()):
                masks.setdefault(label, []).append(changes_of(part, x0, y0, grid.size[0]))
                sums[label] = sums.get(label, np.zeros(2)) + np.array((pixels * score, pixels))
    labels = sorted(masks, key=lambda label: -sums[label][0] / sums[label][1])
    whole = [united(masks[label]) for label in labels]
    return Merged(
        grid.size,
        np.array([_extent(mask, grid.size[0]) for mask in whole], dtype=np.float64).reshape(-1, 4),
        np.array([sums[label][0] / sums[label][1] for label in labels]),
        np.array(labels, dtype=np.int64),
        found[0].categories,
        whole,
    )


def _extent(mask: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """The box of a mask that has pixels. A run that goes on in the next column reaches from top to bottom."""
    first, last = mask[0::2], mask[1::2] - 1
    spans = (first // height != last // height).any()
    top, bottom = (0, height - 1) if spans else (int((first % height).min()), int((last % height).max()))
    return int(first[0] // height), top, int(last[-1] // height) + 1, bottom + 1


def _with_large(merged: Merged, pieces: np.ndarray, whole: Instances, grid: Grid) -> Merged:
    """The objects of the tiles, and those of the whole picture that lie in no tile as a whole.

    Of the others the tiles have seen more. What a tile has seen complete stays as it is. An object that was joined of
    pieces stays too where the whole picture has it, because its outline is finer, and pieces of it that were left are
    joined to it. Otherwise the object of the whole picture takes the place of the pieces in it.
    """
    height, width = merged.size
    scale = np.tile((width / whole.size[1], height / whole.size[0]), 2)
    boxes = whole.boxes.astype(np.float64) * scale
    large = np.flatnonzero(~_in_one_tile(boxes, grid))
    alive, added = np.ones(len(pieces), dtype=bool), []
    pieces = pieces.copy()
    for number in large[np.argsort(-whole.scores[large], kind="stable")].tolist():
        score, box = float(whole.scores[number]), boxes[number]
        iou, inside = _overlaps(merged.boxes, box)
        mine = alive & (merged.labels == whole.labels[number])
        same = np.where(mine, iou, 0.0)
        best = int(same.argmax()) if len(same) else -1
        matched = best >= 0 and same[best] >= SAME
        weaker = WEAK * merged.scores <= (max(score, merged.scores[best]) if matched else score)
        absorbed = mine & pieces & (inside >= COVERED) & weaker
        if matched:
            absorbed[best] = False
            if pieces[best]:
                _absorb(merged, best, np.flatnonzero(absorbed))
                merged.scores[best] = max(merged.scores[best], score)
                pieces[best] = False
                alive &= ~absorbed
            continue
        alive &= ~absorbed
        added.append(number)
    kept = merged.filter(np.flatnonzero(alive))
    return _appended(kept, whole.filter(np.array(added, dtype=np.int64)), boxes[added]) if added else kept


def _in_one_tile(boxes: np.ndarray, grid: Grid) -> np.ndarray:
    """(N,) bool: whether one of the tiles shows all of a box."""
    fits = []
    for axis, starts in ((0, grid.lefts), (1, grid.tops)):
        first = np.array(starts)
        # Of the tiles that begin before the box the last one reaches farthest.
        last = np.searchsorted(first, boxes[:, axis], side="right") - 1
        fits.append(boxes[:, axis + 2] <= first[last.clip(min=0)] + grid.tile[1 - axis])
    return fits[0] & fits[1]


def _absorb(merged: Merged, index: int, others: np.ndarray) -> None:
    """Join pieces to an object, in place."""
    every = np.array([index, *others.tolist()])
    merged.boxes[index] = (*merged.boxes[every, :2].min(axis=0), *merged.boxes[every, 2:].max(axis=0))
    merged.scores[index] = merged.scores[every].max()
    if merged.masks is not None:
        merged.masks[index] = united([merged.masks[one] for one in every.tolist()])
    if merged.keypoints is not None:
        points = merged.keypoints[every]
        merged.keypoints[index] = points[points[..., 2].argmax(0), np.arange(points.shape[1])]


def _appended(merged: Merged, more: Instances, boxes: np.ndarray) -> Merged:
    """With further objects, whose ``boxes`` are in pixels of the picture and the rest at the size ``more.size``."""
    masks = keypoints = None
    if merged.masks is not None and more.masks is not None:
        masks = [*merged.masks, *(enlarged(mask, more.size, merged.size) for mask in more.masks)]
    if merged.keypoints is not None and more.keypoints is not None:
        scale = (merged.size[1] / more.size[1], merged.size[0] / more.size[0], 1)
        keypoints = np.concatenate((merged.keypoints, more.keypoints * scale))
    return replace(
        merged,
        boxes=np.concatenate((merged.boxes, boxes)),
        scores=np.concatenate((merged.scores, more.scores.astype(np.float64))),
        labels=np.concatenate((merged.labels, more.labels)),
        masks=masks,
        keypoints=keypoints,
    )


def _overlaps(boxes: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) IoU of boxes with one, and the share of each that lies in it."""
    inner = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(min=0).prod(axis=1)
    areas, area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (box[2:] - box[:2]).prod()
    return inner / (areas + area - inner).clip(min=1e-9), inner / areas.clip(min=1e-9)

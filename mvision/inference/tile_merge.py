"""One list of objects from those of overlapping tiles: every object once, and joined where a border cuts it.

Two tiles see the same pixels where they overlap, so what they find there is compared there alone: two results are one
object if their parts in the shared area have an IoU of ``SAME``. Neither the IoU of whole boxes would do (of an object
that one tile sees whole and the other cut to a third, it is a third), nor the intersection over the smaller one (which
takes a small object in front of a large one for a part of it).

A result that reaches a border of its tile inside the picture is incomplete. It never replaces a complete one: of the
results of one object the best complete one is kept, and if all are incomplete, the object is larger than the overlap,
and their boxes and masks are joined. Incomplete results that are left are dropped, or joined too, where another tile's
object covers ``COVERED`` of their part in the shared area: what is cut to a narrow strip seldom has the outline of the
object there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mvision.inference.tile_masks import changes_of, shrunk, to_masks, united
from mvision.inference.tiles import Grid
from mvision.structures import Category, Instances
from mvision.structures.masks import Masks, decode_mask

SAME = 0.5  # IoU of two results in what both tiles see
COVERED = 0.7  # share of an incomplete result
# Of the best score of an object: results with less do not shape it. With a threshold of 0, as metrics want it, there is
# always some result of a low score near a border.
WEAK = 0.3
EDGE = 0.01  # of the side of a tile, 2 pixels at least: boxes of cut objects end so close to its border
KEPT = 64 << 20  # bytes of decoded masks


@dataclass
class Merged:
    """The objects of a picture, sorted by falling score.

    Attributes:
        size: (height, width) of the picture.
        boxes: (N, 4) float64 xyxy in pixels of it.
        scores, labels, keypoints, categories: as in ``Instances``.
        masks: of each the places of its changes, see ``tile_masks``; or None.
        regions: as in ``Instances``.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    categories: list[Category]
    masks: list[np.ndarray] | None = None
    keypoints: np.ndarray | None = None
    regions: Merged | None = None

    def instances(self) -> Instances:
        """In pixels of the picture."""
        masks = None if self.masks is None else to_masks(self.masks, self.size)
        regions = None if self.regions is None else self.regions.instances()
        return self._instances(self.size, masks, regions)

    def reduced(self, small: tuple[int, int]) -> Instances:
        """On the picture at a smaller (height, width), for drawing."""
        masks = None
        if self.masks is not None:
            masks = Masks.from_array(np.zeros((0, *small), bool))
            masks.rles = [Masks.from_array(shrunk(mask, self.size, small)[None]).rles[0] for mask in self.masks]
        return self._instances(small, masks, None if self.regions is None else self.regions.reduced(small))

    def filter(self, keep: np.ndarray) -> Merged:
        """Those that ``keep`` (indices) selects, in its order; with all regions."""
        return Merged(
            self.size,
            self.boxes[keep],
            self.scores[keep],
            self.labels[keep],
            self.categories,
            None if self.masks is None else [self.masks[index] for index in keep.tolist()],
            None if self.keypoints is None else self.keypoints[keep],
            self.regions,
        )

    def _instances(self, size: tuple[int, int], masks: Masks | None, regions: Instances | None) -> Instances:
        y, x = size[0] / self.size[0], size[1] / self.size[1]
        keypoints = None if self.keypoints is None else (self.keypoints * (x, y, 1)).astype(np.float32)
        return Instances(
            boxes=(self.boxes * (x, y, x, y)).astype(np.float32),
            scores=self.scores.astype(np.float32),
            labels=self.labels,
            size=size,
            categories=self.categories,
            masks=masks,
            keypoints=keypoints,
            regions=regions,
        )


@dataclass
class Candidates:
    """The results of all tiles of a picture.

    Attributes:
        grid: the tiles.
        tile, place: (N,) int64, of each the number of its tile and its position among the results of that one.
        boxes: (N, 4) float64 in pixels of the picture.
        scores, labels: (N,).
        cut: (N, 4) bool: the left, top, right or bottom side lies at a border of the tile inside the picture.
        keypoints: (N, K, 3) float64 in pixels of the picture, or None.
        masks: of each tile; None without masks.
    """

    grid: Grid
    tile: np.ndarray
    place: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    cut: np.ndarray
    keypoints: np.ndarray | None
    masks: list[Masks] | None
    _parts: OrderedDict[int, tuple[int, int, np.ndarray]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    @classmethod
    def of_tiles(cls, grid: Grid, found: Sequence[Instances]) -> Candidates:
        """Gather what was found in every tile, in pixels of the tile."""
        counts = [len(instances) for instances in found]
        tile = np.repeat(np.arange(len(found)), counts)
        windows = grid.windows()
        corner = windows[tile, :2].astype(np.float64)
        boxes = np.concatenate([one.boxes for one in found]).astype(np.float64) + np.tile(corner, 2)
        height, width = grid.size
        margin = np.maximum(EDGE * np.array(grid.tile[::-1]), 2)
        low = (boxes[:, :2] <= windows[tile, :2] + margin) & (windows[tile, :2] > 0)
        high = (boxes[:, 2:] >= windows[tile, 2:] - margin) & (windows[tile, 2:] < (width, height))
        keypoints = None
        if all(one.keypoints is not None for one in found):
            keypoints = np.concatenate([np.asarray(one.keypoints, np.float64) for one in found])
            keypoints[..., :2] += corner[:, None]
        masks = [one.masks for one in found if one.masks is not None]
        return cls(
            grid,
            tile,
            np.concatenate([np.arange(count) for count in counts]),
            boxes,
            np.concatenate([one.scores for one in found]).astype(np.float64),
            np.concatenate([one.labels for one in found]),
            np.concatenate((low, high), axis=1),
            keypoints,
            masks if len(masks) == len(found) else None,
        )

    def mask(self, index: int) -> tuple[int, int, np.ndarray]:
        """Left, top, and the part of the picture (h, w) bool in which the mask of a result has pixels."""
        if index in self._parts:
            self._parts.move_to_end(index)
            return self._parts[index]
        assert self.masks is not None
        tile = int(self.tile[index])
        mask = decode_mask(self.masks[tile].rles[int(self.place[index])])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top, _, _ = self.grid.window(tile)
        part = (left, top, mask[:0, :0])
        if len(rows):
            inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
            part = (left + int(columns[0]), top + int(rows[0]), inner)
        self._parts[index] = part
        self._bytes += part[2].size
        while self._bytes > KEPT and len(self._parts) > 1:
            self._bytes -= self._parts.popitem(last=False)[1][2].size
        return part

    def changes(self, index: int) -> np.ndarray:
        """The mask of a result in the picture, see ``tile_masks``."""
        left, top, part = self.mask(index)
        return changes_of(part, left, top, self.grid.size[0])


@dataclass
class Pairs:
    """Pairs of results of two tiles and one class that share pixels, compared in what both tiles see.

    Attributes:
        first, second: (P,) int64 numbers of the results.
        iou: (P,) of their parts there.
        covers: (P, 2): the share of the part of the first, and of the second, that the other one covers.
    """

    first: np.ndarray
    second: np.ndarray
    iou: np.ndarray
    covers: np.ndarray


def compared(candidates: Candidates) -> Pairs:
    """All pairs that may be parts of one object."""
    windows = candidates.grid.windows()
    of_tile = np.searchsorted(candidates.tile, np.arange(len(windows) + 1))
    every: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for i, j in candidates.grid.neighbours():
        if of_tile[i] == of_tile[i + 1] or of_tile[j] == of_tile[j + 1]:
            continue
        low, high = np.maximum(windows[i, :2], windows[j, :2]), np.minimum(windows[i, 2:], windows[j, 2:])
        a, box_a = _inside(candidates.boxes, of_tile[i], of_tile[i + 1], low, high)
        b, box_b = _inside(candidates.boxes, of_tile[j], of_tile[j + 1], low, high)
        sides = np.minimum(box_a[:, None, 2:], box_b[None, :, 2:]) - np.maximum(box_a[:, None, :2], box_b[None, :, :2])
        shared = sides.clip(min=0).prod(axis=-1) * (candidates.labels[a][:, None] == candidates.labels[b])
        row, column = np.nonzero(shared)
        areas = np.stack((_area(box_a)[row], _area(box_b)[column]), axis=1)
        overlap = shared[row, column]
        first, second = a[row], b[column]
        if candidates.masks is not None and len(row):
            counts = [_mask_overlap(candidates, *pair, low, high) for pair in zip(first.tolist(), second.tolist())]
            table = np.array(counts, dtype=np.float64)
            overlap, areas = table[:, 0], table[:, 1:]
        found = (first, second, overlap, areas)
        for values, of_tiles in zip(every, found):
            values.append(of_tiles)
    if not every[0]:
        nothing = np.zeros(0, np.int64)
        return Pairs(nothing, nothing, np.zeros(0), np.zeros((0, 2)))
    firsts, seconds, shared, areas = map(np.concatenate, every)
    union = (areas.sum(axis=1) - shared).clip(min=1e-9)
    return Pairs(firsts, seconds, shared / union, shared[:, None] / areas.clip(min=1e-9))


class Clusters:
    """Results that are of one object: at first each of its own.

    Attributes:
        members: by the number of the cluster.
    """

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self.complete: np.ndarray = np.logical_not(candidates.cut.any(axis=1))
        self.members = {index: [index] for index in range(len(candidates.tile))}
        self._of = np.arange(len(candidates.tile))
        self._tiles = [{tile} for tile in candidates.tile.tolist()]

    def of(self, index: int) -> int:
        """The number of the cluster of a result."""
        return int(self._of[index])

    def share_a_tile(self, one: int, other: int) -> bool:
        """Whether one tile has a result in both: it has seen two objects."""
        return not self._tiles[one].isdisjoint(self._tiles[other])

    def has_complete(self, cluster: int) -> bool:
        """Whether one of its results is complete."""
        return any(self.complete[index] for index in self.members[cluster])

    def join(self, one: int, other: int) -> None:
        """Make two clusters one, which keeps the number of the first."""
        self._of[self.members[other]] = one
        self.members[one] += self.members.pop(other)
        self._tiles[one] |= self._tiles[other]

    def drop(self, cluster: int) -> None:
        """Forget results of an object that another cluster has."""
        del self.members[cluster]


def cluster(candidates: Candidates) -> Clusters:
    """Results of one object put together; incomplete ones that belong to another object's results are gone."""
    clusters, pairs, scores = Clusters(candidates), compared(candidates), candidates.scores
    value = pairs.iou * np.minimum(scores[pairs.first], scores[pairs.second])
    # The surest pairs first. A tile has each object once, so an object takes one result of a tile and no more.
    for pair in _falling(value, pairs.iou >= SAME):
        one, other = clusters.of(pairs.first[pair]), clusters.of(pairs.second[pair])
        if one != other and not clusters.share_a_tile(one, other):
            clusters.join(one, other)
    _join_pieces(clusters, pairs)
    return clusters


def _join_pieces(clusters: Clusters, pairs: Pairs) -> None:
    """Incomplete results that another tile's object covers where that tile sees them."""
    candidates = clusters.candidates
    for side in (0, 1):
        piece, whole = (pairs.first, pairs.second) if side == 0 else (pairs.second, pairs.first)
        strong = candidates.scores[whole] >= WEAK * candidates.scores[piece]
        wanted = (pairs.covers[:, side] >= COVERED) & _cut_towards(candidates, piece, whole) & strong
        for pair in _falling(pairs.covers[:, side] * candidates.scores[whole], wanted):
            one, other = clusters.of(whole[pair]), clusters.of(piece[pair])
            if one not in clusters.members or other not in clusters.members or one == other:
                continue
            tile = candidates.tile[whole[pair]]
            seen = any(candidates.tile[index] == tile for index in clusters.members[other])
            if seen or clusters.has_complete(other):
                continue  # that tile has found this object itself, or it is one of its own
            if not clusters.has_complete(one):
                clusters.join(one, other)
            elif not clusters.share_a_tile(one, other):  # else its own tile has seen both of them
                clusters.drop(other)


def _cut_towards(candidates: Candidates, piece: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(P,) bool: a border that cuts the one result lies inside the tile of the other."""
    windows = candidates.grid.windows()
    own, others = windows[candidates.tile[piece]], windows[candidates.tile[whole]]
    inside = (own > np.tile(others[:, :2], 2)) & (own < np.tile(others[:, 2:], 2))
    return (inside & candidates.cut[piece]).any(axis=1)


def _falling(values: np.ndarray, wanted: np.ndarray) -> list[int]:
    chosen = np.flatnonzero(wanted)
    return chosen[np.argsort(-values[chosen], kind="stable")].tolist()


def _inside(
    boxes: np.ndarray, begin: int, end: int, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the results of a tile with a part in an area, and their boxes cut to it."""
    clipped = np.concatenate((boxes[begin:end, :2].clip(low, high), boxes[begin:end, 2:].clip(low, high)), axis=1)
    there = np.flatnonzero((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    return there + begin, clipped[there]


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def _mask_overlap(
    candidates: Candidates, first: int, second: int, low: np.ndarray, high: np.ndarray
) -> tuple[int, int, int]:
    """Pixels that two masks share in an area, and those that each has in it."""
    cut = []
    for index in (first, second):
        left, top, part = candidates.mask(index)
        x0, y0 = max(left, low[0]), max(top, low[1])
        x1, y1 = min(left + part.shape[1], high[0]), min(top + part.shape[0], high[1])
        inner = part[max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)]
        cut.append((x0, y0, x1, y1, inner))
    (ax0, ay0, ax1, ay1, a), (bx0, by0, bx1, by1, b) = cut
    x0, y0, x1, y1 = max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1)
    shared = 0
    if x1 > x0 and y1 > y0:
        shared = int((a[y0 - ay0 : y1 - ay0, x0 - ax0 : x1 - ax0] & b[y0 - by0 : y1 - by0, x0 - bx0 : x1 - bx0]).sum())
    return shared, int(a.sum()), int(b.sum())


def joined(clusters: Clusters) -> tuple[Merged, np.ndarray]:
    """The object of every cluster, not sorted; and (M,) bool whether all that it was made of is incomplete."""
    candidates = clusters.candidates
    boxes, scores, chosen = [], [], []
    pieces = np.zeros(len(clusters.members), dtype=bool)
    for number, members in enumerate(clusters.members.values()):
        index = np.array(members)
        score = candidates.scores[index].max()
        index = index[candidates.scores[index] >= WEAK * score]
        complete = index[clusters.complete[index]]
        if len(complete):
            index = complete[[candidates.scores[complete].argmax()]]
        pieces[number] = not len(complete)
        chosen.append(index)
        scores.append(score)
        boxes.append((*candidates.boxes[index, :2].min(axis=0), *candidates.boxes[index, 2:].max(axis=0)))
    masks = points = None
    if candidates.masks is not None:
        masks = [united([candidates.changes(one) for one in index.tolist()]) for index in chosen]
    if candidates.keypoints is not None:
        every = candidates.keypoints
        # Of a joined pose each point is that of the tile which is surest of it.
        best = [every[index][every[index][..., 2].argmax(0), np.arange(every.shape[1])] for index in chosen]
        points = np.array(best).reshape(-1, *every.shape[1:])
    firsts = np.array([index[0] for index in chosen], dtype=np.int64)
    found = np.array(boxes).reshape(-1, 4)
    return (
        Merged(candidates.grid.size, found, np.array(scores), candidates.labels[firsts], [], masks, points),
        pieces,
    )

"""Results of tiles as one list: synthetic objects whose boxes and masks in every tile are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from mvision.errors import UserError
from mvision.inference.selection import Selection
from mvision.inference.tile_masks import changes_of, enlarged, shrunk, to_masks, united
from mvision.inference.tile_merge import Merged
from mvision.inference.tile_results import merge_regions, merge_tiles
from mvision.inference.tiles import Grid, Tiling, make_tiling
from mvision.structures import Category, Instances
from mvision.structures.masks import Masks

CLASSES = [Category(id=1, name="cell"), Category(id=2, name="seed")]
SIZE = (200, 300)
TILING = Tiling((100, 100), 0.3)
Box = tuple[int, int, int, int]


def seen(
    grid: Grid, objects: Sequence[tuple[Box, float, int]], masks: Sequence[np.ndarray] | None = None, least: int = 2
) -> list[Instances]:
    """What a perfect detector finds in every tile: the part of every object in it with ``least`` pixels a side."""
    found = []
    for number in range(len(grid)):
        left, top, right, bottom = grid.window(number)
        boxes, scores, labels, parts = [], [], [], []
        for index, ((x0, y0, x1, y1), score, label) in enumerate(objects):
            box = (max(x0, left), max(y0, top), min(x1, right), min(y1, bottom))
            part = None if masks is None else masks[index][top:bottom, left:right]
            if part is not None:
                if not part.any():
                    continue
                rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
                box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            if box[2] - box[0] < least or box[3] - box[1] < least:
                continue
            share = (box[2] - box[0]) * (box[3] - box[1]) / ((x1 - x0) * (y1 - y0))
            boxes.append((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
            scores.append(score * (0.5 + share / 2))  # cut objects have lower scores
            labels.append(label)
            parts.append(part)
        order = np.argsort(-np.array(scores), kind="stable").astype(int)
        size = (bottom - top, right - left)
        found.append(
            Instances(
                np.array(boxes, np.float32).reshape(-1, 4)[order],
                np.array(scores, np.float32)[order],
                np.array(labels, np.int64)[order],
                size,
                CLASSES,
                None if masks is None else Masks.from_array(np.array(parts, bool).reshape(-1, *size)[order]),
            )
        )
    return found


def merge(found: list[Instances], grid: Grid, whole: Instances | None = None, **more: object) -> Merged:
    return merge_tiles(grid, found, whole, **more)  # type: ignore[arg-type]


def boxes_of(merged: Merged) -> list[tuple[int, ...]]:
    return sorted(tuple(round(value) for value in box) for box in merged.boxes.tolist())


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        ((200, 300), (100, 100), 0.3),
        ((101, 99), (64, 32), 0.0),
        ((97, 131), (32, 40), 0.6),
        ((50, 300), (100, 100), 0.2),
    ],
)
def test_tiles_fill_the_picture(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> None:
    grid = Tiling(tile, overlap).grid(size)
    counts, cores = np.zeros(size, int), np.zeros(size, int)
    for number in range(len(grid)):
        left, top, right, bottom = grid.window(number)
        assert (bottom - top, right - left) == (min(tile[0], size[0]), min(tile[1], size[1]))
        counts[top:bottom, left:right] += 1
        x0, y0, x1, y1 = grid.core(number)
        assert left <= x0 < x1 <= right
        assert top <= y0 < y1 <= bottom
        cores[y0:y1, x0:x1] += 1
    assert counts.min() >= 1
    assert (cores == 1).all()
    for starts, side in ((grid.lefts, tile[1]), (grid.tops, tile[0])):
        assert all(b - a <= side - np.ceil(overlap * side) for a, b in itertools.pairwise(starts))
    windows = grid.windows()
    sharing = {
        (i, j)
        for i, j in itertools.combinations(range(len(grid)), 2)
        if (np.maximum(windows[i, :2], windows[j, :2]) < np.minimum(windows[i, 2:], windows[j, 2:])).all()
    }
    assert sorted(grid.neighbours()) == sorted(sharing)


def test_every_object_is_found_once_and_whole_wherever_it_lies() -> None:
    """Objects no larger than the overlap, at every place, the corners of four tiles among them."""
    grid = TILING.grid(SIZE)
    assert (len(grid.tops), len(grid.lefts)) == (3, 4)
    for x, y in itertools.product(range(0, 272, 7), range(0, 172, 9)):
        box = (x, y, x + 28, y + 28)
        merged = merge(seen(grid, [(box, 1.0, 0)]), grid)
        assert boxes_of(merged) == [box]
        assert merged.scores.tolist() == [1.0]


def test_objects_larger_than_a_tile_are_joined() -> None:
    grid = TILING.grid(SIZE)
    objects: list[tuple[Box, float, int]] = [((20, 40, 280, 90), 0.9, 0), ((150, 95, 190, 200), 0.8, 1)]
    merged = merge(seen(grid, objects), grid)
    assert boxes_of(merged) == sorted(box for box, _, _ in objects)
    assert sorted(merged.labels.tolist()) == [0, 1]


def test_masks_are_joined_and_not_cut() -> None:
    """A ring around all of the picture, a bar across it, and a disc: two are larger than any tile."""
    grid = TILING.grid(SIZE)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    radius = np.hypot(x - 150, 1.4 * (y - 100))
    masks = [(radius > 110) & (radius < 139), abs(x - y - 60) < 9, np.hypot(x - 150, y - 100) < 0]
    masks[2] = (np.hypot(x - 220, y - 80) < 14) & ~masks[0] & ~masks[1]
    objects = []
    for mask, score in zip(masks, (0.9, 0.8, 0.7)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        objects.append(((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), score, 0))
    merged = merge(seen(grid, objects, masks, least=1), grid)
    found = merged.instances()
    assert len(found) == 3
    assert found.masks is not None
    expected = {mask.tobytes() for mask in masks}
    assert {mask.tobytes() for mask in found.masks} == expected
    assert boxes_of(merged) == sorted(box for box, _, _ in objects)
    small = merged.reduced((100, 150))
    assert small.masks is not None
    assert sorted(small.masks.areas.tolist()) == pytest.approx(sorted(m.sum() / 4 for m in masks), rel=0.08)
    np.testing.assert_allclose(small.boxes, found.boxes / 2)


def test_neighbours_stay_apart() -> None:
    """Objects side by side at a border, also of other sizes, and a small one in front of a large one."""
    grid = TILING.grid(SIZE)
    beside: list[tuple[Box, float, int]] = [
        ((68, 20, 84, 36), 0.9, 0),
        ((84, 20, 100, 36), 0.9, 0),
        ((100, 20, 116, 36), 0.9, 0),
        ((68, 36, 130, 60), 0.9, 0),
        ((20, 120, 280, 190), 0.9, 0),
        ((88, 130, 102, 150), 0.9, 0),
    ]
    merged = merge(seen(grid, beside), grid)
    assert boxes_of(merged) == sorted(box for box, _, _ in beside)


def test_classes_stay_apart() -> None:
    grid = TILING.grid(SIZE)
    box: Box = (80, 20, 110, 50)
    merged = merge(seen(grid, [(box, 0.9, 0), (box, 0.8, 1)]), grid)
    assert boxes_of(merged) == [box, box]
    assert merge(seen(grid, [(box, 0.9, 0), (box, 0.8, 1)]), grid, chosen=Selection(0.5, nms=0.7)).labels.tolist() == [
        0
    ]


def one(box: Sequence[float], score: float, tile: int, grid: Grid) -> list[Instances]:
    """Results of all tiles with a single object in one of them, given in pixels of the picture."""
    left, top, right, bottom = grid.window(tile)
    found = seen(grid, [])
    corner = np.array((left, top, left, top), np.float32)
    values = (np.array([box], np.float32) - corner, np.array([score], np.float32), np.array([0]))
    found[tile] = Instances(*values, (bottom - top, right - left), CLASSES)
    return found


def test_an_incomplete_result_never_replaces_a_complete_one() -> None:
    """Not even with a higher score, or as a strip whose outline differs from the object's there."""
    grid = Grid((100, 170), (100, 100), [0], [0, 70])
    complete = one((60, 20, 95, 60), 0.6, 0, grid)[0]
    for box in ((70, 22, 94, 58), (70, 30, 74, 50)):
        merged = merge([complete, one(box, 0.9, 1, grid)[1]], grid)
        assert boxes_of(merged) == [(60, 20, 95, 60)]
    # What is not cut, or lies elsewhere, is an object of its own.
    for box in ((75, 30, 85, 40), (70, 61, 80, 90)):
        assert len(merge([complete, one(box, 0.9, 1, grid)[1]], grid).scores) == 2


def test_weak_results_do_not_shape_an_object() -> None:
    """With a threshold of 0 there is always some result of a low score near a border."""
    grid = Grid((100, 170), (100, 100), [0], [0, 70])
    strong = one((40, 20, 100, 60), 0.9, 0, grid)[0]
    weak = one((70, 20, 140, 70), 0.05, 1, grid)[1]
    assert boxes_of(merge([strong, weak], grid)) == [(40, 20, 100, 60)]
    assert boxes_of(merge([strong, one((70, 20, 140, 70), 0.8, 1, grid)[1]], grid)) == [(40, 20, 140, 70)]


def test_a_tile_has_each_object_once() -> None:
    """Two objects close to each other, both of which another tile's result is like."""
    grid = Grid((100, 170), (100, 100), [0], [0, 70])
    left = one((74, 20, 94, 60), 0.9, 0, grid)[0]
    left.boxes = np.concatenate((left.boxes, left.boxes + 5)).astype(np.float32)
    left.scores, left.labels = np.array([0.9, 0.8], np.float32), np.array([0, 0])
    merged = merge([left, one((76, 21, 96, 61), 0.7, 1, grid)[1]], grid)
    assert boxes_of(merged) == [(74, 20, 94, 60), (79, 25, 99, 65)]


def test_poses_are_complete_and_of_the_surest_tile() -> None:
    grid = Grid((100, 170), (100, 100), [0], [0, 70])
    left, right = one((60, 20, 100, 60), 0.8, 0, grid)[0], one((70, 20, 110, 60), 0.9, 1, grid)[1]
    left.keypoints = np.array([[[62, 30, 0.9], [99, 40, 0.2]]], np.float32)
    right.keypoints = np.array([[[1, 30, 0.3], [35, 40, 0.7]]], np.float32)
    merged = merge([left, right], grid)
    assert boxes_of(merged) == [(60, 20, 110, 60)]
    assert merged.keypoints is not None
    np.testing.assert_allclose(merged.keypoints[0], [[62, 30, 0.9], [105, 40, 0.7]], rtol=1e-6)
    right.boxes[0, 0] = 5  # complete, so its pose is taken as it is
    merged = merge([left, right], grid)
    assert merged.keypoints is not None
    np.testing.assert_allclose(merged.keypoints[0], [[71, 30, 0.3], [105, 40, 0.7]], rtol=1e-6)


def whole_picture(
    boxes: Sequence[Sequence[float]], scores: Sequence[float], masks: np.ndarray | None = None
) -> Instances:
    """Results on the whole picture at half of its size."""
    corners = np.array(boxes, np.float32).reshape(-1, 4) / 2
    kept = None if masks is None else Masks.from_array(masks)
    return Instances(corners, np.array(scores, np.float32), np.zeros(len(boxes), int), (100, 150), CLASSES, kept)


def test_the_whole_picture_adds_what_no_tile_shows() -> None:
    grid = TILING.grid(SIZE)
    small: tuple[Box, float, int] = ((80, 20, 100, 40), 0.6, 0)
    tiles = seen(grid, [small])
    large = (20, 60, 280, 190)
    merged = merge(tiles, grid, whole_picture([large, (200, 20, 225, 40), (5, 5, 95, 95)], [0.7, 0.9, 0.9]))
    assert boxes_of(merged) == sorted([large, small[0]])
    # The tiles have found it too: once, with their finer outline.
    merged = merge(seen(grid, [small, (large, 0.5, 0)]), grid, whole_picture([(24, 64, 276, 186)], [0.7]))
    assert boxes_of(merged) == sorted([large, small[0]])
    assert merged.scores.max() == pytest.approx(0.7)
    # Pieces that the tiles could not join are parts of it.
    merged = merge(one((30, 62, 100, 100), 0.9, 0, grid), grid, whole_picture([large], [0.7]))
    assert boxes_of(merged) == [large]
    merged = merge(one((30, 62, 100, 100), 0.9, 0, grid), grid, whole_picture([large], [0.1]))
    assert len(merged.scores) == 2


def test_masks_of_the_whole_picture_are_enlarged() -> None:
    grid = TILING.grid(SIZE)
    mask = np.zeros((1, 100, 150), bool)
    mask[0, 30:95, 10:140] = True
    empty = np.zeros((0, *SIZE), bool)
    merged = merge(seen(grid, [], list(empty)), grid, whole_picture([(20, 60, 280, 190)], [0.7], mask))
    (found,) = merged.instances().masks  # type: ignore[misc]
    assert np.array_equal(found, mask[0].repeat(2, 0).repeat(2, 1))


def test_regions_take_every_pixel_from_the_nearest_tile() -> None:
    grid = TILING.grid(SIZE)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, SIZE)
    found = []
    for number in range(len(grid)):
        left, top, right, bottom = grid.window(number)
        seen_here = np.full((100, 100), number % 2)  # outside of its core a tile is wrong
        x0, y0, x1, y1 = grid.core(number)
        seen_here[y0 - top : y1 - top, x0 - left : x1 - left] = truth[y0:y1, x0:x1]
        masks = np.stack([seen_here == label for label in (0, 1)])
        boxes, scores = np.tile(np.array([0, 0, 100, 100], np.float32), (2, 1)), np.array([0.9, 0.5], np.float32)
        found.append(Instances(boxes, scores, np.array([0, 1]), (100, 100), CLASSES, Masks.from_array(masks)))
    merged = merge_regions(grid, found)
    assert merged.labels.tolist() == [0, 1]
    np.testing.assert_allclose(merged.scores, [0.9, 0.5], rtol=1e-6)
    masks_of = np.asarray(merged.instances().masks)
    assert np.array_equal(masks_of[0], truth == 0)
    assert np.array_equal(masks_of[1], truth == 1)
    assert boxes_of(merged) == [(0, 0, 300, 200)] * 2


def test_nothing_found() -> None:
    grid = TILING.grid(SIZE)
    for masks in (None, []):
        merged = merge(seen(grid, [], masks), grid)
        assert len(merged.instances()) == 0
        assert len(merged.reduced((50, 75))) == 0


def test_run_lengths_of_parts() -> None:
    """Placed, united, shrunk and enlarged masks against arrays."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(5, 40, 2))
        full, several = np.zeros((height, width), bool), []
        for _ in range(3):
            h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            part = rng.random((h, w)) > 0.4
            full[top : top + h, left : left + w] |= part
            several.append(changes_of(part, left, top, height))
        mask = united(several)
        assert (np.diff(mask) > 0).all()
        assert np.array_equal(to_masks([mask], (height, width))[0], full)
        small = (max(1, height // 3), max(1, width // 2))
        rows, columns = (((np.arange(few) + 0.5) * many / few).astype(int) for few, many in zip(small, full.shape))
        assert np.array_equal(shrunk(mask, (height, width), small), full[np.ix_(rows, columns)])
        large = (3 * height + 1, 4 * width + 2)
        rows, columns = (((np.arange(many) + 0.5) * few / many).astype(int) for few, many in zip(full.shape, large))
        found = to_masks([united([enlarged(full, (height, width), large)])], large)[0]
        assert np.array_equal(found, full[np.ix_(rows, columns)])


def test_bad_settings() -> None:
    for tile, overlap, message in (
        (20, None, "tile 20x20: sides of 32 to 16384"),
        ((64, 99999), None, "tile 64x99999"),
        (640, 0.95, r"overlap 0\.95"),
        (None, 0.2, "--overlap: has no meaning without --tile"),
        ((64, 64, 64), None, "a number of pixels"),
        (64.5, None, "tile 64.5: a number of pixels"),
        ("64", None, "tile '64': a number of pixels"),
    ):
        with pytest.raises(UserError, match=message):
            make_tiling(tile, overlap)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--no-whole: has no meaning"):
        make_tiling(None, None, whole=False)
    assert make_tiling(0) is make_tiling(np.int64(0)) is None  # type: ignore[arg-type]
    assert make_tiling(np.int64(64)) == make_tiling([64, np.uint8(64)]) == Tiling((64, 64), 0.2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="would be 1,[0-9,]+ tiles"):
        Tiling((32, 32), 0.2).grid((30_000, 30_000))
    with pytest.raises(UserError, match="masks are written for up to"):
        to_masks([], (70_000, 70_000))

"""A mosaic of whole images: where pixels and labels of every kind lie after it is turned, shifted and scaled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mvision.data.augment.geometry import FILL, draw_masks, tighten
from mvision.data.augment.mosaic import ANGLE, SCALES, SHIFT, Turn, mosaic_of_whole
from mvision.data.formats.labels import Labels, PictureLabels
from mvision.structures.masks import encode_mask

SIZE = (200, 300)
STRAIGHT = Turn(1.0, 0.0, (0.0, 0.0))
OBLIQUE = Turn(1.2, math.radians(9), (0.05, -0.08))


def labels_of(boxes: Any, outlines: Any = None, keypoints: Any = None, crowd: bool = False) -> PictureLabels:
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    packed = None
    if outlines is not None:
        packed = np.empty(count, dtype=object)
        packed[:] = outlines
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    points = None if keypoints is None else np.asarray(keypoints, dtype=np.float64)
    return Labels(boxes, np.arange(count), areas, np.full(count, crowd), points, packed).picture(slice(None))


EMPTY = labels_of([])
GREY = np.full((100, 150, 3), 60, np.uint8)


def mosaic(image: np.ndarray, labels: PictureLabels, turn: Turn, empty: PictureLabels = EMPTY) -> Any:
    """The image in the top left quarter, and three without an object."""
    pictures = [(image, labels), *[(GREY, empty)] * 3]
    return mosaic_of_whole(pictures, turn, SIZE, SIZE[1] / SIZE[0])


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[np.ndarray]:
    return [np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])]


def test_without_a_turn_every_image_fills_its_quarter() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    pictures = [(np.full((50, 75, 3), colour, np.uint8), labels_of([(0.2, 0.2, 0.6, 0.8)])) for colour in colours]
    image, labels = mosaic_of_whole(pictures, STRAIGHT, SIZE, 1.5)
    for colour, (y, x) in zip(colours, ((0, 0), (0, 150), (100, 0), (100, 150))):
        assert (image[y : y + 100, x : x + 150] == colour).all()
    first = np.array((0.1, 0.1, 0.3, 0.4))
    shifts = [(0, 0, 0, 0), (0.5, 0, 0.5, 0), (0, 0.5, 0, 0.5), (0.5, 0.5, 0.5, 0.5)]
    np.testing.assert_allclose(labels.boxes, [first + shift for shift in shifts], atol=1e-12)
    np.testing.assert_allclose(labels.areas, 0.24 / 4)
    assert not labels.cut.any()


def test_an_angle_is_an_angle_before_the_picture_is_stretched() -> None:
    """Of two squares of a 3:1 panorama side by side, the second lies 9 degrees below the first."""
    turn = Turn(1.0, math.radians(9), (0.0, 0.0))
    matrix = turn.matrix(SIZE, aspect=3.0)
    across = matrix[:, :2] @ (1.0, 0.0) * (3.0 / SIZE[1], 1.0 / SIZE[0])
    down = matrix[:, :2] @ (0.0, 1.0) * (3.0 / SIZE[1], 1.0 / SIZE[0])
    assert math.atan2(across[1], across[0]) == pytest.approx(math.radians(9))
    assert across @ down == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(matrix @ (150, 100, 1), (150, 100))


def test_pixels_are_moved_exactly() -> None:
    """A mosaic half as large, shifted by whole pixels, on grey, without any interpolation."""
    image = np.random.default_rng(0).integers(0, 255, (50, 75, 3), dtype=np.uint8)
    result, _ = mosaic(image, EMPTY, Turn(0.5, 0.0, (0.1, -0.1)))
    x, y = 75 + 30, 50 - 20
    np.testing.assert_array_equal(result[y : y + 50, x : x + 75], image)
    assert (result[y - 1, :] == FILL).all()
    assert (result[:, x - 1] == FILL).all()


@pytest.mark.parametrize("turn", [OBLIQUE, Turn(0.5, -ANGLE, (-0.1, 0.1)), Turn(1.5, ANGLE, (0.1, 0.1))], ids=str)
@pytest.mark.parametrize("kind", ["polygon", "run lengths", "over the border"])
def test_masks_and_boxes_lie_on_the_pixels(turn: Turn, kind: str) -> None:
    """An object of a bright colour on grey; one outline of three reaches over the border of its image."""
    x0, x1 = (0.5, 1.0) if kind == "over the border" else (0.3, 0.9)
    image = GREY.copy()
    image[40:90, round(150 * x0) : round(150 * x1)] = (0, 250, 0)
    drawn = np.zeros((100, 150), bool)
    drawn[40:90, round(150 * x0) : round(150 * x1)] = True
    outline: Any = encode_mask(drawn) if kind == "run lengths" else rectangle(x0, 0.4, x1 + 0.2 * (x1 == 1), 0.9)
    labels = labels_of([(x0, 0.4, x1, 0.9)], [outline])
    result, moved = mosaic(image, labels, turn, labels_of([], []))
    moved = tighten(moved, SIZE)
    lit = result[..., 1] > 155
    assert lit.sum() > 500
    (mask,) = draw_masks(moved, SIZE).astype(bool)
    assert (mask & lit).sum() / (mask | lit).sum() > 0.95
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    np.testing.assert_allclose(moved.boxes[0] * (300, 200, 300, 200), extent, atol=1.6)
    assert moved.areas[0] == pytest.approx(lit.mean(), rel=0.06)


def test_a_box_without_outline_is_that_of_the_ellipse_in_it() -> None:
    turn = Turn(1.0, math.radians(10), (0.0, 0.0))
    _, round_one = mosaic(GREY, labels_of([(0.4, 0.35, 0.6, 0.65)]), turn)  # 30 x 30 pixels of 150 x 100
    sides = (round_one.boxes[0, 2:] - round_one.boxes[0, :2]) * (300, 200)
    np.testing.assert_allclose(sides, (30, 30))
    _, long = mosaic(GREY, labels_of([(0.1, 0.45, 0.9, 0.55)]), turn)  # 120 x 10
    sides = (long.boxes[0, 2:] - long.boxes[0, :2]) * (300, 200)
    cos, sin = math.cos(turn.angle), math.sin(turn.angle)
    np.testing.assert_allclose(sides, (math.hypot(120 * cos, 10 * sin), math.hypot(120 * sin, 10 * cos)))


def test_keypoints_outside_the_picture_and_unlabelled_ones_are_zero() -> None:
    turn = Turn(1.5, 0.0, (0.0, 0.0))  # a sixth of each side lies outside, a third of the quarter's
    points = [[(0.5, 0.5, 2), (0.1, 0.5, 2), (0.9, 0.9, 1), (0.7, 0.7, 0), (0, 0, 0)]]
    labels = labels_of([(0.1, 0.1, 0.9, 0.9)], keypoints=points)
    _, moved = mosaic(GREY, labels, turn, labels_of([], keypoints=np.zeros((0, 5, 3))))
    assert moved.keypoints is not None
    inside = [(0.75 * 0.5 - 0.25, 0.75 * 0.5 - 0.25, 2), (0, 0, 0), (0.75 * 0.9 - 0.25, 0.75 * 0.9 - 0.25, 1)]
    np.testing.assert_allclose(moved.keypoints[0], [*inside, (0, 0, 0), (0, 0, 0)], atol=1e-12)


def test_what_is_cut_to_nearly_nothing_is_no_object_any_more() -> None:
    turn = Turn(1.5, 0.0, (0.0, 0.0))  # the first third of the quarter lies outside
    boxes = [(0.0, 0.5, 0.3, 0.6), (0.0, 0.5, 0.35, 0.6), (0.2, 0.5, 0.6, 0.6)]
    labels = replace(labels_of(boxes), crowd=np.array([False, False, True]))
    _, moved = mosaic(GREY, labels, turn)
    assert moved.labels.tolist() == [2]
    assert moved.crowd.tolist() == [True]
    assert moved.cut.tolist() == [True]
    assert moved.boxes[0, 0] == 0


def test_turns_are_drawn_from_the_published_ranges() -> None:
    rng = np.random.default_rng(0)
    turns = [Turn.draw(rng) for _ in range(2000)]
    for values, low, high in (
        ([turn.scale for turn in turns], *SCALES),
        ([turn.angle for turn in turns], -math.radians(10), math.radians(10)),
        ([turn.shift[0] for turn in turns], -SHIFT, SHIFT),
        ([turn.shift[1] for turn in turns], -SHIFT, SHIFT),
    ):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))

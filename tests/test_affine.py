"""Single images turned and scaled: pixels, boxes, masks and keypoints go together."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest

from mvision.config import AugmentConfig
from mvision.data.augment.affine import rotation, turn_boxes, turn_placed, turned_view, warp
from mvision.data.augment.geometry import FILL, Rect, draw_masks, paint, tighten
from mvision.data.augment.mosaic import ANGLE, Turn, mosaic_of_whole
from mvision.data.augment.transforms import TrainTransform, rescale
from mvision.data.formats.labels import WHOLE, PictureLabels
from mvision.structures.masks import encode_mask
from tests.test_augment_mixing import COLOURS, Pictures, colour_at
from tests.test_mosaic import labels_of, rectangle
from tests.test_transforms import OFF, SWAP, Scene

QUARTER = math.pi / 2
STRAIGHT = np.zeros(2)


def turned(
    image: np.ndarray, labels: PictureLabels, angle: float, size: tuple[int, int], view: Rect = WHOLE
) -> tuple[np.ndarray, PictureLabels]:
    aspect = image.shape[1] * (view[2] - view[0]) / (image.shape[0] * (view[3] - view[1]))
    found = turned_view(view, angle, aspect, (image.shape[0], image.shape[1]), size)
    assert found is not None
    placement, matrix = found
    raster = paint(image, placement, np.empty((*placement.canvas_size, 3), np.uint8))
    return warp(raster, matrix, size, FILL), tighten(turn_placed(labels, placement, matrix, size), size)


def extent_of(mask: np.ndarray) -> np.ndarray:
    """xyxy in fractions of the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)) / (width, height, width, height)


@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_exact(quarters: int, kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    drawn = np.zeros((80, 80), np.uint8)
    drawn[10:30, 20:70] = 1
    outline: Any = encode_mask(drawn) if kind == "run lengths" else rectangle(0.25, 0.125, 0.875, 0.375)
    labels = labels_of([(0.25, 0.125, 0.875, 0.375)], [outline], [[(0.25, 0.375, 2), (0.875, 0.2, 1), (0.0, 0.0, 0)]])
    result, moved = turned(image, labels, quarters * QUARTER, (80, 80))
    np.testing.assert_array_equal(result, np.rot90(image, -quarters))
    expected = np.rot90(drawn, -quarters)
    np.testing.assert_array_equal(draw_masks(moved, (80, 80))[0], expected)
    np.testing.assert_allclose(moved.boxes[0], extent_of(expected), atol=1e-9)
    assert moved.areas[0] == pytest.approx(drawn.mean())
    points = np.array([(0.25, 0.375), (0.875, 0.2)])
    for _ in range(quarters):
        points = np.stack((1 - points[:, 1], points[:, 0]), axis=1)
    np.testing.assert_allclose(moved.keypoints[0], [(*points[0], 2), (*points[1], 1), (0, 0, 0)], atol=1e-9)


@pytest.mark.parametrize("view", [WHOLE, (0.2, 0.1, 0.9, 0.8), (-0.3, -0.2, 1.1, 1.2)], ids=str)
@pytest.mark.parametrize("angle", [-170, -40, 13, 75])
@pytest.mark.parametrize("kind", ["polygon", "run lengths", "over the border"])
def test_labels_lie_on_the_pixels(kind: str, angle: float, view: Rect) -> None:
    """A green part of a grey panorama, with a white keypoint; the picture is not as wide as the image."""
    x1 = 1.0 if kind == "over the border" else 0.7
    image = np.full((200, 300, 3), 60, np.uint8)
    image[80:140, 120 : round(300 * x1)] = (0, 250, 0)
    drawn = (image[..., 1] == 250).astype(np.uint8)
    cv2.circle(image, (150, 110), 5, (255, 255, 255), -1)
    outline: Any = encode_mask(drawn) if kind == "run lengths" else rectangle(0.4, 0.4, x1 + 0.2 * (x1 == 1), 0.7)
    labels = labels_of([(0.4, 0.4, x1, 0.7)], [outline], [[(150.5 / 300, 110.5 / 200, 2)]])
    result, moved = turned(image, labels, math.radians(angle), (160, 176), view)
    lit = result[..., 1] > 155
    (mask,) = draw_masks(moved, (160, 176)).astype(bool)
    assert (mask & lit).sum() / (mask | lit).sum() > 0.95
    np.testing.assert_allclose(moved.boxes[0], extent_of(lit), atol=0.011)
    assert moved.areas[0] == pytest.approx(lit.mean(), rel=0.06)
    rows, columns = np.nonzero(result[..., 0] > 128)
    np.testing.assert_allclose(
        moved.keypoints[0, 0, :2] * (176, 160), (columns.mean() + 0.5, rows.mean() + 0.5), atol=0.5
    )


def test_a_turned_crop_shows_what_is_beside_it_and_grey_beyond_the_image() -> None:
    image = np.full((100, 100, 3), 60, np.uint8)
    result, _ = turned(image, labels_of([]), math.radians(45), (64, 64), (0.3, 0.3, 0.7, 0.7))
    assert (result == 60).all()
    result, _ = turned(image, labels_of([]), math.radians(45), (64, 64))
    assert (result[0, 0] == FILL).all()
    assert (result[32, 32] == 60).all()
    assert turned_view((1.5, 0, 2.5, 1), 0.1, 1.0, (100, 100), (64, 64)) is None


def test_an_angle_is_an_angle_before_the_picture_is_stretched() -> None:
    """A square of a 2:1 image, a rectangle in the square picture, is after a quarter turn as it was."""
    matrix = rotation(QUARTER, (100, 100), aspect=2.0)
    np.testing.assert_allclose(matrix @ (10, 0), (0, 20), atol=1e-12)
    np.testing.assert_allclose(matrix @ (0, 20), (-10, 0), atol=1e-12)
    _, moved = turned(np.zeros((100, 200, 3), np.uint8), labels_of([(0.45, 0.4, 0.55, 0.6)]), QUARTER, (100, 100))
    np.testing.assert_allclose(moved.boxes, [(0.45, 0.4, 0.55, 0.6)], atol=1e-9)


def test_what_leaves_the_picture_is_not_labelled() -> None:
    """The corners are lost at 45 degrees; the object on the left edge keeps its middle."""
    boxes = [(0, 0, 0.1, 0.1), (0.3, 0.3, 0.7, 0.7), (0.0, 0.3, 0.1, 0.7)]
    points = [[(0.05, 0.05, 2), (0.1, 0.1, 2)], [(0.5, 0.5, 1), (0.02, 0.02, 2)], [(0.05, 0.5, 2), (0.05, 0.31, 2)]]
    _, moved = turned(np.zeros((100, 100, 3), np.uint8), labels_of(boxes, None, points), math.radians(45), (100, 100))
    assert moved.labels.tolist() == [1, 2]
    assert moved.keypoints[:, :, 2].tolist() == [[1, 0], [2, 2]]
    assert (moved.keypoints[0, 1] == 0).all()
    assert (moved.boxes >= 0).all()
    assert (moved.boxes <= 1).all()


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_boxes_of_quarter_turns_are_the_boxes(angle: float) -> None:
    turn = rotation(math.radians(angle), (100, 100), 1.0)
    boxes = np.array([(0.1, 0.2, 0.5, 0.9)])
    corners = boxes[0][[[0, 1], [2, 3]]] @ turn.T
    expected = (*corners.min(axis=0), *corners.max(axis=0))
    keypoints = np.array([[(0.2, 0.3, 2), (0.4, 0.8, 1), (0.0, 0.0, 0)]])
    for points in (None, keypoints, keypoints[:, :0], keypoints * (1, 1, 0)):
        np.testing.assert_allclose(turn_boxes(boxes, turn, STRAIGHT, points)[0], expected, atol=1e-12)


def test_keypoints_tell_how_an_object_lies_in_its_box() -> None:
    """A long object across its box, 100 x 10 in a box of 78 x 78, becomes 100 x 10; the ellipse alone has 78 x 78."""
    turn = rotation(math.radians(45), (100, 100), 1.0)
    half = 45 * math.sqrt(0.5)
    boxes = np.array([(-39.0, -39, 39, 39)])
    diagonal = np.array([[(-half, half, 2), (half, -half, 2)]])  # its ends, turned to (+-45, 0)
    guess = turn_boxes(boxes, turn, STRAIGHT)[0]
    np.testing.assert_allclose(guess[2:] - guess[:2], (78, 78), atol=0.1)
    better = turn_boxes(boxes, turn, STRAIGHT, diagonal)[0]
    np.testing.assert_allclose(better[2:] - better[:2], (104.4, 14.4), atol=0.1)

    labels = labels_of((boxes + 100) / 200, None, (diagonal + np.array((100, 100, 0))) / (200, 200, 1))
    _, single = turned(np.zeros((200, 200, 3), np.uint8), labels, math.radians(45), (200, 200))
    np.testing.assert_allclose(single.boxes[0] * 200 - 100, better, atol=1e-6)
    pictures = [(np.zeros((200, 200, 3), np.uint8), labels)] * 4
    for around_points, expected in ((False, guess), (True, better)):
        turn = Turn(1.0, math.radians(45), (0.0, 0.0))
        _, joined = mosaic_of_whole(pictures, turn, (400, 400), 1.0, around_points)
        np.testing.assert_allclose(joined.boxes[0, 2:] - joined.boxes[0, :2], (expected[2:] - expected[:2]) / 400)


def test_estimated_boxes_hold_the_keypoints_and_lie_within_the_turned_corners() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(-1, 0, (200, 2))
    boxes = np.concatenate((low, low + rng.uniform(0.1, 1, (200, 2))), axis=1)
    inside = low[:, None] + rng.random((200, 4, 2)) * (boxes[:, None, 2:] - low[:, None])
    keypoints = np.concatenate((inside, rng.integers(0, 3, (200, 4, 1))), axis=-1)
    turn, shift = rotation(0.7, (100, 130), 1.2), np.array((0.3, -0.2))
    estimated = turn_boxes(boxes, turn, shift, keypoints)
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]] @ turn.T + shift
    assert (estimated[:, :2] >= corners.min(axis=1) - 1e-9).all()
    assert (estimated[:, 2:] <= corners.max(axis=1) + 1e-9).all()
    moved = inside @ turn.T + shift
    hidden = keypoints[..., 2:] == 0
    assert ((moved >= estimated[:, None, :2] - 1e-9) | hidden).all()
    assert ((moved <= estimated[:, None, 2:] + 1e-9) | hidden).all()


@pytest.mark.parametrize("change", [0.3, 0.9])
def test_scaled_views_lie_anywhere_around_the_image_or_in_it(change: float) -> None:
    rng = np.random.default_rng(0)
    views = np.array([rescale(WHOLE, change, rng) for _ in range(300)])
    sides = views[:, 2:] - views[:, :2]
    np.testing.assert_allclose(sides[:, 0], sides[:, 1])
    room = np.abs(1 - sides[:, 0])
    places = np.abs(views[:, :2])[room > 0.1] / room[room > 0.1, None]
    assert places.min() < 0.05
    assert places.max() > 0.95
    assert 1 / (1 + change) <= sides.min() < 1 / (1 + change) + 0.05
    assert sides.max() <= 1 / (1 - change)
    smaller = sides[:, 0] < 1
    assert (views[smaller, :2] >= 0).all()
    assert (views[smaller, 2:] <= 1).all()
    assert (views[~smaller, :2] <= 0).all()
    assert (views[~smaller, 2:] >= 1).all()
    part = np.array([rescale((0.2, 0.4, 0.6, 0.8), change, rng) for _ in range(50)])
    np.testing.assert_allclose((part[:, 2] - part[:, 0]), (part[:, 3] - part[:, 1]))


@pytest.mark.parametrize("mosaic", [{}, {"mosaic": 1.0}, {"mosaic": 1.0, "mosaic_form": "whole"}], ids=str)
@pytest.mark.parametrize(
    "augment", [{"rotate": 180.0}, {"scale": 0.4}, {"rotate": 25.0, "scale": 0.3, "crop": 1.0}], ids=str
)
def test_samples_keep_their_labels(augment: dict[str, Any], mosaic: dict[str, Any]) -> None:
    transform = TrainTransform(AugmentConfig.model_validate({**OFF, "flip": 0.5, **augment, **mosaic}))
    size, objects = (192, 192), 0
    for seed in range(25):
        image, labels = transform(Pictures(), seed % 5, size, np.random.default_rng(seed))
        for mask, box, label, points in zip(draw_masks(labels, size), labels.boxes, labels.labels, labels.keypoints):
            lit = np.abs(image.astype(int) - COLOURS[label]).max(axis=-1) < 100
            assert (mask.astype(bool) & lit).sum() > 0.9 * mask.sum()
            np.testing.assert_allclose(box, extent_of(mask), atol=0.012)
            if points[0, 2]:
                assert np.abs(np.array(colour_at(image, *points[0, :2])) - COLOURS[label]).max() < 100
            objects += 1
    assert objects > 20


@pytest.mark.parametrize("fields", [(), ("masks",), ("keypoints",), ("masks", "keypoints")], ids=str)
def test_every_kind_of_labels_can_be_turned(fields: tuple[str, ...]) -> None:
    transform = TrainTransform(AugmentConfig.model_validate({**OFF, "rotate": 90.0, "scale": 0.2}), SWAP)
    for seed in range(5):
        image, labels = transform(Scene(fields), 0, (192, 256), np.random.default_rng(seed))
        assert image.shape == (192, 256, 3)
        assert (labels.outlines is None) == ("masks" not in fields)
        assert (labels.keypoints is None) == ("keypoints" not in fields)


def test_turns_are_drawn_up_to_the_angle() -> None:
    """A line from the middle to the right tells the angle."""

    class Line(Pictures):
        def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
            picture = np.zeros((200, 200, 3), np.uint8)
            picture[98:102, 100:160] = 255
            return picture

    transform = TrainTransform(AugmentConfig.model_validate({**OFF, "rotate": 60.0}))
    angles = []
    for seed in range(60):
        image, _ = transform(Line(), 0, (200, 200), np.random.default_rng(seed))
        rows, columns = np.nonzero((image > 200).all(axis=-1))
        angles.append(math.degrees(math.atan2(rows.mean() - 99.5, columns.mean() - 99.5)))
    assert -61 < min(angles) < -50
    assert 50 < max(angles) < 61
    turns = [Turn.draw(np.random.default_rng(seed), math.radians(120)).angle for seed in range(60)]
    assert ANGLE < max(turns) <= math.radians(120)


@pytest.mark.parametrize("angle", [0.0, 40.0])
def test_every_tile_of_a_filled_mosaic_is_turned(angle: float) -> None:
    """Of pictures with a slope of brightness from top to bottom, every row of a tile is even, unless it is turned."""

    class Slopes(Pictures):
        def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
            return np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3))

    transform = TrainTransform(AugmentConfig.model_validate({**OFF, "mosaic": 1.0, "rotate": angle}))
    uneven = 0
    for seed in range(10):
        image, _ = transform(Slopes(), 0, (192, 192), np.random.default_rng(seed))
        for corner in (image[4:50, 4:50], image[4:50, -50:-4], image[-50:-4, 4:50], image[-50:-4, -50:-4]):
            uneven += corner.astype(int).std(axis=1).max() > 1
    assert uneven == 0 if angle == 0 else uneven > 35


def test_masks_of_small_objects_are_turned_in_small_parts() -> None:
    """Run lengths of a hundred objects must not cost a hundred pictures."""
    drawn = np.zeros((400, 400), np.uint8)
    drawn[100:120, 200:230] = 1
    labels = labels_of([(0.5, 0.25, 0.575, 0.3)], [encode_mask(drawn)])
    _, moved = turned(np.zeros((400, 400, 3), np.uint8), labels, 0.5, (400, 400))
    height, width = moved.outlines[0]["size"]
    assert height < 50
    assert width < 50


def test_present_settings_draw_the_same_samples() -> None:
    """A run of today's settings is the same picture by picture, though there are more settings now."""
    found = []
    for augment in ({}, {"mosaic": 0.7, "mixup": 0.5}, {"mosaic": 0.7, "mosaic_form": "whole", "mixup": 0.5}):
        transform = TrainTransform(AugmentConfig.model_validate({**augment, "photometric": 0.0}), SWAP)
        samples = [transform(Scene(), 0, (96, 128), np.random.default_rng(seed)) for seed in range(10)]
        found.append([sum(float(labels.boxes.sum()) for _, labels in samples), sum(len(s[1]) for s in samples)])
    np.testing.assert_allclose(found, EXPECTED, rtol=1e-6)


# Of the version before these settings: the sum of all coordinates of boxes, and the number of objects.
EXPECTED = [[55.192452360165596, 28], [237.95019772983207, 119], [223.0289001801208, 112]]

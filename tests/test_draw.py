"""Pictures: what is drawn where, and that labels stay apart and inside."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mvision.drawing.draw import LEFT, PALETTE, RIGHT, class_colour, draw_instances, grid, side_by_side
from mvision.drawing.labels import LabelPainter, text_bitmap
from mvision.structures import Category, Instances

CATEGORIES = [Category(id=1, name="cat"), Category(id=2, name="dog")]
GREY = np.full((200, 300, 3), 128, np.uint8)


def boxes_on(size: tuple[int, int], count: int, seed: int = 0) -> Instances:
    rng = np.random.default_rng(seed)
    height, width = size
    corner = rng.uniform(0, 0.8, (count, 2)) * [width, height]
    far = np.minimum(corner + rng.uniform(0.05, 0.3, (count, 2)) * [width, height], [width, height])
    return Instances(
        boxes=np.concatenate((corner, far), axis=1).astype(np.float32),
        scores=np.sort(rng.uniform(0.3, 1, count))[::-1].astype(np.float32),
        labels=rng.integers(0, 2, count),
        size=size,
        categories=CATEGORIES,
    )


def one(box: list[float], **fields) -> Instances:
    values = {"categories": CATEGORIES, "labels": np.array([0]), "scores": np.array([0.9], np.float32), **fields}
    return Instances(boxes=np.array([box], np.float32), size=(200, 300), **values)


def test_a_box_is_drawn_on_a_copy() -> None:
    image = GREY.copy()
    drawn = draw_instances(image, one([50, 60, 150, 120]))
    assert np.array_equal(image, GREY)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    for x, y in ((50, 90), (150, 90), (100, 120)):
        assert tuple(drawn[y, x]) == class_colour(0)
    assert (drawn[70:110, 60:140] == 128).all()  # nothing inside
    assert (drawn[130:] == 128).all()
    assert not np.array_equal(drawn[40:58, 50:120], GREY[40:58, 50:120])  # the label above


def test_nothing_found_nothing_drawn() -> None:
    empty = one([0, 0, 1, 1]).filter(np.array([False]))
    drawn = draw_instances(GREY, empty)
    assert np.array_equal(drawn, GREY)
    assert drawn is not GREY


@pytest.mark.parametrize("size", [(20, 30), (200, 300), (1500, 2000)])
@pytest.mark.parametrize("count", [1, 40])
def test_labels_stay_inside_and_apart(size: tuple[int, int], count: int) -> None:
    painters: list[LabelPainter] = []
    found = boxes_on(size, count)
    canvas = np.zeros((*size, 3), np.uint8)
    painter = LabelPainter(canvas, found.boxes, font=12, line=2)
    placed = sum(painter.place(i, f"cat {s:.2f}", (255, 0, 0)) for i, s in enumerate(found.scores))
    painters.append(painter)
    labels = painter._placed
    assert len(labels) == placed
    assert placed > 0 or size == (20, 30)
    for index, (x0, y0, x1, y1) in enumerate(labels):
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= size[1]
        assert y1 <= size[0]
        rest = np.delete(labels, index, axis=0)
        apart = (rest[:, 0] >= x1) | (rest[:, 2] <= x0) | (rest[:, 1] >= y1) | (rest[:, 3] <= y0)
        assert apart.all()


def test_a_label_does_not_hide_a_small_object() -> None:
    boxes = np.array([[100, 100, 180, 160], [102, 84, 112, 97]], np.float32)  # the second where the first's label goes
    canvas = np.zeros((200, 300, 3), np.uint8)
    assert LabelPainter(canvas, boxes, font=12, line=2).place(0, "cat 0.90", (255, 0, 0))
    assert not canvas[84:97, 102:112].any()


def test_where_objects_are_dense_there_are_no_labels() -> None:
    x, y = np.meshgrid(np.arange(0, 300, 12), np.arange(0, 200, 12))
    corner = np.stack((x.ravel(), y.ravel()), axis=1).astype(np.float32)
    canvas = np.zeros((200, 300, 3), np.uint8)
    painter = LabelPainter(canvas, np.concatenate((corner, corner + 11), axis=1), font=12, line=1)
    assert not any(painter.place(index, "nucleus 0.90", (255, 0, 0)) for index in range(len(corner)))
    assert not canvas.any()


def test_lines_and_text_grow_with_the_image() -> None:
    def thickness(scale: int) -> int:
        image = np.full((400 * scale, 640 * scale, 3), 128, np.uint8)
        found = replace(one([100, 100, 500, 300]), size=image.shape[:2])
        drawn = draw_instances(image, replace(found, boxes=found.boxes * scale))
        return int((drawn[280 * scale, : 200 * scale] != 128).any(axis=1).sum())

    assert thickness(1) < thickness(2) < thickness(4)


def test_masks_are_tinted_and_outlined() -> None:
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 60:120, 50:150] = True
    drawn = draw_instances(GREY, one([50, 60, 150, 120], masks=mask)).astype(int)
    inside = drawn[90, 100]
    assert inside.tolist() == pytest.approx([0.55 * 128 + 0.45 * c for c in class_colour(0)], abs=1)
    assert (drawn[130:, :] == 128).all()
    empty = draw_instances(GREY, one([50, 60, 150, 120], masks=np.zeros((1, 200, 300), bool)))
    assert (empty[70:110, 60:140] == 128).all()


def test_masks_of_one_class_differ() -> None:
    masks = np.zeros((2, 200, 300), bool)
    masks[0, 40:100, 20:100] = masks[1, 40:100, 150:230] = True
    for categories in (CATEGORIES, CATEGORIES[:1]):
        found = Instances(
            boxes=np.array([[20, 40, 100, 100], [150, 40, 230, 100]], np.float32),
            scores=np.array([0.9, 0.8], np.float32),
            labels=np.array([0, 0]),
            size=(200, 300),
            categories=categories,
            masks=masks,
        )
        drawn = draw_instances(GREY, found)
        assert tuple(drawn[80, 60]) != tuple(drawn[80, 190])


def test_keypoints_have_sides_and_a_threshold() -> None:
    names = ["left_eye", "right_eye", "nose"]
    category = Category(id=1, name="face", keypoints=names, skeleton=[(0, 1), (1, 2)])
    points = np.array([[[200, 100, 0.9], [100, 100, 0.9], [150, 160, 0.1]]], np.float32)
    drawn = draw_instances(GREY, one([60, 60, 240, 190], categories=[category], keypoints=points))
    assert tuple(drawn[100, 200]) == LEFT
    assert tuple(drawn[100, 100]) == RIGHT
    assert (drawn[100, 130:170] != 128).any()  # the line between the eyes
    assert (drawn[140:180, 130:170] == 128).all()  # the nose is too unsure, and so is the line to it
    shown = draw_instances(
        GREY, one([60, 60, 240, 190], categories=[category], keypoints=points), keypoint_threshold=0.05
    )
    assert (shown[160, 150] != 128).any()


def test_a_class_with_fewer_points_than_another_keeps_its_sides() -> None:
    category = Category(id=1, name="face", keypoints=["left_eye", "right_eye"])
    points = np.array([[[200, 100, 0.9], [100, 100, 0.9], [150, 160, 0.9]]], np.float32)
    drawn = draw_instances(GREY, one([60, 60, 240, 190], categories=[category], keypoints=points))
    assert tuple(drawn[100, 200]) == LEFT
    assert tuple(drawn[100, 100]) == RIGHT
    assert (drawn[150:170, 140:160] == 128).all()


def test_keypoints_without_names_or_far_outside() -> None:
    category = Category(id=1, name="tube", keypoints=[], skeleton=[(0, 5)])
    points = np.array([[[1e5, -1e5, 1.0], [100, 100, 1.0]]], np.float32)
    drawn = draw_instances(GREY, one([60, 60, 240, 190], categories=[category], keypoints=points))
    assert tuple(drawn[100, 100]) == class_colour(0)


def test_boxes_over_the_edge_and_unwritable_images() -> None:
    image = GREY.copy()
    image.setflags(write=False)
    drawn = draw_instances(image[:, ::-1], one([-50, -50, 1000, 1000]))
    assert tuple(drawn[100, 0]) == tuple(drawn[199, 150]) == class_colour(0)


def test_colours_are_many_and_stable() -> None:
    colours = [class_colour(index) for index in range(80)]
    assert len(set(colours)) == 80
    assert colours[: len(PALETTE)] == list(PALETTE)
    distance = [np.abs(np.subtract(a, b)).sum() for a, b in pairwise(colours)]
    assert min(distance) > 60


def test_text_of_other_scripts_is_drawn() -> None:
    assert text_bitmap("öß", 14).max() > 100
    assert np.array_equal(text_bitmap("two\nlines", 14), text_bitmap("two lines", 14))
    assert text_bitmap("", 14).shape[1] > 0
    assert text_bitmap("猫", 14).max() > 100
    assert not np.array_equal(text_bitmap("я", 14), text_bitmap("ж", 14))
    assert text_bitmap("cat", 14).shape[0] == text_bitmap("gyp", 14).shape[0]
    assert text_bitmap("cat", 28).shape[0] > 1.5 * text_bitmap("cat", 14).shape[0]


def test_side_by_side_and_grid() -> None:
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 50:100, 50:100] = True
    points = np.array([[[60, 60, 1.0]]], np.float32)
    truth = one([50, 50, 100, 100], masks=mask, keypoints=points)
    pair = side_by_side(GREY, truth, truth.filter(np.array([], int)), side=600)
    assert pair.shape[1] >= 1200
    half = pair.shape[1] // 2
    picture = pair[-400:]
    assert (picture[:, :half] != 128).any(axis=2).sum() > 5000  # the truth, at twice the size
    assert (picture[150, 150] != 128).any()
    assert (picture[:, -600:] == 128).all()  # nothing was found
    sheet = grid([pair, pair[:, :500], pair[:200]], columns=2)
    assert sheet.shape[0] > 2 * 200
    assert sheet.shape[1] >= pair.shape[1] + 500
    assert grid([GREY]).shape[0] > 200

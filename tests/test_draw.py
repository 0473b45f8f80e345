"""Pictures of results: colours, places and sizes of boxes, masks, labels and skeletons."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from mvision.drawing import draw_instances, grid, side_by_side
from mvision.drawing.pictures import GAP, LEFT, MASK_OPACITY, MAX_LABELLED, MIDDLE, RIGHT, class_colour
from mvision.errors import UserError
from mvision.structures import Category, Instances
from mvision.structures.masks import Masks, encode_mask

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


def instances(boxes: list[list[float]], **fields: Any) -> Instances:
    count = len(boxes)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    values = {"categories": CATEGORIES, "labels": np.zeros(count, int), "scores": scores, **fields}
    return Instances(boxes=np.array(boxes, np.float32).reshape(-1, 4), size=(200, 300), **values)


def pixels_of(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=2).sum())


@pytest.fixture
def labels_drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was given to supervision for every picture: font size and path, boxes and texts, the best last."""
    drawn: list[dict[str, Any]] = []
    annotate = sv.RichLabelAnnotator.annotate

    def record(self: sv.RichLabelAnnotator, scene: Any, detections: sv.Detections, labels: list[str]) -> Any:
        drawn.append({"size": self.font_size, "font": self.font_path, "boxes": detections.xyxy, "texts": labels})
        return annotate(self, scene, detections, labels)

    monkeypatch.setattr(sv.RichLabelAnnotator, "annotate", record)
    return drawn


def test_a_box_is_drawn_on_a_copy() -> None:
    image = GREY.copy()
    drawn = draw_instances(image, instances([[50, 60, 150, 120]]))
    assert np.array_equal(image, GREY)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    for x, y in ((50, 90), (150, 90), (100, 120)):
        assert tuple(drawn[y, x]) == class_colour(0)
    assert (drawn[70:110, 60:140] == 128).all()  # nothing inside
    assert (drawn[130:] == 128).all()
    assert pixels_of(drawn[40:58, 50:120], class_colour(0)) > 200  # the label above
    second = draw_instances(image, instances([[50, 60, 150, 120]], labels=np.array([1])))
    assert tuple(second[90, 50]) == class_colour(1)


def test_red_stays_red() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    image[..., 0] = 200
    assert np.array_equal(draw_instances(image, instances([])), image)
    drawn = draw_instances(image, instances([[10, 10, 40, 40]]))
    assert drawn[25, 25].tolist() == [200, 0, 0]
    assert tuple(drawn[25, 10]) == class_colour(0)


def test_without_instances_the_picture_is_a_copy() -> None:
    drawn = draw_instances(GREY, instances([]))
    assert np.array_equal(drawn, GREY)
    assert drawn is not GREY


def test_the_best_is_on_top() -> None:
    boxes = [[50, 60, 150, 120], [50, 60, 200, 150]]
    for labels in ([0, 1], [1, 0]):
        drawn = draw_instances(GREY, instances(boxes, labels=np.array(labels)))
        assert tuple(drawn[90, 50]) == class_colour(labels[0])
        assert tuple(drawn[140, 50]) == class_colour(labels[1])


def test_texts(labels_drawn: list[dict[str, Any]]) -> None:
    found = instances([[50, 60, 150, 120], [10, 10, 40, 40]], labels=np.array([1, 0]))
    found.categories = [Category(id=1, name="two\nlines"), CATEGORIES[1]]
    draw_instances(GREY, found)
    draw_instances(GREY, found, scores=False)
    assert [call["texts"] for call in labels_drawn] == [["two lines 0.50", "dog 0.90"], ["two lines", "dog"]]
    assert labels_drawn[0]["boxes"].tolist() == [[10, 10, 40, 40], [50, 60, 150, 120]]


def test_labels_are_moved_apart_and_into_the_picture() -> None:
    def shown(boxes: list[list[float]], labels: list[int]) -> list[int]:
        drawn = draw_instances(np.zeros((200, 300, 3), np.uint8), instances(boxes, labels=np.array(labels)))
        return [pixels_of(drawn, class_colour(label)) for label in sorted(set(labels))]

    # Little of either colour is lost where boxes and labels are at one place, or the label would be outside.
    apart = shown([[100, 100, 140, 140]], [0]) + shown([[100, 100, 140, 140]], [1])
    together = shown([[100, 100, 140, 140], [100, 100, 140, 140]], [0, 1])
    assert all(b > a - 170 for a, b in zip(apart, together))  # 160 pixels of the lower box are covered
    assert shown([[260, -9, 330, 60]], [0])[0] > 0.9 * shown([[100, 100, 140, 140]], [0])[0]


@pytest.mark.parametrize("size", [(20, 30), (200, 300), (1500, 2000)])
@pytest.mark.parametrize("count", [1, 80])
def test_labels_cover_little_and_the_best_have_them(
    labels_drawn: list[dict[str, Any]], size: tuple[int, int], count: int
) -> None:
    found = boxes_on(size, count)
    draw_instances(np.zeros((*size, 3), np.uint8), found)
    texts = labels_drawn[0]["texts"][::-1] if labels_drawn else []
    every = [f"{found.names[label]} {score:.2f}" for label, score in zip(found.labels, found.scores)]
    assert texts == every[: len(texts)]
    assert bool(texts) == (size != (20, 30))
    assert (len(texts) == count) == (count == 1 and size != (20, 30))
    if labels_drawn:  # a letter is at least a third as wide as it is high
        font = labels_drawn[0]["size"]
        assert sum(len(text) * font * font / 3 for text in texts) < MAX_LABELLED * size[0] * size[1]
        assert count == 1 or sum(len(text) * font * font * 2 for text in texts) > MAX_LABELLED * size[0] * size[1]


def test_lines_and_text_grow_with_the_image(labels_drawn: list[dict[str, Any]]) -> None:
    def thickness(scale: int) -> int:
        image = np.full((400 * scale, 640 * scale, 3), 128, np.uint8)
        found = replace(instances([[100, 100, 500, 300]]), size=image.shape[:2])
        drawn = draw_instances(image, replace(found, boxes=found.boxes * scale))
        return int((drawn[280 * scale, : 200 * scale] != 128).any(axis=1).sum())

    assert thickness(1) < thickness(2) < thickness(4)
    sizes = [call["size"] for call in labels_drawn]
    assert sizes[0] == 13
    assert 1.5 * sizes[0] < sizes[1] < 2 * sizes[0]
    assert 1.5 * sizes[1] < sizes[2] < 2 * sizes[1]


def test_masks_are_tinted_and_outlined() -> None:
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 60:120, 50:150] = True
    found = instances([[20, 30, 200, 180]], masks=mask)
    drawn = draw_instances(GREY, found)
    tint = [(1 - MASK_OPACITY) * 128 + MASK_OPACITY * c for c in class_colour(0)]
    assert drawn[90, 100].tolist() == pytest.approx(tint, abs=1)
    assert drawn[65, 145].tolist() == pytest.approx(tint, abs=1)
    for x, y in ((50, 90), (149, 90), (100, 60), (100, 119)):
        assert tuple(drawn[y, x]) == class_colour(0)
    for x, y in ((46, 90), (154, 90), (100, 56), (100, 124)):
        assert drawn[y, x].tolist() == [128] * 3
    empty = draw_instances(GREY, replace(found, masks=Masks.from_array(np.zeros((1, 200, 300), bool))))
    assert (empty[40:170, 30:190] == 128).all()


def test_small_masks_are_on_large_ones() -> None:
    masks = np.zeros((2, 200, 300), bool)
    masks[0, 20:180, 20:280] = masks[1, 80:120, 100:160] = True
    for order in ([0, 1], [1, 0]):
        found = instances([[20, 20, 280, 180], [100, 80, 160, 120]], masks=masks, labels=np.array([0, 1]))
        drawn = draw_instances(GREY, found.filter(np.array(order)))
        for place, label in (((50, 50), 0), ((100, 130), 1)):
            tint = [(1 - MASK_OPACITY) * 128 + MASK_OPACITY * c for c in class_colour(label)]
            assert drawn[place].tolist() == pytest.approx(tint, abs=1)


def test_masks_of_a_single_class_differ() -> None:
    masks = np.zeros((2, 200, 300), bool)
    masks[0, 40:100, 20:100] = masks[1, 40:100, 150:230] = True
    found = instances([[20, 40, 100, 100], [150, 40, 230, 100]], masks=masks)
    drawn = draw_instances(GREY, found)
    assert tuple(drawn[80, 60]) == tuple(drawn[80, 190])  # of two classes, and both masks are of the first
    drawn = draw_instances(GREY, replace(found, categories=CATEGORIES[:1]))
    assert tuple(drawn[80, 60]) != tuple(drawn[80, 190])


def test_many_masks_of_a_large_image_need_little_memory() -> None:
    size, count = (2000, 3000), 40
    rng = np.random.default_rng(0)
    corners = np.stack((rng.integers(0, 2900, count), rng.integers(0, 1900, count)), axis=1)
    rles = []
    for x, y in corners.tolist():
        mask = np.zeros(size, np.uint8)
        mask[y : y + 60, x : x + 60] = 1
        rles.append(encode_mask(mask))
    found = replace(boxes_on(size, count), masks=Masks(rles, size))
    image = np.zeros((*size, 3), np.uint8)
    tracemalloc.start()
    drawn = draw_instances(image, found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    x, y = corners[0] + 30
    assert drawn[y, x].any()
    assert peak < 6 * image.nbytes  # 108 MB; the masks as booleans alone would take 240


def test_regions_are_drawn_below_the_masks_of_instances(labels_drawn: list[dict[str, Any]]) -> None:
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 100:200] = True
    sky = [Category(id=1, name="grass"), Category(id=2, name="sky")]
    regions = instances([[0, 100, 300, 200]], categories=sky, labels=np.array([1]), masks=mask)
    drawn = draw_instances(GREY, instances([[50, 60, 150, 90]], regions=regions))
    tint = [(1 - MASK_OPACITY) * 128 + MASK_OPACITY * c for c in class_colour(1)]
    assert drawn[150, 20].tolist() == pytest.approx(tint, abs=1)
    drawn = draw_instances(GREY, instances([], regions=regions))
    assert drawn[150, 20].tolist() == pytest.approx(tint, abs=1)
    own = np.zeros((1, 200, 300), bool)
    own[0, 60:130, 50:150] = True
    drawn = draw_instances(GREY, instances([[50, 60, 150, 130]], regions=regions, masks=own))
    assert drawn[150, 20].tolist() == pytest.approx(tint, abs=1)
    both = [(1 - MASK_OPACITY) * below + MASK_OPACITY * c for below, c in zip(tint, class_colour(0))]
    assert drawn[120, 100].tolist() == pytest.approx(both, abs=1)
    assert labels_drawn[-1]["texts"] == ["sky 0.90", "cat 0.90"]


FACE = Category(id=1, name="face", keypoints=["left_eye", "right eye", "nose"], skeleton=[(0, 1), (1, 2), (2, 7)])


def test_keypoints_have_sides_and_a_threshold() -> None:
    points = np.array([[[200, 100, 0.9], [100, 100, 0.5], [150, 160, 0.25]]], np.float32)
    found = instances([[60, 60, 240, 190]], categories=[FACE], keypoints=points)
    drawn = draw_instances(GREY, found)
    assert tuple(drawn[100, 200]) == LEFT
    assert tuple(drawn[100, 100]) == RIGHT
    assert tuple(drawn[100, 150]) == MIDDLE  # the line between the eyes
    assert (drawn[140:180, 130:170] == 128).all()  # the nose has too low a score, and so has the line to it
    shown = draw_instances(GREY, found, keypoint_threshold=0.25)
    assert tuple(shown[160, 150]) == MIDDLE
    assert (shown[130, 125] != 128).any()
    less = draw_instances(GREY, found, keypoint_threshold=0.5)
    assert tuple(less[100, 100]) == RIGHT


def test_a_class_with_fewer_points_than_another() -> None:
    category = Category(id=1, name="face", keypoints=["left_eye", "right_eye"])
    points = np.array([[[200, 100, 0.9], [100, 100, 0.9], [150, 160, 0.9]]], np.float32)
    drawn = draw_instances(GREY, instances([[60, 60, 240, 190]], categories=[category], keypoints=points))
    assert tuple(drawn[100, 200]) == LEFT
    assert tuple(drawn[100, 100]) == RIGHT
    assert (drawn[150:170, 140:160] == 128).all()


def test_keypoints_without_names_or_far_outside() -> None:
    category = Category(id=1, name="tube", keypoints=[], skeleton=[(0, 5)])
    points = np.array([[[1e5, -1e5, 1.0], [100, 100, 1.0]]], np.float32)
    drawn = draw_instances(GREY, instances([[60, 60, 240, 190]], categories=[category], keypoints=points))
    assert tuple(drawn[100, 100]) == MIDDLE


def test_points_are_small_on_small_objects() -> None:
    def area(side: int) -> int:
        points = np.array([[[150, 150, 1.0]] * 3], np.float32)
        box = [150 - side / 2, 150 - side / 2, 150 + side / 2, 150 + side / 2]
        drawn = draw_instances(GREY, instances([box], categories=[FACE], keypoints=points))
        return int((drawn[145:156, 145:156] != 128).any(axis=2).sum())

    assert area(24) < area(120)


def test_boxes_over_the_edge_and_read_only_images() -> None:
    image = GREY.copy()
    image.setflags(write=False)
    drawn = draw_instances(image[:, ::-1], instances([[-50, -50, 1000, 1000]]))
    assert tuple(drawn[100, 0]) == tuple(drawn[199, 150]) == tuple(drawn[100, 299]) == class_colour(0)


def test_colours_are_many_and_black_text_is_readable_on_them() -> None:
    colours = [class_colour(index) for index in range(80)]
    assert len(set(colours)) == 80
    assert min(np.abs(np.subtract(a, b)).sum() for a, b in pairwise(colours)) > 60
    linear = ((np.array(colours) / 255 + 0.055) / 1.055) ** 2.4
    contrast = (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05  # with black, WCAG 2.1
    assert contrast.min() > 3  # what the standard demands of bold text


def test_pictures_may_be_drawn_in_several_threads() -> None:
    found = [boxes_on((200, 300), 6, seed) for seed in range(12)]
    expected = [draw_instances(GREY, each) for each in found]
    with ThreadPoolExecutor(4) as executor:
        drawn = list(executor.map(lambda each: draw_instances(GREY, each), found))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, expected))


def test_side_by_side() -> None:
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 50:100, 50:100] = True
    gt = instances([[50, 50, 100, 100]], masks=mask, keypoints=np.array([[[60, 60, 1.0]]], np.float32))
    pair = side_by_side(GREY, gt, gt.filter(np.array([], int)), side=600)
    assert pair.shape[1] == 2 * 600 + GAP
    caption, picture = pair[:-400], pair[-400:]
    assert (caption[:, :600] < 100).any()
    assert (caption[:, -600:] < 100).any()
    assert not np.array_equal(caption[:, :600], caption[:, -600:])
    changed = np.flatnonzero((picture[:, :600] != 128).any(axis=2).any(axis=1))
    assert changed[-1] == pytest.approx(200, abs=3)  # the mask at twice the size
    assert (picture[150, 150] != 128).any()
    assert (picture[:, -600:] == 128).all()  # no prediction
    both = side_by_side(GREY, gt, gt, side=600)[-400:]
    assert (both[150, -600 + 150] != 128).any()


def test_regions_are_enlarged_with_the_picture() -> None:
    mask = np.zeros((1, 200, 300), bool)
    mask[0, 100:] = True
    sky = instances([[0, 100, 300, 200]], masks=mask)
    found = instances([[50, 20, 100, 60]], regions=sky)
    assert found.resized((400, 600)).regions.size == (400, 600)
    half = side_by_side(GREY, instances([]), found, side=600)[-400:, -600:]
    assert (half[250:390, 20:580] != 128).any(axis=2).all()
    assert (half[130:170, 20:580] == 128).all()  # above it, and above the label


def test_ground_truth_has_no_scores(labels_drawn: list[dict[str, Any]]) -> None:
    found = instances([[50, 60, 150, 120]])
    side_by_side(GREY, found, found)
    assert [call["texts"] for call in labels_drawn] == [["cat"], ["cat 0.90"]]


def test_grid() -> None:
    pictures = [
        np.full((20, 30, 3), 10, np.uint8),
        np.full((10, 40, 3), 20, np.uint8),
        np.full((20, 30, 3), 30, np.uint8),
    ]
    sheet = grid(pictures, columns=2)
    expected = np.full((20 + GAP + 20, 40 + GAP + 40, 3), 255, np.uint8)
    expected[:20, :30] = 10
    expected[:10, 40 + GAP :] = 20
    expected[20 + GAP :, :30] = 30
    assert np.array_equal(sheet, expected)
    assert np.array_equal(grid([GREY]), GREY)
    assert grid([GREY] * 6).shape == (3 * 200 + 2 * GAP, 2 * 300 + GAP, 3)  # about as wide as high
    assert grid([np.zeros((10, 200, 3), np.uint8)] * 3).shape == (3 * 10 + 2 * GAP, 200, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GREY[:100], "the picture is 300 x 100, and these instances are for one of 300 x 200"),
        (np.zeros((300, 200, 3), np.uint8), "the picture is 200 x 300, and"),
        (GREY[..., 0], r"shape \(200, 300\) and type uint8"),
        (np.dstack((GREY, GREY[..., :1])), r"shape \(200, 300, 4\)"),
        (GREY / 255.0, "type float64"),
        (GREY.astype(np.uint16), "type uint16"),
        (np.moveaxis(GREY, 2, 0), "the picture is 200 x 3,"),
        (Image.fromarray(GREY), r"not a Image; .*numpy.asarray\(image.convert\('RGB'\)\)"),
        (np.zeros((), np.uint8), r"shape \(\)"),
    ],
)
def test_a_picture_of_another_size_or_kind_is_one_line(image: Any, message: str) -> None:
    for found in (instances([]), instances([[50, 60, 150, 120]])):
        with pytest.raises(UserError, match=message) as caught:
            found.draw(image)
        assert "\n" not in str(caught.value)


def test_the_libraries_are_imported_when_a_picture_is_drawn() -> None:
    code = (
        "import sys, mvision.structures; print([n for n in ('supervision', 'matplotlib', 'cv2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout

"""Augmentation: pixels, boxes, masks and keypoints go together, whatever is drawn."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from mvision.config import AugmentConfig
from mvision.data.augment.geometry import describe_unmirrored, draw_masks, fit, flip, mirror_keypoints, paint, place
from mvision.data.augment.transforms import EvalTransform, TrainTransform, crop, zoom_out
from mvision.data.formats.labels import Labels, PictureLabels, join_labels
from mvision.data.formats.segmentation import Outlines
from mvision.structures import Category
from mvision.structures.images import resize_image

OFF = {"photometric": 0.0, "zoom_out": 0.0, "crop": 0.0, "flip": 0.0, "mosaic": 0.0, "mixup": 0.0}
HEIGHT, WIDTH = 240, 320
SIZE = (192, 256)
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
# An L-shape, a rectangle and a trapezium in pixels; a cut through the L makes its box smaller than clipping does.
OUTLINES = [
    np.array([(20, 20), (60, 20), (60, 140), (140, 140), (140, 180), (20, 180)], dtype=float),
    np.array([(180, 40), (300, 40), (300, 100), (180, 100)], dtype=float),
    np.array([(200, 220), (280, 220), (250, 140), (230, 140)], dtype=float),
]
POINTS = np.array(
    [[[40, 160, 2], [130, 160, 2]], [[190, 50, 2], [290, 90, 1]], [[240, 200, 2], [0, 0, 0]]], dtype=float
)
SWAP = np.array([[0, 1], [1, 0], [0, 1]])  # only the rectangle's two points mirror each other


class Scene:
    """Three objects of one colour each on black; the same for every index."""

    def __init__(self, fields: tuple[str, ...] = ("masks", "keypoints")) -> None:
        big = np.zeros((HEIGHT * 4, WIDTH * 4, 3), np.uint8)
        for colour, outline in zip(COLOURS.tolist(), OUTLINES):
            cv2.fillPoly(big, [np.round(outline * 4).astype(np.int32)], colour)
        self.picture = resize_image(big, (HEIGHT, WIDTH))
        self.fields = fields

    def __len__(self) -> int:
        return 5

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        return self.picture

    def aspect(self, index: int) -> float:
        return WIDTH / HEIGHT

    def labels(self, index: int) -> PictureLabels:
        whole = np.array((WIDTH, HEIGHT), dtype=float)
        outlines: list[Any] = [[outline / whole] for outline in OUTLINES]
        areas = [cv2.contourArea(o.astype(np.float32)) / whole.prod() for o in OUTLINES]
        boxes = np.array([(*o[0].min(axis=0), *o[0].max(axis=0)) for o in outlines])
        return Labels(
            boxes,
            np.arange(3),
            np.array(areas),
            np.zeros(3, dtype=bool),
            POINTS / (*whole, 1) if "keypoints" in self.fields else None,
            Outlines(outlines) if "masks" in self.fields else None,
        ).picture(slice(None))


def sample(seed: int, size: tuple[int, int] = SIZE, scene: Scene | None = None, **augment: Any) -> Any:
    transform = TrainTransform(AugmentConfig(**{**OFF, **augment}), SWAP)
    return transform(scene or Scene(), seed % 5, size, np.random.default_rng(seed))


def seen(image: np.ndarray, label: int) -> np.ndarray:
    """Where an object's colour is."""
    return image[..., label] > 127


def check_labels(image: np.ndarray, labels: PictureLabels, size: tuple[int, int]) -> None:
    """Every label lies on its object's pixels, and every large object in the picture is labelled."""
    height, width = size
    masks = draw_masks(labels, size).astype(bool)
    covered = {label: np.zeros(size, dtype=bool) for label in range(3)}
    for row, label in enumerate(labels.labels.tolist()):
        x0, y0, x1, y1 = labels.boxes[row] * (width, height, width, height)
        own = seen(image, label)
        mask = masks[row]
        assert (mask & own).sum() >= 0.93 * mask.sum() - 8, "a mask is not on its object"
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert abs(columns[0] - x0) <= 1.5, "left side of a box"
        assert abs(columns[-1] + 1 - x1) <= 1.5, "right side of a box"
        assert abs(rows[0] - y0) <= 1.5, "top of a box"
        assert abs(rows[-1] + 1 - y1) <= 1.5, "bottom of a box"
        assert labels.areas[row] == pytest.approx(mask.mean(), rel=0.2, abs=2e-3)
        covered[label] |= mask
        for x, y, visible in labels.keypoints[row]:  # type: ignore[index]
            if visible:
                column, line = min(int(x * width), width - 1), min(int(y * height), height - 1)
                assert cv2.dilate(own.astype(np.uint8), np.ones((3, 3)))[line, column], "a keypoint left its object"
            else:
                assert x == y == 0
    for label, mask in covered.items():
        missed = seen(image, label) & ~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
        assert missed.sum() <= 0.1 * height * width, "a large object has no label"


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"flip": 1.0},
        {"vertical_flip": 1.0},
        {"crop": 1.0},
        {"zoom_out": 1.0},
        {"zoom_out": 1.0, "crop": 1.0, "flip": 0.5, "vertical_flip": 0.5},
        {"mosaic": 1.0},
        {"mosaic": 1.0, "flip": 0.5, "vertical_flip": 0.5},
        {"mosaic": 1.0, "mosaic_form": "whole"},
        {"mosaic": 1.0, "mosaic_form": "whole", "flip": 0.5, "vertical_flip": 0.5},
    ],
    ids=str,
)
def test_labels_follow_the_pixels(augment: dict[str, Any]) -> None:
    for seed in range(25):
        image, labels = sample(seed, **augment)
        assert image.shape == (*SIZE, 3)
        assert image.dtype == np.uint8
        check_labels(image, labels, SIZE)


def test_evaluation_is_the_plain_stretch() -> None:
    scene = Scene()
    image, labels = EvalTransform()(scene, 0, SIZE, np.random.default_rng(0))
    assert np.array_equal(image, resize_image(scene.picture, SIZE))
    np.testing.assert_allclose(labels.boxes, scene.labels(0).boxes, atol=1e-12)
    np.testing.assert_allclose(labels.areas, scene.labels(0).areas)
    check_labels(image, labels, SIZE)


def test_flip_swaps_left_and_right_keypoints() -> None:
    _, plain = sample(0)
    for augment in ("flip", "vertical_flip"):
        _, flipped = sample(0, **{augment: 1.0})
        axis = 0 if augment == "flip" else 1
        mirrored = plain.keypoints.copy()
        mirrored[..., axis] = np.where(mirrored[..., 2] > 0, 1 - mirrored[..., axis], 0)
        np.testing.assert_allclose(flipped.keypoints[1], mirrored[1, ::-1])  # the pair changes places
        np.testing.assert_allclose(flipped.keypoints[[0, 2]], mirrored[[0, 2]])  # what is no pair does not


def test_mirror_pairs_are_found_by_name() -> None:
    names = ["nose", "left_eye", "right_eye", "Hand Left", "Hand Right", "left_only"]
    swap = mirror_keypoints([Category(id=1, name="a", keypoints=names), Category(id=2, name="b", keypoints=["x"])])
    assert swap is not None
    assert swap.tolist() == [[0, 2, 1, 4, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert mirror_keypoints([Category(id=1, name="a")]) is None


@pytest.mark.parametrize(
    ("names", "swap"),
    [
        (["L_Eye", "R_Eye", "Nose"], [1, 0, 2]),
        (["paw_l", "paw_r", "tail"], [1, 0, 2]),
        (["LEye", "REye", "pawL", "pawR"], [1, 0, 3, 2]),
        (["l-ear 1", "r-ear 1", "rear", "real"], [1, 0, 2, 3]),
        (["L_Eye", "nose", "REAR", "LEAL"], [0, 1, 2, 3]),
    ],
)
def test_mirror_pairs_are_found_by_the_letters_l_and_r(names: list[str], swap: list[int]) -> None:
    category = Category(id=1, name="mouse", keypoints=names)
    np.testing.assert_array_equal(mirror_keypoints([category]), [swap])
    assert (describe_unmirrored(category) is None) == (swap != [0, 1, 2, 3])


def test_keypoints_without_left_and_right_are_told() -> None:
    tube = Category(id=1, name="tube", keypoints=["top", "a", "b", "c", "d", "end"])
    line = str(describe_unmirrored(tube))
    assert "class 'tube': no left and right among its keypoints (top, a, b, c, d, ...)" in line
    assert "flip_pairs" in line
    assert describe_unmirrored(tube.model_copy(update={"flip_pairs": []})) is None
    assert describe_unmirrored(Category(id=1, name="dot", keypoints=["middle"])) is None
    assert describe_unmirrored(Category(id=1, name="box")) is None


def test_two_flips_are_none() -> None:
    labels = Scene().labels(0)
    for axis in (0, 1):
        twice = flip(flip(labels, axis, SWAP), axis, SWAP)
        for name in ("boxes", "keypoints", "scale", "offset", "windows"):
            np.testing.assert_allclose(getattr(twice, name), getattr(labels, name), atol=1e-12)


def test_objects_cut_to_nothing_leave_every_field_together() -> None:
    labels = Scene().labels(0)
    placement = fit((0.5, 0.0, 1.0, 1.0), (HEIGHT, WIDTH), (0, 0, SIZE[1], SIZE[0]), SIZE)
    assert placement is not None
    kept = place(labels, placement)
    assert kept.labels.tolist() == [1, 2]
    assert len(kept.boxes) == len(kept.areas) == len(kept.keypoints) == len(kept.outlines) == len(kept.cut) == 2  # type: ignore[arg-type]
    none = place(labels, fit((0.0, 0.9, 0.05, 1.0), (HEIGHT, WIDTH), (0, 0, 64, 64), (64, 64)))  # type: ignore[arg-type]
    assert len(none) == 0
    assert draw_masks(none, (16, 16)).shape == (0, 16, 16)
    assert none.keypoints is not None
    assert none.keypoints.shape == (0, 2, 3)


def test_keypoints_outside_the_view_are_not_labelled() -> None:
    placement = fit((0.0, 0.0, 0.375, 1.0), (HEIGHT, WIDTH), (0, 0, SIZE[1], SIZE[0]), SIZE)
    assert placement is not None
    kept = place(Scene().labels(0), placement)
    assert kept.labels.tolist() == [0]
    assert kept.keypoints is not None
    assert kept.keypoints[0, 0, 2] == 2
    assert kept.keypoints[0, 1].tolist() == [0, 0, 0]


def test_a_cut_object_has_the_box_of_what_is_left_of_its_mask() -> None:
    """Of the L only the upright is left when the picture ends above its foot; clipping alone keeps the foot's width."""

    class Cut(Scene):
        def labels(self, index: int) -> PictureLabels:
            placement = fit((0.0, 0.0, 1.0, 0.58), (HEIGHT, WIDTH), (0, 0, WIDTH, HEIGHT), (HEIGHT, WIDTH))
            assert placement is not None
            return place(super().labels(index), placement)

    with_masks = sample(0, scene=Cut())[1]
    assert with_masks.boxes[0, 2] == pytest.approx(60 / WIDTH, abs=0.006)
    without = sample(0, scene=Cut(("keypoints",)))[1]
    assert without.boxes[0, 2] == pytest.approx(140 / WIDTH, abs=0.006)


def test_crop_keeps_an_object_and_zoom_out_the_image() -> None:
    labels = Scene().labels(0)
    cropped = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        view = crop(labels, (0.0, 0.0, 1.0, 1.0), WIDTH / HEIGHT, rng)
        cropped += view != (0.0, 0.0, 1.0, 1.0)
        centres = (labels.boxes[:, :2] + labels.boxes[:, 2:]) / 2
        assert ((centres > view[:2]) & (centres < view[2:])).all(axis=1).any()
        assert min(view) >= 0
        assert max(view) <= 1
        x0, y0, x1, y1 = zoom_out(rng)
        assert x0 <= 0 <= 1 <= x1 + 1e-9
        assert y0 <= 0 <= 1 <= y1 + 1e-9
        assert x1 - x0 == pytest.approx(y1 - y0)
    assert cropped > 40


def test_crop_of_an_image_without_objects() -> None:
    empty = Scene().labels(0)[np.zeros(0, dtype=int)]
    assert crop(empty, (0.0, 0.0, 1.0, 1.0), 1.0, np.random.default_rng(0)) != (0.0, 0.0, 1.0, 1.0)
    transform = TrainTransform(AugmentConfig(mosaic=0.5, mixup=0.5, vertical_flip=0.5), SWAP)

    class Empty(Scene):
        def labels(self, index: int) -> PictureLabels:
            return empty

    for seed in range(20):
        image, labels = transform(Empty(), 0, SIZE, np.random.default_rng(seed))
        assert image.shape == (*SIZE, 3)
        assert len(labels) == 0


def test_mixup_blends_and_keeps_all_objects() -> None:
    image, labels = sample(1, mixup=1.0)
    assert labels.labels.tolist() == [0, 1, 2, 0, 1, 2]
    plain = sample(1)[0]
    assert np.abs(image.astype(int) - plain).max() <= 1  # both pictures are the same here


def test_mosaic_tiles_are_filled_and_do_not_leak() -> None:
    class White(Scene):
        def __init__(self) -> None:
            super().__init__()
            self.picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)

    for seed in range(10):
        image, labels = sample(seed, scene=White(), mosaic=1.0)
        assert (image == 255).all()
        widths = labels.windows[:, 2:] - labels.windows[:, :2]
        assert (widths < 1).all()
        assert (labels.boxes[:, :2] >= labels.windows[:, :2] - 1e-9).all()
        assert (labels.boxes[:, 2:] <= labels.windows[:, 2:] + 1e-9).all()


def test_colours_change_and_labels_do_not() -> None:
    image, labels = sample(3, photometric=1.0)
    plain, same = sample(3)
    assert (image != plain).mean() > 0.05
    np.testing.assert_array_equal(labels.boxes, same.boxes)


def test_the_same_numbers_give_the_same_sample() -> None:
    everything = {"photometric": 1.0, "zoom_out": 0.5, "crop": 0.5, "flip": 0.5, "mosaic": 0.5, "mixup": 0.5}
    transform = TrainTransform(AugmentConfig(**everything), SWAP)
    first = [transform(Scene(), 0, SIZE, np.random.default_rng((7, n))) for n in range(6)]
    other = TrainTransform(AugmentConfig(**everything), SWAP)
    for n in reversed(range(6)):  # another order, another object
        image, labels = other(Scene(), 0, SIZE, np.random.default_rng((7, n)))
        assert np.array_equal(image, first[n][0])
        np.testing.assert_array_equal(labels.boxes, first[n][1].boxes)
    assert not np.array_equal(first[0][0], first[1][0])


def test_light_augmentation_is_without_mosaic_mixup_and_zoom_out() -> None:
    light = TrainTransform(AugmentConfig(mosaic=1, mixup=1, zoom_out=1), SWAP).light().config
    assert (light.mosaic, light.mixup, light.zoom_out) == (0, 0, 0)
    assert light.flip == AugmentConfig().flip


def test_joining_keeps_what_is_absent_absent() -> None:
    boxes_only = Scene(()).labels(0)
    joined = join_labels((boxes_only, boxes_only))
    assert len(joined) == 6
    assert joined.outlines is None
    assert joined.keypoints is None


def test_paint_fills_only_its_window() -> None:
    canvas = np.full((64, 64, 3), 9, np.uint8)
    image = np.full((30, 30, 3), 200, np.uint8)
    placement = fit((0.0, 0.0, 1.0, 1.0), (30, 30), (32, 0, 64, 16), (64, 64))
    assert placement is not None
    painted = paint(image, placement, canvas)
    assert (painted[:16, 32:] == 200).all()
    assert (painted[16:] == 9).all()
    assert (painted[:, :32] == 9).all()
    assert fit((1.5, 0.0, 2.0, 1.0), (30, 30), (0, 0, 64, 64), (64, 64)) is None


def test_colours_change_as_far_as_they_are_told() -> None:
    picture = np.full((16, 16, 3), (180, 120, 40), dtype=np.uint8)
    moved = {}
    for strength in (0.1, 1.0, 3.0):
        jitter = TrainTransform(AugmentConfig(photometric_strength=strength)).photometric
        changes = []
        for seed in range(20):
            jitter.set_random_seed(seed)
            changes.append(np.abs(jitter(image=picture)["image"].astype(int) - picture).mean())
        moved[strength] = float(np.mean(changes))
    assert 0 < moved[0.1] < 0.3 * moved[1.0] < 0.3 * moved[3.0]

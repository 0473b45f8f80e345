"""Transforms of albumentations that a config adds: pixels, boxes, masks and keypoints move together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mvision.config import AugmentConfig, DataConfig, load_config
from mvision.data import CocoSplit, Dataset, SampleKey, find_layout, read_data_sources
from mvision.data.augment.extra import build_transforms
from mvision.data.augment.geometry import draw_masks
from mvision.data.augment.transforms import TrainTransform
from mvision.data.formats.labels import Labels, PictureLabels
from mvision.data.formats.segmentation import Outlines
from mvision.data.tools.show import contact_sheet
from mvision.errors import UserError
from tests.coco_files import annotation, coco, write_set
from tests.test_transforms import OFF, SIZE, SWAP, Scene, check_labels

SQUARE = (192, 192)


def extra(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": {"p": 1.0, **args}}


def transform(*transforms: dict[str, Any], **augment: Any) -> TrainTransform:
    config = AugmentConfig.model_validate({**OFF, **augment, "extra": list(transforms)})
    return TrainTransform(config, SWAP)


def sample(*transforms: dict[str, Any], size: tuple[int, int] = SIZE, scene: Any = None, seed: int = 0) -> Any:
    return transform(*transforms)(scene or Scene(), 0, size, np.random.default_rng(seed))


def test_a_transform_of_colours_changes_the_pixels_alone() -> None:
    plain, labels = sample()
    inverted, same = sample(extra("InvertImg"))
    assert np.array_equal(inverted, 255 - plain)
    for name in ("boxes", "areas", "keypoints", "scale", "offset", "windows"):
        np.testing.assert_array_equal(getattr(same, name), getattr(labels, name))
    assert same.outlines[0] is not None
    assert isinstance(same.outlines[0], list)  # still the polygon


def test_a_mirror_by_hand() -> None:
    """Also left and right of keypoints, which albumentations does not swap."""
    plain, labels = sample()
    image, moved = sample(extra("HorizontalFlip"))
    assert np.array_equal(image, plain[:, ::-1])
    assert np.array_equal(draw_masks(moved, SIZE), draw_masks(labels, SIZE)[:, :, ::-1])
    np.testing.assert_allclose(
        moved.boxes, 1 - labels.boxes[:, [2, 1, 0, 3]] * (1, -1, 1, -1) - (0, 1, 0, 1), atol=6e-3
    )
    own = transform(flip=1.0)(Scene(), 0, SIZE, np.random.default_rng(0))[1]
    np.testing.assert_allclose(moved.keypoints, own.keypoints, atol=6e-3)  # of a pixel's width in albumentations
    np.testing.assert_allclose(moved.areas, labels.areas, rtol=0.02)
    assert moved.labels.tolist() == labels.labels.tolist()


def test_a_transposition_by_hand() -> None:
    plain, labels = sample(size=SQUARE)
    image, moved = sample(extra("Transpose"), size=SQUARE)
    assert np.array_equal(image, plain.transpose(1, 0, 2))
    assert np.array_equal(draw_masks(moved, SQUARE), draw_masks(labels, SQUARE).transpose(0, 2, 1))
    np.testing.assert_allclose(moved.boxes, labels.boxes[:, [1, 0, 3, 2]], atol=6e-3)
    expected = labels.keypoints[..., [1, 0, 2]]
    expected[1] = expected[1, ::-1]  # it is a mirror as well
    np.testing.assert_allclose(moved.keypoints, expected, atol=6e-3)


def test_a_rotation_swaps_nothing() -> None:
    labels = sample(size=SQUARE)[1]
    _, moved = sample(extra("Rotate", limit=[90, 90]), size=SQUARE)  # anticlockwise
    expected = np.stack((labels.keypoints[..., 1], 1 - labels.keypoints[..., 0], labels.keypoints[..., 2]), axis=-1)
    expected[2, 1] = 0  # not labelled
    np.testing.assert_allclose(moved.keypoints, expected, atol=1e-2)


@pytest.mark.parametrize(
    "added",
    [
        extra("Rotate", limit=[-40, 40]),
        extra("Affine", scale=[0.6, 1.4], shear=[-15, 15], translate_percent=[-0.3, 0.3]),
        extra("Perspective"),
        extra("D4"),
        extra("ElasticTransform", alpha=60, sigma=8),
        extra("ThinPlateSpline"),
    ],
    ids=lambda added: added["name"],
)
def test_labels_follow_the_pixels(added: dict[str, Any]) -> None:
    for seed in range(8):
        image, labels = sample(added, seed=seed)
        assert image.shape == (*SIZE, 3)
        check_labels(image, labels, SIZE)


def test_the_picture_keeps_its_size() -> None:
    image, labels = sample(extra("CenterCrop", height=96, width=128))
    assert image.shape == (*SIZE, 3)
    cropped = sample()[0][48:144, 64:192]
    assert np.abs(cv2.resize(image, (128, 96), interpolation=cv2.INTER_AREA).astype(int) - cropped).mean() < 3
    masks = draw_masks(labels, SIZE).astype(bool)
    for mask, label in zip(masks, labels.labels):
        assert (image[..., label][mask] > 127).mean() > 0.93


@pytest.mark.parametrize("fields", [("masks", "keypoints"), ("keypoints",)])
def test_objects_outside_the_picture_are_dropped_in_every_field(fields: tuple[str, ...]) -> None:
    shift = extra("Affine", translate_percent={"x": [0.5, 0.5], "y": [0, 0]}, scale=1.0)
    plain = sample(scene=Scene(fields))[1]
    moved = sample(shift, scene=Scene(fields))[1]
    assert moved.labels.tolist() == [0]  # the other two are in the right half
    assert len(moved.boxes) == len(moved.areas) == len(moved.keypoints) == len(moved.cut) == 1
    np.testing.assert_allclose(moved.boxes[0], plain.boxes[0] + (0.5, 0, 0.5, 0), atol=0.01)
    np.testing.assert_allclose(moved.areas, plain.areas[:1], rtol=0.03)
    further = extra("Affine", translate_percent={"x": [0.7, 0.7], "y": [0, 0]}, scale=1.0)
    cut = sample(further, scene=Scene(fields))[1]
    assert cut.keypoints[0, :, 2].tolist() == [2, 0]  # its right point is outside
    assert cut.keypoints[0, 1].tolist() == [0, 0, 0]


def test_an_object_with_little_left_is_dropped() -> None:
    """The trapezium spans 0.625 to 0.875 of the width: a fifth of it is left here, and a half in the second case."""
    labels = [
        sample(extra("Affine", translate_percent={"x": [shift, shift], "y": [0, 0]}, scale=1.0))[1].labels.tolist()
        for shift in (0.325, 0.25)
    ]
    assert labels == [[0, 1], [0, 1, 2]]


def test_a_large_object_stays_though_little_of_it_is_left() -> None:
    class One(Scene):
        def labels(self, index: int) -> PictureLabels:
            boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.1, 0.1]])
            return Labels(boxes, np.arange(2), np.array([1.0, 0.01]), np.zeros(2, bool), None, None).picture(
                slice(None)
            )

    far = extra("Affine", translate_percent={"x": [-0.8, -0.8], "y": [0, 0]}, scale=1.0)
    moved = sample(far, scene=One())[1]
    assert moved.labels.tolist() == [0]  # a fifth of it is left, which is a fifth of the picture
    assert moved.areas == pytest.approx([0.2], abs=0.01)


def test_without_objects_outlines_or_keypoints() -> None:
    class Empty(Scene):
        def labels(self, index: int) -> PictureLabels:
            return super().labels(index)[np.zeros(0, dtype=int)]

    turn = extra("Rotate", limit=[20, 20])
    assert len(sample(turn, scene=Empty())[1]) == 0
    bare = sample(turn, scene=Scene(()))[1]
    assert bare.labels.tolist() == [0, 1, 2]
    assert bare.outlines is None
    assert bare.keypoints is None

    class Mixed(Scene):
        def labels(self, index: int) -> PictureLabels:
            labels = super().labels(index)
            labels.outlines[1] = None  # type: ignore[index]
            return labels

    mixed = sample(turn, scene=Mixed())[1]
    assert [outline is None for outline in mixed.outlines] == [False, True, False]
    check = sample(turn)[1]
    np.testing.assert_allclose(mixed.boxes[[0, 2]], check.boxes[[0, 2]])
    assert (mixed.boxes[1, :2] <= check.boxes[1, :2] + 1e-6).all()  # without a mask the box of the turned box


def test_samples_depend_on_the_numbers_alone() -> None:
    several = (extra("GaussNoise"), extra("Rotate", limit=30), extra("RandomBrightnessContrast", p=0.5))
    first = [sample(*several, seed=seed) for seed in range(4)]
    built = transform(*several)
    for seed in reversed(range(4)):
        image, labels = built(Scene(), 0, SIZE, np.random.default_rng(seed))
        assert np.array_equal(image, first[seed][0])
        np.testing.assert_array_equal(labels.boxes, first[seed][1].boxes)
    assert not np.array_equal(first[0][0], first[1][0])
    assert built.light().extra is not None


def test_a_hundred_objects_at_640_are_quick() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.85, (100, 2))
    square = np.array([(0, 0), (0.15, 0), (0.15, 0.15), (0, 0.15)])

    class Crowd(Scene):
        def labels(self, index: int) -> PictureLabels:
            boxes = np.concatenate((corners, corners + 0.15), axis=1)
            outlines = Outlines([[corner + square] for corner in corners])
            kinds, areas = np.zeros(100, dtype=np.int64), np.full(100, 0.0225)
            return Labels(boxes, kinds, areas, np.zeros(100, bool), None, outlines).picture(slice(None))

    built = transform(extra("Rotate", limit=[10, 10]))
    started = time.process_time()
    _, labels = built(Crowd(), 0, (640, 640), np.random.default_rng(0))
    assert len(labels) > 90
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "GausianBlur"}, r"^data.augment.extra.1.name: .* 'GausianBlur': did you mean 'GaussianBlur'"),
        ({"name": "Rotate", "args": {"limitt": 3}}, r"extra.1.args.limitt: Rotate .*: did you mean 'limit'\?$"),
        (
            {"name": "Rotate", "args": {"limit": "x"}},
            r"extra.1.args.limit: Rotate: input should be a valid tuple, or: ",
        ),
        ({"name": "GaussianBlur", "args": {"p": 3}}, r"extra.1.args.p: GaussianBlur: .* less than or equal to 1$"),
        ({"name": "RandomCrop"}, r"extra.1.args.height: RandomCrop: field required$"),
        ({"name": "CropAndPad"}, r"extra.1.args: CropAndPad: both px and percent"),
        ({"name": "RandomGridShuffle"}, r"extra.1.name: RandomGridShuffle does not take"),
        ({"name": "ToTensorV2"}, r"extra.1.name: ToTensorV2 does not take a picture and its boxes"),
        ({"name": "MaskDropout"}, r"extra.1.name: MaskDropout needs mask besides"),
        ({"name": "OneOf"}, r"extra.1.name: OneOf does not take"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(entry: dict[str, Any], message: str) -> None:
    config = AugmentConfig.model_validate({"extra": [extra("Blur"), entry]})
    with pytest.raises(UserError, match=message) as caught:
        build_transforms(config.extra)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):  # before any data is looked for
        read_data_sources(DataConfig(root="/nowhere", augment=config), ["detection"], 0, print)


def test_mistakes_that_show_late_are_one_line_too() -> None:
    with pytest.raises(UserError, match=r"\(Normalize\): the result is float32 .*, not a colour image of bytes"):
        sample(extra("Normalize"))
    with pytest.raises(UserError, match=r"\(RandomCrop\): Crop size .*exceeds"):
        sample(extra("RandomCrop", height=999, width=999))


def test_every_usable_transform_can_be_built_by_name() -> None:
    names = ["CLAHE", "MedianBlur", "RandomRotate90", "ToSepia", "NoOp", "CoarseDropout", "Morphological"]
    config = AugmentConfig.model_validate({"extra": [{"name": name} for name in names]})
    assert [type(built).__name__ for built in build_transforms(config.extra)] == names


def test_from_the_config_to_the_targets(tmp_path: Path) -> None:
    outline = [[8.0, 8.0, 28.0, 8.0, 28.0, 24.0, 8.0, 24.0]]
    write_set(tmp_path, coco([annotation(segmentation=outline), annotation(segmentation=outline, iscrowd=1)]))
    off = [f"data.augment.{name}={value}" for name, value in OFF.items()]
    mirror = "data.augment.extra=[{name: InvertImg, args: {p: 1}}, {name: VerticalFlip, args: {p: 1}}]"
    config = load_config("tiny", assignments=[*off, mirror])
    assert load_config("tiny", assignments=off).data.augment.extra == []
    split = CocoSplit(find_layout(tmp_path).split("train"), ("boxes", "masks"))
    plain, moved = (
        Dataset(split, augment, mask_stride=2)[SampleKey(0, 0, (48, 64))]
        for augment in (AugmentConfig.model_validate(OFF), config.data.augment)
    )
    assert plain.image is not None
    assert plain.targets is not None
    assert moved.targets is not None
    assert np.array_equal(moved.image, 255 - plain.image[::-1])  # type: ignore[arg-type]
    assert len(moved.targets) == 1
    np.testing.assert_allclose(moved.targets.boxes, [[18 / 64, 1 - 16 / 48, 20 / 64, 16 / 48]], atol=1e-6)
    assert moved.targets.masks is not None
    assert np.array_equal(moved.targets.masks, plain.targets.masks.flip(1))  # type: ignore[union-attr]

    layout = find_layout(tmp_path)
    sheets = [contact_sheet(layout, tile=64, augment=augment) for augment in (config.data.augment, plain_augment())]
    assert not np.array_equal(*sheets)


def plain_augment() -> AugmentConfig:
    return AugmentConfig.model_validate(OFF)


def test_an_unknown_key_of_an_entry_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown key 'data.augment.extra.0.arguments'.*args"):
        load_config("tiny", assignments=["data.augment.extra=[{name: Blur, arguments: {}}]"])

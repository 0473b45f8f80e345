"""Samples as functions of their key, targets of every kind, and damaged images."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mvision.config import AugmentConfig
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.loading.cache import ImageCache, make_cache
from mvision.data.loading.dataset import Dataset, SampleKey
from mvision.errors import UserError
from mvision.structures.images import BadImage, read_image, resize_image
from tests.coco_files import PEOPLE, annotation, coco, picture, write_picture, write_set

SQUARE = [[8.0, 8.0, 28.0, 8.0, 28.0, 24.0, 8.0, 24.0]]
STRONG = AugmentConfig(photometric=1, zoom_out=0.5, crop=0.5, mosaic=0.5, mixup=0.5, vertical_flip=0.5)
SIZE = (64, 96)


def split_of(root: Path, tree: dict[str, Any], *fields: str) -> CocoSplit:
    write_set(root, tree)
    return CocoSplit(find_layout(root).split("train"), ("boxes", *fields))


def boxes_only(root: Path, images: int = 4) -> CocoSplit:
    return split_of(root, coco([annotation(n) for n in range(1, images + 1)], images=images))


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a.image, b.image) and torch.equal(a.targets.boxes, b.targets.boxes)


def test_evaluation_sample(tmp_path: Path) -> None:
    split = boxes_only(tmp_path)
    sample = Dataset(split)[SampleKey(0, 2, SIZE)]
    assert np.array_equal(sample.image, resize_image(read_image(tmp_path / "images" / "3.png"), SIZE))
    targets = sample.targets
    assert targets is not None
    np.testing.assert_allclose(targets.boxes[0], [18 / 64, 16 / 48, 20 / 64, 16 / 48], atol=1e-6)
    assert (targets.boxes.dtype, targets.labels.dtype, targets.areas.dtype) == (
        torch.float32,
        torch.int64,
        torch.float32,
    )
    assert targets.labels.tolist() == [0]
    assert targets.areas.tolist() == pytest.approx([320 / (48 * 64)])
    assert (targets.image_id, targets.size) == (3, (48, 64))
    assert targets.masks is None
    assert targets.keypoints is None


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    split = boxes_only(tmp_path)
    dataset = Dataset(split, STRONG, seed=1)
    keys = [SampleKey(epoch, index, SIZE) for epoch in range(3) for index in range(4)]
    first = {key: dataset[key] for key in keys}
    again = pickle.loads(pickle.dumps(Dataset(split, STRONG, seed=1)))  # as a worker process gets it
    for key in reversed(keys):
        assert same(again[key], first[key])
    assert not same(first[SampleKey(0, 0, SIZE)], first[SampleKey(1, 0, SIZE)])
    assert not same(first[SampleKey(0, 0, SIZE)], Dataset(split, STRONG, seed=2)[SampleKey(0, 0, SIZE)])


def test_a_repeated_image_is_augmented_anew(tmp_path: Path) -> None:
    dataset = Dataset(boxes_only(tmp_path), STRONG)
    assert not same(dataset[SampleKey(0, 0, SIZE)], dataset[SampleKey(0, 0, SIZE, repeat=1)])
    assert same(dataset[SampleKey(0, 0, SIZE, repeat=1)], dataset[SampleKey(0, 0, SIZE, repeat=1)])


def test_light_samples_are_without_mosaic(tmp_path: Path) -> None:
    split = boxes_only(tmp_path)
    augment = AugmentConfig(photometric=0, zoom_out=1, crop=0, flip=0, mosaic=1, mixup=1)
    light = Dataset(split, augment)[SampleKey(0, 2, SIZE, light=True)]
    assert same(light, Dataset(split)[SampleKey(0, 2, SIZE)])
    assert not same(Dataset(split, augment)[SampleKey(0, 2, SIZE)], light)


def test_unmixed_samples_are_those_of_a_run_without_mosaic_and_mixup(tmp_path: Path) -> None:
    """But for these two, all that is drawn stays as it was."""
    split = boxes_only(tmp_path)
    plain = STRONG.model_copy(update={"mosaic": 0.0, "mixup": 0.0})
    mixed, alone = Dataset(split, STRONG, seed=3), Dataset(split, plain, seed=3)
    different = 0
    for epoch in range(3):
        for index in range(4):
            sample = alone[SampleKey(epoch, index, SIZE)]
            assert same(mixed[SampleKey(epoch, index, SIZE, mixing=False)], sample)
            assert same(alone[SampleKey(epoch, index, SIZE, mixing=False)], sample)
            different += not same(mixed[SampleKey(epoch, index, SIZE)], sample)
    assert different > 5


def test_masks_are_drawn_at_the_stride_asked_for(tmp_path: Path) -> None:
    split = split_of(tmp_path, coco([annotation(segmentation=SQUARE)]), "masks")
    for stride, shape in ((1, (64, 96)), (2, (32, 48)), (4, (16, 24))):
        targets = Dataset(split, mask_stride=stride)[SampleKey(0, 0, SIZE)].targets
        assert targets is not None
        assert targets.masks is not None
        assert targets.masks.shape == (1, *shape)
        assert targets.masks.dtype == torch.uint8
        assert targets.masks.float().mean() == pytest.approx(320 / (48 * 64), abs=0.02)
    targets = Dataset(split, mask_stride=None)[SampleKey(0, 0, SIZE)].targets
    assert targets is not None
    assert targets.masks is None


def test_an_object_without_outline_has_an_empty_mask(tmp_path: Path) -> None:
    tree = coco([annotation(segmentation=SQUARE), annotation(), annotation(2)], images=3)
    dataset = Dataset(split_of(tmp_path, tree, "masks"))
    mixed, none, empty = (dataset[SampleKey(0, index, SIZE)].targets for index in range(3))
    assert mixed is not None
    assert none is not None
    assert empty is not None
    assert mixed.masks is not None
    assert mixed.masks.flatten(1).any(dim=1).tolist() == [True, False]
    assert none.masks is None  # nothing in the image says what its objects' outlines are
    assert empty.masks is not None  # there is nothing in the image, and that is known
    assert empty.masks.shape == (0, *SIZE)


def test_keypoints_of_images_with_and_without_objects(tmp_path: Path) -> None:
    tree = coco([annotation(1, category_id=1, keypoints=[16, 12, 2, 20, 24, 1, 0, 0, 0])], PEOPLE, images=2)
    dataset = Dataset(split_of(tmp_path, tree, "keypoints"))
    targets, empty = (dataset[SampleKey(0, index, SIZE)].targets for index in range(2))
    assert targets is not None
    assert targets.keypoints is not None
    np.testing.assert_allclose(targets.keypoints[0], [[0.25, 0.25, 2], [20 / 64, 0.5, 1], [0, 0, 0]], atol=1e-6)
    assert empty is not None
    assert empty.keypoints is not None
    assert empty.keypoints.shape == (0, 3, 3)
    assert empty.boxes.shape == (0, 4)


def test_crowds_are_no_targets(tmp_path: Path) -> None:
    tree = coco([annotation(bbox=[0, 0, 32, 24], iscrowd=1), annotation(bbox=[8, 8, 20, 16], category_id=7)])
    sample = Dataset(split_of(tmp_path, tree), AugmentConfig(photometric=0, zoom_out=0, crop=0, flip=1))[
        SampleKey(0, 0, SIZE)
    ]
    assert sample.targets is not None
    assert sample.targets.labels.tolist() == [1]
    np.testing.assert_allclose(sample.targets.boxes, [[1 - 18 / 64, 16 / 48, 20 / 64, 16 / 48]], atol=1e-6)


@pytest.mark.parametrize(
    "augment",
    [
        {"flip": 0.5, "vertical_flip": 0.5},
        {"crop": 1.0, "flip": 0.5},
        {"mosaic": 1.0},
        {"mosaic": 1.0, "mosaic_form": "whole"},
        {"rotate": 45.0},
        {"extra": [{"name": "Affine", "args": {"translate_percent": 0.4, "p": 1.0}}]},
    ],
)
def test_crowd_regions_go_with_their_pixels(tmp_path: Path, augment: dict[str, Any]) -> None:
    """They are red on black, also where so little of one is left that an object would be dropped."""
    corners = (20, 8, 60, 8, 60, 40, 40, 40, 40, 24, 20, 24)
    tree = coco([annotation(bbox=[2, 2, 6, 6], segmentation=[[2.0, 2, 8, 2, 8, 8, 2, 8]])])
    tree["annotations"].append(
        annotation(bbox=[20, 8, 40, 32], segmentation=[list(map(float, corners))], iscrowd=1, id=9)
    )
    split = split_of(tmp_path, tree, "masks")
    red = np.zeros((48, 64, 3), np.uint8)
    red[8:24, 20:60, 0] = red[24:40, 40:60, 0] = 255
    write_picture(tmp_path / "images" / "1.png", red)
    off = {"photometric": 0.0, "zoom_out": 0.0, "crop": 0.0, "flip": 0.0, "mosaic": 0.0, "mixup": 0.0}
    dataset, small = Dataset(split, AugmentConfig.model_validate({**off, **augment})), 0
    for epoch in range(60):
        sample = dataset[SampleKey(epoch, 0, (96, 128))]
        assert sample.image is not None
        assert sample.targets is not None
        shown = (sample.image[..., 0] > 128) & (sample.image[..., 1] < 64)
        if sample.targets.ignored is None:
            assert shown.sum() < 20
            continue
        assert sample.targets.ignored.shape == (96, 128)
        assert (sample.targets.ignored.numpy().astype(bool) != shown).mean() < 0.03
        small += 0 < shown.sum() < 0.07 * shown.size
        assert len(sample.targets) == 0 or sample.targets.labels.tolist() == [0] * len(sample.targets)
    assert small or "crop" not in augment


def test_a_crowd_without_outline_is_ignored_in_its_box(tmp_path: Path) -> None:
    tree = coco([annotation(bbox=[0, 0, 8, 8], segmentation=[[0.0, 0, 8, 0, 8, 8, 0, 8]])])
    tree["annotations"].append(annotation(bbox=[32, 24, 16, 12], iscrowd=1, id=9))
    for stride in (1, 4):
        targets = Dataset(split_of(tmp_path, tree, "masks"), mask_stride=stride)[SampleKey(0, 0, (48, 64))].targets
        assert targets is not None
        assert targets.ignored is not None
        expected = np.zeros((48 // stride, 64 // stride), np.uint8)
        expected[24 // stride : 36 // stride, 32 // stride : 48 // stride] = 1
        np.testing.assert_array_equal(targets.ignored, expected)
    assert Dataset(split_of(tmp_path, tree))[SampleKey(0, 0, SIZE)].targets.ignored is None  # type: ignore[union-attr]


def test_an_image_without_objects_is_a_sample(tmp_path: Path) -> None:
    dataset = Dataset(split_of(tmp_path, coco([], images=2)), STRONG)
    for epoch in range(10):
        sample = dataset[SampleKey(epoch, 0, SIZE)]
        assert sample.image is not None
        assert sample.targets is not None
        assert sample.targets.boxes.shape == (0, 4)


def test_what_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    write_set(tmp_path, coco([annotation()]))
    for field, needed in (("masks", "tasks instance-seg and semantic-seg need"), ("keypoints", "task keypoints needs")):
        split = CocoSplit(find_layout(tmp_path).split("train"), ("boxes", field))
        with pytest.raises(UserError, match=f"train.json: no object in it has .* the {needed}"):
            Dataset(split)


def test_damaged_images_are_replaced_in_training_and_named(tmp_path: Path) -> None:
    split = boxes_only(tmp_path)
    (tmp_path / "images" / "2.png").write_bytes(b"broken")
    dataset = Dataset(split, STRONG)
    sample = dataset[SampleKey(0, 1, SIZE)]
    assert sample.image is not None
    assert sample.targets is not None
    assert sample.targets.image_id != 2
    assert sample.skipped[0][0].endswith("2.png")
    assert "not an image" in sample.skipped[0][1]
    assert same(dataset[SampleKey(0, 1, SIZE)], sample)

    evaluated = Dataset(split)[SampleKey(0, 1, SIZE)]
    assert evaluated.image is None
    assert len(evaluated.skipped) == 1


def test_a_damaged_partner_of_a_mosaic_does_not_replace_the_image(tmp_path: Path) -> None:
    split = boxes_only(tmp_path, images=3)
    (tmp_path / "images" / "3.png").unlink()
    dataset = Dataset(split, AugmentConfig(mosaic=1))  # two of three mosaics have the damaged image in them
    samples = [dataset[SampleKey(epoch, 0, SIZE)] for epoch in range(20)]
    assert any(sample.skipped for sample in samples)
    assert all(sample.targets is not None and sample.targets.image_id == 1 for sample in samples)


def test_where_nothing_can_be_read_the_sample_says_so(tmp_path: Path) -> None:
    split = boxes_only(tmp_path, images=2)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    sample = Dataset(split, STRONG)[SampleKey(0, 0, SIZE)]
    assert sample.image is None
    assert {Path(path).name for path, _ in sample.skipped} == {"1.png", "2.png"}


def test_image_of_another_size_than_annotated(tmp_path: Path) -> None:
    split = boxes_only(tmp_path, images=2)
    write_picture(tmp_path / "images" / "1.png", picture(96, 128))  # the same picture, larger: labels are fractions
    write_picture(tmp_path / "images" / "2.png", picture(48, 48))
    dataset = Dataset(split)
    assert dataset[SampleKey(0, 0, SIZE)].image is not None
    sample = dataset[SampleKey(0, 1, SIZE)]
    assert sample.image is None
    assert sample.skipped[0][1] == "is 48 x 48, its annotations are for 64 x 48"


def test_labels_made_without_the_cameras_rotation(tmp_path: Path) -> None:
    from PIL import Image

    tree = coco([annotation()])
    tree["images"][0]["file_name"] = "1.jpg"
    split = split_of(tmp_path, tree)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "images" / "1.jpg", exif=exif)
    assert read_image(tmp_path / "images" / "1.jpg").shape == (64, 48, 3)
    assert Dataset(split).image(0).shape == (48, 64, 3)


def test_truth_is_in_pixels_for_drawing(tmp_path: Path) -> None:
    tree = coco([annotation(segmentation=SQUARE), annotation(iscrowd=1), annotation(2)], images=3)
    split = split_of(tmp_path, tree, "masks")
    (tmp_path / "images" / "2.png").unlink()
    dataset = Dataset(split)
    image, truth = dataset.truth(0)
    assert image.shape == (48, 64, 3)
    np.testing.assert_allclose(truth.boxes, [[8, 8, 28, 24]], atol=1e-4)
    assert truth.masks is not None
    assert truth.masks.dtype == bool
    assert truth.masks.areas.tolist() == [320]
    assert np.asarray(truth.masks).sum() == 320
    assert truth.names == ["cat", "dog"]
    assert [dataset.truth(index)[1].path for index in (0, 2)] == [str(dataset.path(0)), str(dataset.path(2))]
    with pytest.raises(BadImage, match=r"2\.png: No such file"):
        dataset.truth(1)


def test_cache_gives_the_same_samples_and_spares_the_files(tmp_path: Path) -> None:
    split = boxes_only(tmp_path)
    cached = Dataset(split, STRONG, cache=ImageCache(split.records))
    plain = Dataset(split, STRONG)
    keys = [SampleKey(0, index, SIZE) for index in range(4)]
    for key in keys:
        assert same(cached[key], plain[key])
    for index in range(4):
        cached.image(index)
    for file in (tmp_path / "images").iterdir():
        cv2.imwrite(str(file), np.zeros((48, 64, 3), np.uint8))
    for key in keys:
        assert cached[key].image.any()  # type: ignore[union-attr]
    assert not plain.image(0).any()


def test_cache_is_made_only_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = boxes_only(tmp_path).records
    needed = 4 * 48 * 64 * 3
    monkeypatch.setattr("mvision.data.loading.cache._budget", lambda: needed)
    cache = make_cache(records)
    assert cache is not None
    assert cache.get(0) is None
    cache.put(0, np.zeros((10, 10, 3), np.uint8))  # another size than annotated finds no room
    assert cache.get(0) is None
    monkeypatch.setattr("mvision.data.loading.cache._budget", lambda: needed - 1)
    assert make_cache(records) is None

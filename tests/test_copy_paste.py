"""Objects of another picture pasted into this one: labels of both go with what can be seen of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mvision.commands.data import show
from mvision.config import AugmentConfig, DataConfig
from mvision.data.augment import copy_paste
from mvision.data.augment.copy_paste import LARGEST, most_pasted, paste_objects
from mvision.data.augment.geometry import draw_masks, flip, tighten
from mvision.data.augment.transforms import TrainTransform
from mvision.data.formats.labels import PictureLabels
from mvision.data.loading.compare import objects_of_mixed
from mvision.data.loading.dataset import Dataset, SampleKey
from mvision.data.loading.loader import build_train_loader
from mvision.data.loading.sources import read_data_sources
from mvision.errors import UserError
from tests.coco_files import annotation, coco, write_set
from tests.test_augment_mixing import COLOURS, Pictures
from tests.test_mosaic import labels_of, rectangle
from tests.test_transforms import OFF

SIZE = (200, 200)  # that of the pictures: nothing is resampled but what is pasted
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def sample(seed: int, source: Any = None, swap: np.ndarray | None = None, **augment: Any) -> Any:
    config = AugmentConfig.model_validate({**OFF, "copy_paste": 1.0, **augment})
    return TrainTransform(config, swap)(source or Pictures(), seed % 5, SIZE, np.random.default_rng(seed))


def paste(
    monkeypatch: pytest.MonkeyPatch,
    labels: PictureLabels,
    other: np.ndarray,
    others: PictureLabels,
    window: tuple[int, int, int, int],
    flips: tuple[float, float] = (0.0, 0.0),
    swap: np.ndarray | None = None,
) -> Any:
    """The first object of another picture at a place of the test's choice in a black picture of 100 x 100 pixels."""
    monkeypatch.setattr(copy_paste, "_target", lambda region, size, rng: window)
    monkeypatch.setattr(copy_paste, "_choose", lambda labels, rng: [0])
    image = np.zeros((100, 100, 3), np.uint8)
    return paste_objects(image, labels, other, others, flips, swap, np.random.default_rng(0))


def painted(*parts: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> np.ndarray:
    """Rectangles on a picture of 100 x 100 pixels."""
    image = np.zeros((100, 100, 3), np.uint8)
    for (x0, y0, x1, y1), colour in parts:
        image[y0:y1, x0:x1] = colour
    return image


def test_every_mask_has_the_pixels_of_its_object_and_no_other() -> None:
    hidden, dropped = 0, 0
    for seed in range(60):
        image, labels = sample(seed)
        assert len(labels) in (1, 2)
        for mask, label, box, area, points in zip(
            draw_masks(labels, SIZE), labels.labels, labels.boxes, labels.areas, labels.keypoints
        ):
            np.testing.assert_array_equal(mask > 0, (image == COLOURS[label]).all(axis=-1))
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            np.testing.assert_allclose(box * 200, extent, atol=1e-6)
            assert area == pytest.approx(mask.mean(), rel=1e-6)
            x, y, visible = points[0]
            at = (image[int(y * 200), int(x * 200)] == COLOURS[label]).all()
            assert visible == (2 if at else 1), "a hidden keypoint is labelled but not visible"
            hidden += visible == 1
        dropped += len(labels) == 1
        assert labels.labels[-1] != seed % 5, "the pasted object is on top, and of another picture"
    assert hidden > 2
    assert dropped > 0


def test_pasted_objects_differ_in_place_and_size_and_leave_most_of_the_picture() -> None:
    boxes = np.array([sample(5 * seed)[1].boxes[-1] for seed in range(40)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.max() <= LARGEST + 0.01
    assert sides[:, 0].std() > 0.05
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (centres.std(axis=0) > 0.1).all()


def test_an_object_of_which_too_little_is_left_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labels_of([(0.4, 0.4, 0.6, 0.6)] * 2, [rectangle(0.4, 0.4, 0.6, 0.6)] * 2)
    labels.boxes[1] += (0, 0.2, 0, 0.2)
    labels.outlines[1] = rectangle(0.4, 0.6, 0.6, 0.8)  # type: ignore[index]
    red = painted(((0, 0, 40, 40), RED))
    others = labels_of([(0.0, 0.0, 0.4, 0.4)], [rectangle(0.0, 0.0, 0.4, 0.4)])
    _, seen = paste(monkeypatch, labels, red, others, (30, 26, 70, 66))
    np.testing.assert_allclose(seen.boxes, [(0.4, 0.66, 0.6, 0.8), (0.3, 0.26, 0.7, 0.66)])
    np.testing.assert_allclose(seen.areas, [0.2 * 0.14, 0.16])
    _, seen = paste(monkeypatch, labels, red, others, (30, 39, 70, 79))
    np.testing.assert_allclose(seen.boxes, [(0.3, 0.39, 0.7, 0.79)])


@pytest.mark.parametrize("flips", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_left_and_right_change_places_on_every_flip(
    flips: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The left half is red with the first keypoint, the right one blue; green is above. A picture upside down in a
    mirror has exchanged left and right too, as whole pictures have: only turned by both flips they stay."""
    other = painted(((10, 10, 30, 30), RED), ((30, 10, 50, 30), BLUE), ((10, 10, 50, 14), GREEN))
    points = [[(0.2, 0.25, 2), (0.4, 0.25, 2), (0.3, 0.12, 2)]]
    others = labels_of([(0.1, 0.1, 0.5, 0.3)], [rectangle(0.1, 0.1, 0.5, 0.3)], points)
    empty = labels_of([], [], np.zeros((0, 3, 3)))
    image, seen = paste(monkeypatch, empty, other, others, (50, 50, 90, 70), flips, np.array([[1, 0, 2]]))
    first, second, above = (image[int(y * 100), int(x * 100)].tolist() for x, y, _ in seen.keypoints[0])
    expected = (BLUE, RED) if sum(flips) == 1 else (RED, BLUE)
    assert (tuple(first), tuple(second), tuple(above)) == (*expected, GREEN)
    whole = others
    for axis in (0, 1):
        whole = flip(whole, axis, np.array([[1, 0, 2]])) if flips[axis] else whole
    order = np.sign(np.diff(whole.keypoints[0, :2, 0]))  # type: ignore[index]
    assert np.sign(np.diff(seen.keypoints[0, :2, 0])) == order, "as in a whole picture that is mirrored"
    assert (image[51, 70] == GREEN).all() != bool(flips[1])


def test_without_an_outline_the_surroundings_come_along_and_fade(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grey margin around red; and the labels of whatever else is seen in it."""
    other = painted(((0, 0, 100, 100), (200, 200, 200)), ((20, 20, 60, 60), RED), ((50, 30, 64, 40), BLUE))
    boxes = [(0.2, 0.2, 0.6, 0.6), (0.5, 0.3, 0.64, 0.4), (0.61, 0.5, 0.9, 0.9)]
    points = [[(0.3, 0.3, 2)], [(0.63, 0.35, 2)], [(0.8, 0.8, 2)]]
    below = labels_of([(0.0, 0.0, 1.0, 1.0)], keypoints=[[(0.7, 0.7, 2)]])
    image, seen = paste(monkeypatch, below, other, labels_of(boxes, keypoints=points), (40, 40, 88, 88))
    np.testing.assert_allclose(
        seen.boxes, [(0, 0, 1, 1), (0.44, 0.44, 0.84, 0.84), (0.74, 0.54, 0.86, 0.64)], atol=0.021
    )
    assert seen.labels.tolist() == [0, 0, 1], "of the third object next to nothing is in the part"
    np.testing.assert_allclose(seen.boxes[1], (0.44, 0.44, 0.84, 0.84))
    assert (image[60, 60] == RED).all()
    assert 0 < image[60, 40, 0] < 60 < image[60, 43, 0] < 200, "the margin fades to the border"
    assert seen.keypoints[0, 0].tolist() == [0.7, 0.7, 1]
    assert seen.keypoints[1, 0, 2] == 2


def test_a_box_shrinks_only_where_a_whole_strip_of_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [(0.1, 0.1, 0.5, 0.3), (0.6, 0.1, 0.9, 0.6)]
    red, others = painted(((0, 0, 40, 40), RED)), labels_of([(0.0, 0.0, 0.4, 0.4)], [rectangle(0, 0, 0.4, 0.4)])
    below = labels_of(boxes, [None, None])
    _, seen = paste(monkeypatch, below, red, others, (30, 5, 70, 45))
    np.testing.assert_allclose(seen.boxes[0], (0.1, 0.1, 0.3, 0.3))
    np.testing.assert_allclose(seen.boxes[1], boxes[1])
    np.testing.assert_allclose(seen.areas[:2], [0.04, 0.3 * 0.5 - 0.1 * 0.35])
    assert seen.outlines[:2].tolist() == [None, None], "a mask that is not known stays unknown"


def test_what_lies_in_a_cut_out_object_keeps_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blue button on red, and green beside it that the outline leaves out."""
    other = painted(((0, 0, 40, 20), RED), ((0, 20, 20, 40), RED), ((5, 5, 15, 15), BLUE), ((25, 25, 40, 40), GREEN))
    shape = [np.array([(0, 0), (0.4, 0), (0.4, 0.2), (0.2, 0.2), (0.2, 0.4), (0, 0.4)])]
    outlines = [shape, rectangle(0.05, 0.05, 0.15, 0.15), rectangle(0.25, 0.25, 0.4, 0.4), None]
    boxes = [(0, 0, 0.4, 0.4), (0.05, 0.05, 0.15, 0.15), (0.25, 0.25, 0.4, 0.4), (0.25, 0.1, 0.35, 0.3)]
    points = [[(0.3, 0.3, 1)], [(0.1, 0.1, 2)], [(0.3, 0.3, 2)], [(0.3, 0.2, 2)]]
    empty = labels_of([], [], np.zeros((0, 1, 3)))
    image, seen = paste(monkeypatch, empty, other, labels_of(boxes, outlines, points), (50, 50, 90, 90))
    assert seen.labels.tolist() == [0, 1]
    np.testing.assert_allclose(seen.boxes, [(0.5, 0.5, 0.9, 0.9), (0.55, 0.55, 0.65, 0.65)])
    assert not (image == GREEN).all(axis=-1).any()
    assert seen.keypoints[:, 0].round(6).tolist() == [[0.8, 0.8, 1], [0.6, 0.6, 2]]


def test_a_keypoint_beside_the_cut_out_part_is_not_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    other = painted(((0, 0, 40, 40), RED), ((10, 20, 30, 40), BLUE))
    outlines = [rectangle(0, 0, 0.4, 0.3), rectangle(0.1, 0.2, 0.3, 0.4)]
    others = labels_of(
        [(0, 0, 0.4, 0.4), (0.1, 0.2, 0.3, 0.4)], outlines, [[(0, 0, 0)] * 2, [(0.2, 0.25, 2), (0.2, 0.35, 2)]]
    )
    empty = labels_of([], [], np.zeros((0, 2, 3)))
    _, seen = paste(monkeypatch, empty, other, others, (50, 50, 90, 90))
    assert seen.keypoints[1, :, 2].tolist() == [2, 0]
    np.testing.assert_allclose(seen.boxes[1], (0.6, 0.7, 0.8, 0.8))


def test_an_outline_without_a_pixel_is_not_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = labels_of([(0.1, 0.1, 0.1001, 0.5)], [rectangle(0.1, 0.1, 0.1001, 0.5)])
    below = labels_of([(0.4, 0.4, 0.6, 0.6)], [rectangle(0.4, 0.4, 0.6, 0.6)])
    image, seen = paste(monkeypatch, below, painted(((0, 0, 40, 40), RED)), thin, (50, 50, 51, 90))
    assert not image.any()
    assert len(seen) == 1


def test_a_damaged_image_to_paste_from_is_named_and_the_sample_made_anew(squares: Path) -> None:
    (squares / "images" / "train_1.jpg").write_bytes(b"")
    config = DataConfig.model_validate({"root": str(squares)})
    (source,) = read_data_sources(config, ["detection"], 0, lambda _: None)
    dataset = Dataset(source.train, AugmentConfig.model_validate({**OFF, "copy_paste": 1.0}))
    samples = [dataset[SampleKey(epoch, 0, (64, 64))] for epoch in range(12)]
    skipped = {file for one in samples for file, _ in one.skipped}
    assert skipped == {str(squares / "images" / "train_1.jpg")}
    assert {one.targets.image_id for one in samples if one.targets is not None} == {1}


def test_crowds_are_not_pasted_and_stay_crowds_below() -> None:
    class WithCrowds(Pictures):
        def labels(self, index: int) -> PictureLabels:
            labels = super().labels(index)
            labels.crowd = np.full(1, index != 3)
            return labels

    for seed in range(20):
        _, labels = sample(seed, WithCrowds())
        assert [bool(crowd) for crowd in labels.crowd] == [label != 3 for label in labels.labels]
        assert labels.labels.tolist()[1:] in ([], [3])


def test_at_most_half_of_the_objects_are_pasted() -> None:
    assert [most_pasted(count) for count in (1, 2, 3, 10, 39, 1000)] == [1, 1, 2, 5, 20, 20]
    others = labels_of([(0.1 * i, 0, 0.1 * i + 0.1, 0.1) for i in range(9)])
    counts = {len(copy_paste._choose(others, np.random.default_rng(seed))) for seed in range(60)}
    assert counts == {1, 2, 3, 4, 5}


def test_pasting_goes_with_mosaic_mixup_cuts_and_turns() -> None:
    """Every label lies on a picture with its colour, whatever else is on."""
    for seed in range(30):
        image, labels = sample(seed, mosaic=0.5, crop=0.5, rotate=40, scale=0.3, flip=0.5, vertical_flip=0.5)
        for mask, label, box in zip(draw_masks(labels, SIZE), labels.labels, labels.boxes):
            lit = np.abs(image.astype(int) - COLOURS[label]).max(axis=-1) < 90
            assert (mask.astype(bool) & lit).sum() > 0.8 * mask.sum()
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            np.testing.assert_allclose(box * 200, extent, atol=2)
    counts = [len(sample(seed, mixup=1.0)[1]) for seed in range(20)]
    assert max(counts) == 3


def test_pasting_ends_with_the_mixing_and_at_the_end_of_the_run(squares: Path) -> None:
    config = AugmentConfig.model_validate({**OFF, "copy_paste": 1.0})
    transform = TrainTransform(config)
    for quiet in (transform.unmixed(), transform.light()):
        for seed in range(5):
            _, labels = quiet(Pictures(), seed, SIZE, np.random.default_rng(seed))
            assert labels.labels.tolist() == [seed]


def test_without_objects_elsewhere_nothing_is_pasted() -> None:
    class Alone(Pictures):
        def labels(self, index: int) -> PictureLabels:
            labels = super().labels(index)
            return labels if index == 0 else labels[np.zeros(0, dtype=np.int64)]

    image, labels = sample(0, Alone())
    assert labels.labels.tolist() == [0]
    np.testing.assert_array_equal(image, Pictures().image(0))


@pytest.mark.parametrize(("key", "value"), [("copy_paste", 1.1), ("copy_paste", -0.1), ("rotate", 181), ("scale", 1)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        AugmentConfig.model_validate({key: value})


@pytest.mark.parametrize(
    ("outlines", "tasks"), [(True, ["detection"]), (False, ["detection"]), (True, ["instance-seg"])]
)
def test_masks_are_read_to_cut_along_but_only_the_tasks_decide_on_the_targets(
    squares: Path, tmp_path: Path, outlines: bool, tasks: list[str]
) -> None:
    root = squares
    if not outlines:
        root = tmp_path / "boxes"
        for split in ("train", "val"):
            write_set(root, coco([annotation(n % 4 + 1, [4, 4, 20, 20]) for n in range(8)], images=4), split)
    for augment in ({}, {"copy_paste": 1.0}, {"rotate": 20.0}):
        config = DataConfig.model_validate({"root": str(root), "augment": {**OFF, **augment}, "workers": 0})
        (source,) = read_data_sources(config, tasks, 0, lambda _: None)
        wanted = (outlines and bool(augment)) or tasks == ["instance-seg"]
        assert ("masks" in source.train.fields) == (source.train.labels.outlines is not None) == wanted
        assert ("masks" in source.val.fields) == (tasks == ["instance-seg"])
        loader = build_train_loader([source], config, batch_size=4, image_size=(64, 64))
        for batch in loader.epoch(0):
            assert all((one.masks is not None) == (tasks == ["instance-seg"]) for one in batch.targets)


def test_samples_are_the_same_with_any_number_of_workers(squares: Path) -> None:
    augment = {"copy_paste": 0.7, "rotate": 30, "scale": 0.3, "mosaic": 0.3}
    batches = []
    for workers in (0, 2):
        config = DataConfig.model_validate({"root": str(squares), "augment": augment, "workers": workers})
        sources = read_data_sources(config, ["instance-seg"], 0, lambda _: None)
        loader = build_train_loader(sources, config, batch_size=2, image_size=(64, 64))
        batches.append([batch for epoch in range(3) for batch in loader.epoch(epoch)])
        loader.close()
    for first, second in zip(*batches, strict=True):
        assert (first.images == second.images).all()
        for one, other in zip(first.targets, second.targets, strict=True):
            assert (one.boxes == other.boxes).all()
            assert one.masks is not None
            assert other.masks is not None
            assert (one.masks == other.masks).all()


def test_the_number_of_objects_with_pasted_ones_is_foreseen(squares: Path) -> None:
    config = DataConfig.model_validate({"root": str(squares)})
    (source,) = read_data_sources(config, ["detection"], 0, lambda _: None)
    augment = AugmentConfig.model_validate({**OFF, "copy_paste": 0.5})
    dataset = Dataset(source.train, augment)
    found = [len(dataset[SampleKey(n, n % 4, (64, 64))].targets or ()) for n in range(200)]
    assert np.mean(objects_of_mixed(source.train, augment)) == pytest.approx(np.mean(found), rel=0.1)


def test_the_sheet_of_a_data_set_shows_the_augmentation_of_a_config(squares: Path, tmp_path: Path) -> None:
    sheets = []
    for name, extra in (("plain", []), ("pasted", ["data.augment.copy_paste=1", "data.augment.rotate=30"])):
        off = ["data.augment.mosaic=0", "data.augment.mixup=0", "data.augment.photometric=0", *extra]
        show(str(squares), str(tmp_path / f"{name}.png"), count=2, augmented=True, assignments=off)
        sheets.append((tmp_path / f"{name}.png").read_bytes())
    assert sheets[0] != sheets[1]
    with pytest.raises(UserError, match="--augmented"):
        show(str(squares), str(tmp_path / "sheet.png"), assignments=["data.augment.copy_paste=1"])


def test_a_cut_object_that_is_hidden_in_part_is_measured_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    below = labels_of([(0.0, 0.2, 0.4, 0.6)], [rectangle(-0.2, 0.2, 0.4, 0.6)])
    below.cut[:] = True
    red, others = painted(((0, 0, 40, 40), RED)), labels_of([(0.0, 0.0, 0.4, 0.4)], [rectangle(0, 0, 0.4, 0.4)])
    _, seen = paste(monkeypatch, below, red, others, (0, 50, 40, 90))
    measured = tighten(seen, (100, 100))
    np.testing.assert_allclose(measured.boxes[0], (0.0, 0.2, 0.4, 0.5))
    assert measured.areas[0] == pytest.approx(0.12)

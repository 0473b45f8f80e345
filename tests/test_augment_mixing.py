"""Mosaic and mixup of different pictures: every object keeps the label of the picture that it comes from."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from mvision.config import AugmentConfig
from mvision.data.augment.transforms import MIXUP_WEIGHTS, TrainTransform
from mvision.data.formats.labels import Labels, PictureLabels
from mvision.data.formats.segmentation import Outlines
from tests.test_transforms import OFF

SIZE = (192, 192)
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)], dtype=np.uint8)


class Pictures:
    """Five pictures: picture i is black, with one rectangle of colour i and class i at a place and size of its own."""

    def __init__(self) -> None:
        self.boxes = np.array([(0.1 + 0.02 * i, 0.1, 0.5 + 0.08 * i, 0.6 + 0.07 * i) for i in range(5)])
        self.pictures = []
        for colour, box in zip(COLOURS.tolist(), (self.boxes * 200).round().astype(int).tolist()):
            picture = np.zeros((200, 200, 3), np.uint8)
            cv2.rectangle(picture, (box[0], box[1]), (box[2] - 1, box[3] - 1), colour, -1)
            self.pictures.append(picture)

    def __len__(self) -> int:
        return 5

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        return self.pictures[index]

    def aspect(self, index: int) -> float:
        return 1.0

    def labels(self, index: int) -> PictureLabels:
        x0, y0, x1, y1 = self.boxes[index]
        outline = [np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])]
        return Labels(
            self.boxes[index : index + 1],
            np.array([index]),
            np.array([(x1 - x0) * (y1 - y0)]),
            np.zeros(1, dtype=bool),
            np.array([[[(x0 + x1) / 2, (y0 + y1) / 2, 2.0]]]),
            Outlines([outline]),
        ).picture(slice(None))


def sample(seed: int, **augment: Any) -> tuple[np.ndarray, PictureLabels]:
    transform = TrainTransform(AugmentConfig.model_validate({**OFF, **augment}))
    return transform(Pictures(), seed % 5, SIZE, np.random.default_rng(seed))


def colour_at(image: np.ndarray, x: float, y: float) -> list[int]:
    return image[min(int(y * SIZE[0]), SIZE[0] - 1), min(int(x * SIZE[1]), SIZE[1] - 1)].tolist()


def classes_in(image: np.ndarray) -> set[int]:
    """Those whose colour covers more than a tenth of the largest tile, as less of an object may go unlabelled."""
    return {label for label, colour in enumerate(COLOURS) if (image == colour).all(axis=-1).sum() > 128 * 128 / 10}


@pytest.mark.parametrize("form", ["filled", "whole"])
@pytest.mark.parametrize("mirror", [{}, {"flip": 0.5, "vertical_flip": 0.5}], ids=["plain", "flips"])
def test_every_tile_of_a_mosaic_has_its_own_labels(mirror: dict[str, Any], form: str) -> None:
    different = 0
    for seed in range(30):
        image, labels = sample(seed, mosaic=1.0, mosaic_form=form, **mirror)
        assert set(labels.labels.tolist()) >= classes_in(image)
        for box, label, keypoints in zip(labels.boxes, labels.labels, labels.keypoints):  # type: ignore[arg-type]
            assert colour_at(image, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2) == COLOURS[label].tolist()
            x, y, visible = keypoints[0]
            if visible:
                assert colour_at(image, x, y) == COLOURS[label].tolist()
        different += len(set(labels.labels.tolist())) > 1
    assert different > 20


def test_mixup_joins_the_labels_of_both_pictures() -> None:
    pairs = set()
    source = Pictures()
    for seed in range(30):
        image, labels = sample(seed, mixup=1.0)
        first, second = labels.labels.tolist()
        assert first == seed % 5
        np.testing.assert_allclose(labels.boxes, source.boxes[[first, second]], atol=1e-12)
        one, other = (cv2.resize(source.pictures[i], SIZE[::-1], interpolation=cv2.INTER_AREA) for i in (first, second))
        lit = (one.max(axis=-1) > 250) & (other.max(axis=-1) < 5)
        if lit.any():
            weight = image[lit].max(axis=-1).mean() / 255
            assert MIXUP_WEIGHTS[0] - 0.01 <= weight <= MIXUP_WEIGHTS[1] + 0.01
            blend = one.astype(float) * weight + other * (1 - weight)
            assert np.abs(image - blend).mean() < 0.5
        pairs.add((first, second))
        assert first != second, "every object would be there twice"
    assert len(pairs) > 12
    assert {second for _, second in pairs} == set(range(5))


@pytest.mark.parametrize("form", ["filled", "whole"])
def test_the_first_picture_of_a_mosaic_is_always_in_it(form: str) -> None:
    class Recorded(Pictures):
        def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
            shown.append(index)
            return super().image(index, at_least)

    transform = TrainTransform(AugmentConfig.model_validate({**OFF, "mosaic": 1.0, "mosaic_form": form}))
    for seed in range(10):
        shown: list[int] = []
        transform(Recorded(), 3, SIZE, np.random.default_rng(seed))
        assert len(shown) == 4
        assert 3 in shown


def test_tiles_meet_on_multiples_of_the_coarsest_stride() -> None:
    class White(Pictures):
        def __init__(self) -> None:
            super().__init__()
            self.boxes = np.tile((0.0, 0.0, 1.0, 1.0), (5, 1))

    corners = set()
    for seed in range(12):
        transform = TrainTransform(AugmentConfig.model_validate({**OFF, "mosaic": 1.0}))
        labels = transform(White(), 0, SIZE, np.random.default_rng(seed))[1]
        assert len(labels) == 4
        sides = (labels.windows * 192).round(6)
        assert (sides % 32 == 0).all()
        corners.add(tuple(sides.min(axis=0)[2:].tolist()))
    assert len(corners) > 1

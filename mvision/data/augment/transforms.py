"""Training augmentation, and the plain stretch of evaluation: the images of a sample, the part of each, the colours.

Geometry is our own (``geometry.py``: one resampling per image, labels in closed form); albumentations changes the
colours here, and has transforms that a config may add (``extra.py``).
"""

from __future__ import annotations

import math
from typing import Protocol

import cv2
import numpy as np

from mvision.compat import albumentations_alone
from mvision.config import AugmentConfig
from mvision.data.augment.affine import turn_placed, turned_view, warp
from mvision.data.augment.copy_paste import paste_objects
from mvision.data.augment.extra import ExtraTransforms
from mvision.data.augment.geometry import FILL, PixelRect, Placement, Rect, fit, flip, paint, place, tighten
from mvision.data.augment.mosaic import ANGLE, Turn, mosaic_of_whole
from mvision.data.formats.labels import WHOLE, PictureLabels, join_labels

with albumentations_alone():
    import albumentations as A

# Largest side of the canvas in sides of the image. RT-DETR has 4, where small objects vanish at an input of 320 pixels.
ZOOM_OUT = 2.0
CROP_SCALES = (0.3, 1.0)  # sides of a crop in sides of the image (SSD, section 2.2, as in torchvision's RandomIoUCrop)
CROP_ASPECTS = (0.5, 2.0)
CROP_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
CROP_TRIALS = 40
MOSAIC_CENTRES = (0.3, 0.7)
MIXUP_WEIGHTS = (0.4, 0.6)  # about half and half: every object stays visible and keeps its full label
PASTE_TRIALS = 5  # images that are looked at for one with an object to paste
MIXING = ("mosaic", "mixup", "copy_paste")  # settings of augmentation that puts several images into one picture
GRID = 32  # mosaic tiles meet at multiples of the coarsest stride, so that no feature or mask cell sees two images

# Deviations of RT-DETR's RandomPhotometricDistort: factors from 1, and parts of the colour wheel.
PHOTOMETRIC = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5}
HUE = 0.05
DARKEST = 0.2  # factor, however strong


class Source(Protocol):
    """Images and their labels by index; ``Dataset`` is one."""

    def __len__(self) -> int: ...

    def labels(self, index: int) -> PictureLabels:
        """Labels of an image, in fractions of it."""
        ...

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8; ``at_least`` (height, width) allows a smaller decoding. Raises ``BadImage``."""
        ...

    def aspect(self, index: int) -> float:
        """Width by height."""
        ...


class EvalTransform:
    """The whole image stretched to the input size, as in prediction."""

    def __call__(
        self, source: Source, index: int, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, PictureLabels]:
        """(h, w, 3) uint8 and the labels in fractions of it."""
        return _view(source, index, WHOLE, size, at_least=None)


def fields_of_augmentation(config: AugmentConfig) -> frozenset[str]:
    """The fields of ``Targets`` that help to augment pictures, also where nothing is learned from them: objects are
    best cut out along their masks, and the box of a turned object is best measured on its mask."""
    return frozenset({"masks"} if config.copy_paste or config.rotate else ())


class TrainTransform:
    """Random views, flips and colours."""

    def __init__(self, config: AugmentConfig, swap: np.ndarray | None = None) -> None:
        """Prepare the transform.

        Args:
            config: probabilities and strengths.
            swap: see ``geometry.mirror_keypoints``.

        Raises:
            UserError: ``config.extra`` names a transform or an argument that does not exist.
        """
        self.config = config
        self.swap = swap
        strength = config.photometric_strength
        factors = {name: (max(1 - strength * d, DARKEST), 1 + strength * d) for name, d in PHOTOMETRIC.items()}
        hue = min(strength * HUE, 0.5)
        self.photometric = A.ColorJitter(**factors, hue=(-hue, hue), p=1.0)
        self.extra = ExtraTransforms(config.extra, swap) if config.extra else None

    def unmixed(self) -> TrainTransform:
        """The same without mosaic, mixup and pasted objects."""
        return TrainTransform(self.config.model_copy(update=dict.fromkeys(MIXING, 0.0)), self.swap)

    def light(self) -> TrainTransform:
        """The same without mosaic, mixup, pasted objects and zoom-out, for the end of a run."""
        return TrainTransform(self.config.model_copy(update=dict.fromkeys((*MIXING, "zoom_out"), 0.0)), self.swap)

    def __call__(
        self, source: Source, index: int, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, PictureLabels]:
        """One training sample: (h, w, 3) uint8 and its labels in fractions of it.

        All chance comes from ``rng``. Objects of which next to nothing is visible, or less than a pixel, are dropped.
        """
        image, labels = self._picture(source, index, size, rng)
        if self.config.copy_paste and rng.random() < self.config.copy_paste:
            image, labels = self._with_pasted(image, labels, source, index, rng)
        if rng.random() < self.config.mixup:
            other, more = self._picture(source, _another(source, index, rng), size, rng)
            image = _blend(image, other, rng.uniform(*MIXUP_WEIGHTS))
            labels = join_labels((labels, more))
        if rng.random() < self.config.flip:
            image, labels = cv2.flip(image, 1), flip(labels, 0, self.swap)
        if rng.random() < self.config.vertical_flip:
            image, labels = cv2.flip(image, 0), flip(labels, 1, self.swap)
        if rng.random() < self.config.photometric:
            self.photometric.set_random_seed(int(rng.integers(2**31)))
            image = self.photometric(image=image)["image"]
        labels = _measured(labels, size)
        if self.extra is not None:
            image, labels = self.extra(image, labels, rng)
            labels = _measured(labels, size)
        return image, labels

    def _picture(
        self, source: Source, index: int, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, PictureLabels]:
        config = self.config
        if rng.random() < config.mosaic:
            mosaic = _mosaic if config.mosaic_form == "filled" else _mosaic_of_whole
            return mosaic(source, index, size, rng, math.radians(config.rotate))
        view = WHOLE
        if rng.random() < config.zoom_out:
            view = zoom_out(rng)
        if config.scale:
            view = rescale(view, config.scale, rng)
        if rng.random() < config.crop:
            view = crop(source.labels(index), view, source.aspect(index), rng)
        if config.rotate:
            return _turned(source, index, view, size, _angle(math.radians(config.rotate), rng))
        return _view(source, index, view, size, at_least=size)

    def _with_pasted(
        self, image: np.ndarray, labels: PictureLabels, source: Source, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, PictureLabels]:
        """With objects of another image of ``source``."""
        for _ in range(PASTE_TRIALS):
            other = _another(source, index, rng)
            if not source.labels(other).crowd.all():  # else it has no object
                pasted = source.image(other, (image.shape[0], image.shape[1]))
                flips = (self.config.flip, self.config.vertical_flip)
                return paste_objects(image, labels, pasted, source.labels(other), flips, self.swap, rng)
        return image, labels


def _measured(labels: PictureLabels, size: tuple[int, int]) -> PictureLabels:
    """Boxes of cut objects as their masks have them; objects smaller than a pixel are dropped."""
    labels = tighten(labels, size)
    sides = (labels.boxes[:, 2:] - labels.boxes[:, :2]) * (size[1], size[0])
    return labels[sides.prod(axis=1) >= 1.0]


def zoom_out(rng: np.random.Generator) -> Rect:
    """A view larger than the image (SSD's "expansion"), the image anywhere in it."""
    side = rng.uniform(1.0, ZOOM_OUT)
    x, y = rng.uniform(0.0, side - 1.0, size=2)
    return (-x, -y, side - x, side - y)


def rescale(view: Rect, change: float, rng: np.random.Generator) -> Rect:
    """A view that shows the image larger or smaller by up to ``change``: anywhere in ``view``, or around it."""
    factor = 1 / rng.uniform(1 - change, 1 + change)
    sides = np.array((view[2] - view[0], view[3] - view[1]))
    corner = np.array(view[:2]) + rng.random(2) * sides * (1 - factor)
    return (*corner.tolist(), *(corner + sides * factor).tolist())


def crop(labels: PictureLabels, view: Rect, aspect: float, rng: np.random.Generator) -> Rect:
    """A random part of ``view`` with at least one object's centre in it (SSD's sampling).

    A minimum share is drawn at random; every object whose centre lies in the crop has to keep at least that share of
    its area. (SSD asks for an overlap of object and crop, which small objects can never reach.) If none of the trials
    meets this, the view stays as it is. An image without objects is cropped anywhere.
    """
    overlap = rng.choice(CROP_OVERLAPS)
    sides = rng.uniform(*CROP_SCALES, size=(CROP_TRIALS, 2))
    corners = rng.random((CROP_TRIALS, 2)) * (1 - sides)
    extent = np.array((view[2] - view[0], view[3] - view[1]))
    low = np.array(view[:2]) + corners * extent
    high = low + sides * extent
    shape = (sides[:, 0] * extent[0] * aspect) / (sides[:, 1] * extent[1])
    good = (shape >= CROP_ASPECTS[0] * min(aspect, 1.0)) & (shape <= CROP_ASPECTS[1] * max(aspect, 1.0))
    boxes = labels.boxes[~labels.crowd]
    if len(boxes):
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres > low[:, None]) & (centres < high[:, None])).all(axis=-1)  # (trials, objects)
        left = np.minimum(boxes[:, 2:], high[:, None]) - np.maximum(boxes[:, :2], low[:, None])
        shares = left.clip(min=0).prod(axis=-1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1).clip(min=1e-12)
        good &= inside.any(axis=1) & (~inside | (shares >= overlap)).all(axis=1)
    found = np.flatnonzero(good)
    if len(found) == 0:
        return view
    return (*low[found[0]].tolist(), *high[found[0]].tolist())


def _view(
    source: Source, index: int, view: Rect, size: tuple[int, int], at_least: tuple[int, int] | None
) -> tuple[np.ndarray, PictureLabels]:
    """One view of one image on a canvas of its own."""
    height, width = size
    window = (0, 0, width, height)
    canvas = np.full((height, width, 3), FILL, dtype=np.uint8)
    image, placement = _placed(source, index, view, window, size, reduced=at_least is not None)
    if placement is None:
        return canvas, source.labels(index)[np.zeros(0, dtype=np.int64)]
    return paint(image, placement, canvas), place(source.labels(index), placement)


def _turned(
    source: Source, index: int, view: Rect, size: tuple[int, int], angle: float
) -> tuple[np.ndarray, PictureLabels]:
    """One view of one image on a canvas of its own, turned about its middle by an angle in radians."""
    image = source.image(index, _enough(view, size))
    sides = (view[2] - view[0], view[3] - view[1])
    found = turned_view(view, angle, source.aspect(index) * sides[0] / sides[1], image.shape[:2], size)
    if found is None:
        return np.full((*size, 3), FILL, dtype=np.uint8), source.labels(index)[np.zeros(0, dtype=np.int64)]
    placement, matrix = found
    raster = paint(image, placement, np.empty((*placement.canvas_size, 3), dtype=np.uint8))
    return warp(raster, matrix, size, FILL), turn_placed(source.labels(index), placement, matrix, size)


def _angle(most: float, rng: np.random.Generator) -> float:
    return float(rng.uniform(-most, most))


def _mosaic(
    source: Source, index: int, size: tuple[int, int], rng: np.random.Generator, angle: float
) -> tuple[np.ndarray, PictureLabels]:
    """Four images that meet in one point, each enlarged at random so that it fills its tile without a border.

    Where the ``angle`` in radians is above 0, each is turned in its tile by at most that, with grey in the corners that
    its image does not reach.
    """
    height, width = size
    x, y = (_on_grid(side, rng) for side in (width, height))
    tiles: list[PixelRect] = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    members = [index, *(int(member) for member in rng.integers(len(source), size=3))]
    canvas = np.full((height, width, 3), FILL, dtype=np.uint8)
    tile_labels = []
    for tile, member in zip(rng.permutation(4), members):
        window = tiles[tile]
        sides = np.array(((window[2] - window[0]) / width, (window[3] - window[1]) / height))
        extent = sides / rng.uniform(sides.max(), 1.0)  # of the view in the image; both sides at most 1
        corner = rng.random(2) * (1 - extent)
        view = (*corner.tolist(), *(corner + extent).tolist())
        if angle:
            area = (window[3] - window[1], window[2] - window[0])
            canvas[window[1] : window[3], window[0] : window[2]], turned = _turned(
                source, member, view, area, _angle(angle, rng)
            )
            tile_labels.append(place(turned, Placement((0, 0, *area[::-1]), window, area, size), window))
            continue
        image, placement = _placed(source, member, view, window, size, reduced=True)
        if placement is not None:
            canvas = paint(image, placement, canvas)
            tile_labels.append(place(source.labels(member), placement, window))
    return canvas, join_labels(tile_labels)


def _mosaic_of_whole(
    source: Source, index: int, size: tuple[int, int], rng: np.random.Generator, angle: float
) -> tuple[np.ndarray, PictureLabels]:
    """See ``mosaic_of_whole``; the image of the sample is any of the four. ``angle``: the largest one, in radians."""
    turn = Turn.draw(rng, max(angle, ANGLE))
    members = rng.permutation([index, *rng.integers(len(source), size=3)]).tolist()
    pictures = [(source.image(member, turn.quarter(size)), source.labels(member)) for member in members]
    return mosaic_of_whole(pictures, turn, size, source.aspect(index), around_points=angle > 0)


def _another(source: Source, index: int, rng: np.random.Generator) -> int:
    """A random image to blend with, not the same one if there are others: its objects would be there twice."""
    other = int(rng.integers(len(source)))
    return (other + 1) % len(source) if other == index else other


def _placed(
    source: Source, index: int, view: Rect, window: PixelRect, size: tuple[int, int], reduced: bool
) -> tuple[np.ndarray, Placement | None]:
    """An image, and its place on the canvas; where ``reduced``, it is decoded no larger than the view needs."""
    image = source.image(index, _enough(view, (window[3] - window[1], window[2] - window[0])) if reduced else None)
    return image, fit(view, (image.shape[0], image.shape[1]), window, size)


def _enough(view: Rect, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image of which the ``view`` has this (height, width)."""
    return int(np.ceil(size[0] / (view[3] - view[1]))), int(np.ceil(size[1] / (view[2] - view[0])))


def _on_grid(side: int, rng: np.random.Generator) -> int:
    position = round(rng.uniform(*MOSAIC_CENTRES) * side / GRID) * GRID
    return int(min(max(position, GRID), side - GRID)) if side >= 2 * GRID else side // 2


def _blend(image: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray:
    mixed = image.astype(np.float32) * weight + other.astype(np.float32) * (1 - weight)
    return mixed.round().astype(np.uint8)

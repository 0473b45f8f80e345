"""A sheet of pictures with their labels drawn on them."""

from __future__ import annotations

import math

import cv2
import numpy as np

from mvision.config import AugmentConfig
from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import EVERYTHING, Layout
from mvision.data.loading.dataset import Dataset
from mvision.errors import UserError
from mvision.structures.images import BadImage, resize_image

GAP = 4  # pixels between pictures
WHITE = 255


def contact_sheet(
    layout: Layout,
    split: str = "train",
    count: int = 16,
    tile: int = 400,
    seed: int = 0,
    augment: AugmentConfig | None = None,
) -> np.ndarray:
    """Random images of a split with boxes, masks and keypoints drawn.

    Args:
        layout: from ``find_layout``.
        split: its name.
        count: number of pictures; each appears once, so there are at most as many as the split has.
        tile: longer side of one picture in pixels.
        seed: which images, and which augmentation.
        augment: show the images as training sees them, stretched to a square.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: no such split, broken annotations, or none of the chosen images can be read.
    """
    annotations = CocoSplit(layout.split(split, EVERYTHING), FIELDS)
    dataset = Dataset(annotations, augment, seed, validate=False)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    pictures, reasons = [], []
    for index in chosen.tolist():
        try:
            pictures.append(_picture(dataset, index, tile, augmented=augment is not None))
        except BadImage as error:
            reasons.append(str(error))
    if not pictures:
        raise UserError(f"none of the {len(chosen)} chosen images can be read: {'; '.join(reasons[:3])}")
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    side = tile + GAP
    sheet = np.full((rows * side - GAP, columns * side - GAP, 3), WHITE, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * side, place % columns * side
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def write_image(path: str, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as the kind of file that the suffix says.

    Raises:
        UserError: the suffix is unknown or the file cannot be written.
    """
    try:
        written = cv2.imwrite(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise UserError(f"{path}: no picture format of that suffix: use .png or .jpg") from error
    if not written:
        raise UserError(f"{path}: cannot be written")


def _picture(dataset: Dataset, index: int, tile: int, augmented: bool) -> np.ndarray:
    """Labels are drawn after resizing, so that lines are equally thin on every picture."""
    if augmented:
        image, labels = dataset.transform(dataset, index, (tile, tile), np.random.default_rng((dataset.seed, index)))
    else:
        image, labels = dataset.image(index), dataset.labels(index)
        ratio = tile / max(image.shape[:2])
        image = resize_image(image, (max(round(image.shape[0] * ratio), 1), max(round(image.shape[1] * ratio), 1)))
    labels = labels[~labels.crowd]
    return dataset.to_instances(labels, (image.shape[0], image.shape[1])).draw(image)

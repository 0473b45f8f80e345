"""A sheet of images with their labels drawn on them, for ``mvision data show``."""

from __future__ import annotations

import numpy as np

from mvision.config import AugmentConfig
from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import Layout
from mvision.data.loading.dataset import Dataset
from mvision.data.loading.pixel_range import choose_pixel_range
from mvision.drawing import draw_instances, grid
from mvision.errors import UserError
from mvision.structures.images import BadImage, resize_image, write_image

__all__ = ["contact_sheet", "write_image"]


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
        augment: show the images as they are in training: augmented and stretched to a square.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: no such split, broken annotations, or none of the chosen images can be read.
    """
    annotations = CocoSplit(layout.split(split, FIELDS), FIELDS, keep_annotations=False)
    pixel_range = choose_pixel_range(None, [annotations], lambda _: None)
    dataset = Dataset(annotations, augment, seed, validate=False, pixel_range=pixel_range)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    pictures, reasons = [], []
    for index in chosen.tolist():
        try:
            pictures.append(_picture(dataset, index, tile, augmented=augment is not None))
        except BadImage as error:
            reasons.append(str(error))
    if not pictures:
        raise UserError(f"none of the {len(chosen)} chosen images can be read: {'; '.join(reasons[:3])}")
    return grid(pictures)


def _picture(dataset: Dataset, index: int, tile: int, augmented: bool) -> np.ndarray:
    """One image with its labels, which are drawn after resizing so that lines are equally thin on every picture."""
    if augmented:
        image, labels = dataset.transform(dataset, index, (tile, tile), np.random.default_rng((dataset.seed, index)))
    else:
        image, labels = dataset.image(index), dataset.labels(index)
        ratio = tile / max(image.shape[:2])
        image = resize_image(image, (max(round(image.shape[0] * ratio), 1), max(round(image.shape[1] * ratio), 1)))
    labels = labels[~labels.crowd]
    return draw_instances(image, dataset.to_instances(labels, (image.shape[0], image.shape[1])), scores=False)

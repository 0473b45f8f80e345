"""Pictures that a program gives: files, PIL images and arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mvision.errors import UserError
from mvision.structures.images import BadImage, PixelRange, read_image
from mvision.structures.pixels import scale, to_array


def as_list(images: Sequence[str | Path | Image.Image | np.ndarray]) -> Sequence[Any]:
    """Images that a user gave, also a single one."""
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim <= 3):
        return [images]
    return images


def for_threads(images: Iterable[Any]) -> Generator[Any, None, None]:
    """The images, of which several may be one object of PIL.

    Such an object decodes itself at its first use, for which two threads are one too many; and what runs through an
    animation moves its one object on to the next frame. So copies of it are made here, in the caller's thread.
    """
    times = Counter(map(id, images)) if isinstance(images, Sized) else None
    try:
        for image in images:
            if isinstance(image, Image.Image) and (times is None or times[id(image)] > 1):
                yield upright(image)
            else:
                yield image
    finally:
        if isinstance(images, Generator):
            images.close()


def picture_array(image: str | Path | Image.Image | np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of anything that ``predict_images`` takes."""
    if isinstance(image, str | Path):
        try:
            return read_image(image, pixel_range=pixel_range)
        except BadImage as error:
            raise UserError(str(error)) from error
    if isinstance(image, Image.Image):
        return to_array(upright(image), pixel_range)
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image of type {type(image).__name__}: give a path, a PIL image or a numpy array")
    if pixel_range is not None and image.dtype.kind in "uif" and image.dtype != np.uint8:
        image = scale(image, *pixel_range)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or not image.size:
        raise UserError(f"an array of shape {image.shape} and type {image.dtype}: (H, W, 3) uint8 RGB is needed")
    return np.require(image[..., :3], requirements=["C", "W"])  # torch warns about read-only arrays


def upright(image: Image.Image) -> Image.Image:
    """A decoded copy."""
    if not min(image.size):
        raise UserError(f"an image of PIL without a pixel ({image.width} x {image.height})")
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a lazily opened file that is damaged; Pillow's errors have no common base
        raise UserError(f"an image of PIL cannot be decoded ({type(error).__name__}: {error})") from error

"""Pixels of every kind as 8-bit RGB: grey, palettes, CMYK, LAB, and values of 16 bits, 32 bits or floating point.

The values of deep pictures seldom fill their type: a camera of 12 bits stores 0..4095 in 16, a thermal one perhaps
29000..31000. Which values become 0 and 255 is therefore a property of the data, ``ModelConfig.pixel_range``; without
it, the range of the type is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image, ImageCms

PixelRange = tuple[float, float]
"""The values that become 0 and 255."""

PIECE = 16_000_000  # pixels that are converted at a time: the copies of all conversions stay small beside the picture
DEEP_MODES = ("I", "F")  # what Pillow's modes of more than 8 bits begin with


def to_rgb(image: Image.Image, pixel_range: PixelRange | None = None) -> Image.Image:
    """Any mode of PIL as 8-bit RGB: 16-bit and float images are scaled, palettes and transparency resolved.

    Args:
        pixel_range: for images of more than 8 bits; None: the range of the type, of float images 0 to their maximum.
    """
    if is_deep(image):
        low, high = pixel_range or own_range(image)
        image = Image.fromarray(scale(np.asarray(image), low, high))
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether the values have more than 8 bits."""
    return image.mode.startswith(DEEP_MODES)


def to_array(image: Image.Image, pixel_range: PixelRange | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a decoded image of any mode; see ``to_rgb``."""
    if image.width * image.height <= PIECE:
        return np.array(to_rgb(image, pixel_range))
    if is_deep(image):
        pixel_range = pixel_range or own_range(image)
    array = np.empty((image.height, image.width, 3), np.uint8)
    for top, piece in _pieces(image):
        array[top : top + piece.height] = np.asarray(to_rgb(piece, pixel_range))
    return array


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of any type to uint8: ``low`` and less become 0, ``high`` and more 255, NaN and infinite ones 0."""
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values), values, np.float32(low))
    elif values.dtype.itemsize == 2 and values.dtype.kind == "u":
        table = _scaled(np.arange(65536, dtype=np.float32), low, high)
        return table[values]
    return _scaled(values.astype(np.float32), low, high)


def scale_colours(values: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """``scale`` of (H, W, 3), some rows at a time."""
    array = np.empty(values.shape, np.uint8)
    rows = max(PIECE // max(values.shape[1], 1), 1)
    for top in range(0, len(values), rows):
        array[top : top + rows] = scale(values[top : top + rows], *pixel_range)
    return array


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if low:  # subtracted from 0 it would cost time for nothing
        values = values - low
    return (values.clip(0, high - low) * (255.0 / (high - low))).round().astype(np.uint8)


def not_finite(image: Image.Image) -> int:
    """How many values of a float image are NaN or infinite."""
    if image.mode != "F":
        return 0
    return sum(int((~np.isfinite(np.asarray(piece))).sum()) for _, piece in _pieces(image))


def own_range(image: Image.Image) -> PixelRange:
    """The range of a deep image's type; of a float image 0 to its maximum. 32-bit integers up to 255 are 8 bits."""
    if image.mode.startswith("I;"):
        return 0.0, 65535.0
    top = 0.0
    for _, piece in _pieces(image):
        values = np.asarray(piece)
        top = max(top, float(values.max(initial=0, where=np.isfinite(values))))
    if image.mode == "F":
        return 0.0, max(top, 1.0)
    return 0.0, 255.0 if top <= 255 else 65535.0


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, C) as an orientation of EXIF, 1..8, asks for."""
    match orientation:
        case 2:
            return cv2.flip(image, 1)
        case 3:
            return cv2.rotate(image, cv2.ROTATE_180)
        case 4:
            return cv2.flip(image, 0)
        case 5:
            return cv2.transpose(image)
        case 6:
            return cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            return cv2.flip(cv2.transpose(image), -1)
        case 8:
            return cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return image


def as_stored(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo ``upright``."""
    return upright(image, {6: 8, 8: 6}.get(orientation, orientation))


def _pieces(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in horizontal pieces of at most ``PIECE`` pixels, each with its first row."""
    rows = max(PIECE // max(image.width, 1), 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield top, image if bottom - top == image.height else image.crop((0, top, image.width, bottom))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only where the image is changed in place
    return converted

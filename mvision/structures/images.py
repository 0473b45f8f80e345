"""Reading and writing image files, and the one resize that training, evaluation and prediction share."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from mvision.errors import UserError
from mvision.storage.atomic import whole_file

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_QUALITY = 92
# Part of its size that a JPEG is decoded at, 1 / key -> cv2's flag.
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
DAMAGED = (OSError, Image.DecompressionBombError, SyntaxError, ValueError)  # what PIL raises for files it cannot read


class BadImage(Exception):
    """An image file that cannot be used: ``path`` and the ``reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def read_image(path: str | Path, at_least: tuple[int, int] | None = None, rotate: bool = True) -> np.ndarray:
    """Decode a file to (H, W, 3) uint8 RGB.

    Grey becomes three equal channels, 16 bits are scaled to 8 by the value range of the type, palettes and CMYK are
    converted, transparency is dropped (the colour below it stays, as cv2 and the published weights' loaders do).

    Args:
        path: the file.
        at_least: (height, width) that are enough for the caller. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size
            as long as neither side falls below; cheaper for large photos, for training only.
        rotate: turn the picture upright as its EXIF orientation says.

    Raises:
        BadImage: the file is missing, empty, truncated or not an image.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error
    if not data:
        raise BadImage(path, "the file is empty")
    # OpenCV 4 reads a truncated JPEG without an error and fills the missing part with grey. So a file without an end
    # marker near its end (truncated, or followed by a phone's video) is read by PIL, which reports damage.
    if data[:2] == JPEG_START and JPEG_END in data[-4096:]:
        image = _decode_jpeg(path, data, at_least, rotate)
        if image is not None:
            return image
    return _decode(path, data, rotate)


def image_size(path: str | Path) -> tuple[int, int, bool]:
    """Height and width of the upright picture, and whether EXIF turns it by a quarter, from the header alone.

    Raises:
        BadImage: the file is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            width, height = image.size
    except DAMAGED as error:
        raise BadImage(path, _reason(error)) from error
    return (width, height, True) if turned else (height, width, False)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the file's suffix; the file is complete or not there.

    Raises:
        UserError: no format has this suffix, or the file cannot be written.
    """
    path = Path(path)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix.lower() in (".jpg", ".jpeg") else []
    try:
        good, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    except cv2.error as error:
        raise UserError(f"{path}: no picture format of that suffix: use .png or .jpg") from error
    if not good:
        raise UserError(f"{path}: a picture of {image.shape[1]} x {image.shape[0]} cannot be encoded")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(data.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch (H, W, 3) uint8 to ``size`` (height, width): bilinear, antialiased when shrinking.

    The published RT-DETR weights were trained and evaluated on PIL's bilinear resize; torch's uint8 kernel gives the
    same bytes four times faster.
    """
    if image.shape[:2] == tuple(size):
        return np.ascontiguousarray(image)
    # The batch dimension is added before the permutation: afterwards torch would not recognise the channels_last memory
    # format, take a slower kernel and return the channels as separate planes.
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(tensor, size=size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1)[0].numpy())


def _decode_jpeg(path: Path, data: bytes, at_least: tuple[int, int] | None, rotate: bool) -> np.ndarray | None:
    """Decode with cv2, which is fast; None for what it cannot decode or PIL decodes better (CMYK)."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            if header.mode not in ("RGB", "L"):
                return None
            width, height = header.size
            if header.getexif().get(0x0112) in (5, 6, 7, 8) and rotate:
                width, height = height, width
    except DAMAGED as error:
        raise BadImage(path, _reason(error)) from error
    flags = _reduction(height, width, at_least)
    if not rotate:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _reduction(height: int, width: int, at_least: tuple[int, int] | None) -> int:
    if at_least is not None:
        ratio = min(height / max(at_least[0], 1), width / max(at_least[1], 1))
        for factor, flag in REDUCED.items():
            if ratio >= factor:
                return flag
    return cv2.IMREAD_COLOR


def _decode(path: Path, data: bytes, rotate: bool) -> np.ndarray:
    """Decode with PIL, which reads more formats and modes and reports damage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image) if rotate else image
            return np.array(to_rgb(upright))
    except (*DAMAGED, EOFError, IndexError, ZeroDivisionError) as error:
        raise BadImage(path, _reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL as 8-bit RGB: 16-bit and float images are scaled, palettes and transparency resolved."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max(initial=0)), 1.0)
        if image.mode == "I" and values.max(initial=0) <= 255:
            top = 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    return " ".join(str(error).split()) or type(error).__name__


# A truncated file is an error here, whatever another library in the process has chosen.
ImageFile.LOAD_TRUNCATED_IMAGES = False

"""Reading and writing image files, and the one resize that training, evaluation and prediction share."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
from PIL import ImageFile
from PIL.JpegImagePlugin import jpeg_factory
from torch.nn import functional as F

from mvision.errors import UserError
from mvision.storage.atomic import whole_file
from mvision.structures.decoding import (
    IMAGE_SUFFIXES,
    QUARTER_TURNS,
    UNREADABLE_SUFFIXES,
    BadImage,
    decoding,
    opened,
    orientation_of,
    stored_size,
)
from mvision.structures.pixels import (
    PixelRange,
    as_stored,
    is_deep,
    not_finite,
    scale_colours,
    to_array,
    to_rgb,
    upright,
)

if "OPENCV_LOG_LEVEL" not in os.environ:  # else it prints warnings of its own about pictures that are read or refused
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREADABLE_SUFFIXES",
    "BadImage",
    "PictureHeader",
    "PixelRange",
    "frames",
    "image_size",
    "picture_header",
    "read_image",
    "read_values",
    "read_with_size",
    "resize_image",
    "to_rgb",
    "write_image",
]

FIRST_IS_USED = "picture with several frames or pages: the first one is used"
RANGE_OF_TYPE = "picture of more than 8 bits: scaled by the range of its type, for want of a model.pixel_range"
LOWEST_INSTEAD = "picture with values that are NaN or infinite: taken as the lowest"
JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_QUALITY = 92
SCAN = b"\xff\xda"
# A progressive JPEG is refined in passes over the whole picture, about ten of them. A file of a megabyte can have tens
# of thousands, which take minutes even for few pixels: more than so many are refused where they are so much work.
MAX_SCANS, MOST_WORK = 100, 10**9  # passes; pixels x passes, about ten seconds
# Part of its size that a JPEG is decoded at, 1 / key -> cv2's flag.
COLOUR = getattr(cv2, "IMREAD_COLOR_RGB", cv2.IMREAD_COLOR)  # since OpenCV 4.11
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
DEEP_COLOUR = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
MOST_PAGES = 1000
# A named pipe is opened without waiting for a writer.
OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
BUFFER = 8192
IN_MEMORY = 256 << 20  # bytes; a larger file, such as a TIFF of many pages, is read only where its first picture lies
# Endings that are written in the format of another one.
WRITTEN_AS = {".jfif": ".jpg", ".jpe": ".jpg", ".mpo": ".jpg", ".apng": ".png"}
LARGEST_SIDE = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}  # pixels


@dataclass(frozen=True)
class PictureHeader:
    """What the header of a file says.

    Attributes:
        deep: values of more than 8 bits.
        several: more than one frame or page.
        floating: values of floating point.
    """

    deep: bool
    several: bool
    floating: bool = False


def read_image(
    path: str | Path,
    at_least: tuple[int, int] | None = None,
    rotate: bool = True,
    pixel_range: PixelRange | None = None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Decode a file to (H, W, 3) uint8 RGB; of several frames or pages the first.

    Grey becomes three equal channels, palettes and CMYK are converted, transparency is dropped (the colour below it
    stays, as cv2 and the published weights' loaders do). Values that are NaN or infinite become the lowest.

    Args:
        path: the file.
        at_least: (height, width) that are enough for the caller. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size
            as long as neither side falls below; cheaper for large photos, with pixels that differ a little.
        rotate: turn the picture upright as its EXIF orientation says.
        pixel_range: the values that become 0 and 255 in pictures of more than 8 bits. None: for integers the range of
            their type, for floating point 0 and the picture's own maximum.
        notes: gets what was left out, replaced or guessed, a line each.

    Raises:
        BadImage: the file is missing, empty, truncated, not an image, or larger than allowed (see ``decoding``).
    """
    return read_with_size(path, at_least, rotate, pixel_range, notes)[0]


def read_with_size(
    path: str | Path,
    at_least: tuple[int, int] | None = None,
    rotate: bool = True,
    pixel_range: PixelRange | None = None,
    notes: list[str] | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """As ``read_image``, and the (height, width) of the picture where it is not decoded at a part of its size."""
    path = Path(path)
    with _open_file(path) as stream:
        data = stream.getvalue() if isinstance(stream, io.BytesIO) else b""
        # OpenCV 4 reads a truncated JPEG without an error and fills the missing part with grey. So a file without an
        # end marker near its end (truncated, or followed by a phone's video) is read by PIL, which reports damage.
        if data[:2] == JPEG_START and JPEG_END in data[-4096:]:
            decoded = _decode_jpeg(path, data, at_least, rotate)
            if decoded is not None:
                if notes is not None and path.suffix.lower() == ".mpo" and _mpo_frames(stream) > 1:
                    notes.append(FIRST_IS_USED)
                return decoded
        image = _decode(path, stream, rotate, pixel_range, notes)
        return image, image.shape[:2]


def image_size(path: str | Path) -> tuple[int, int, bool]:
    """Height and width of the upright picture, and whether EXIF turns it by a quarter, from the header alone.

    Raises:
        BadImage: the file is missing, not an image, or larger than allowed.
    """
    with _open_file(Path(path), in_memory=0) as stream, opened(path, stream) as (image, name):
        width, height = stored_size(image, name)
        turned = orientation_of(image) in QUARTER_TURNS
    return (width, height, True) if turned else (height, width, False)


def picture_header(path: str | Path) -> PictureHeader:
    """What is known of a picture without decoding it.

    Raises:
        BadImage: see ``image_size``.
    """
    with _open_file(Path(path), in_memory=0) as stream, opened(path, stream) as (image, name):
        deep = is_deep(image) or _is_deep_colour(image, name)
        if name == "JPEG" and Path(path).suffix.lower() == ".mpo":
            return PictureHeader(deep, _mpo_frames(stream) > 1)
        return PictureHeader(deep, bool(getattr(image, "is_animated", False)), image.mode == "F")


def frames(path: str | Path) -> int:
    """The number of frames or pages in a picture file: of a GIF, WebP, APNG, AVIF, TIFF or MPO; 1 for other formats.

    Of a TIFF not more than ``MOST_PAGES`` are counted: each has a header of its own that has to be read.

    Raises:
        BadImage: see ``image_size``.
    """
    with _open_file(Path(path), in_memory=0) as stream, opened(path, stream) as (image, name):
        if name == "JPEG":
            return _mpo_frames(stream)
        if name == "TIFF":
            return _pages(image)
        return int(getattr(image, "n_frames", 1))


def read_values(path: str | Path) -> np.ndarray | None:
    """The values of a picture of more than 8 bits as they are stored, (H, W) or (H, W, 3); None for one of 8 bits.

    Raises:
        BadImage: see ``read_image``.
    """
    path = Path(path)
    with _open_file(path) as stream, opened(path, stream) as (image, name):
        if _is_deep_colour(image, name):
            return _deep_colour(path, stream)
        if not is_deep(image):
            return None
        with decoding(*image.size):
            return np.array(image)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the file's suffix; the file is complete or not there.

    Raises:
        UserError: no format has this suffix, the picture is too large for it, or the file cannot be written.
    """
    path = Path(path)
    suffix = WRITTEN_AS.get(path.suffix.lower(), path.suffix.lower())
    height, width = image.shape[:2]
    if max(height, width) > LARGEST_SIDE.get(suffix, max(height, width)):
        raise UserError(
            f"{path}: a picture of {width} x {height} cannot be encoded: {suffix} holds {LARGEST_SIDE[suffix]} pixels "
            f"a side; use .png"
        )
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix in (".jpg", ".jpeg") else []
    try:
        good, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    except cv2.error as error:
        raise UserError(f"{path}: no picture format of that suffix: use .png or .jpg") from error
    if not good:
        raise UserError(f"{path}: a picture of {width} x {height} cannot be encoded")
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


def _open_file(path: Path, in_memory: int = IN_MEMORY) -> BinaryIO:
    """A file's content for reading; in memory up to a size, because decoders read it in small pieces.

    Opened with the functions of ``os``: they cost a third of ``Path.read_bytes``, which shows for small pictures.

    Raises:
        BadImage: the file is missing, empty, or no regular file (opening a named pipe would wait for ever).
    """
    descriptor = -1
    try:
        descriptor = os.open(path, OPEN_FLAGS)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(path, "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if in_memory < status.st_size:
            stream, descriptor = os.fdopen(descriptor, "rb", BUFFER), -1
            return stream
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if not data:
        raise BadImage(path, "the file is empty")
    return io.BytesIO(data)


def _decode_jpeg(
    path: Path, data: bytes, at_least: tuple[int, int] | None, rotate: bool
) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Decode with cv2, which is fast; None for what it cannot decode or PIL decodes better (CMYK).

    The second value is the whole picture's (height, width).
    """
    with opened(path, io.BytesIO(data)) as (header, _):
        if header.mode not in ("RGB", "L"):
            return None
        width, height = header.size
        orientation = orientation_of(header) if rotate else 1
        _check_passes(path, header, data)
    if orientation in QUARTER_TURNS:
        width, height = height, width
    factor = _reduction(height, width, at_least)
    flags = REDUCED.get(factor, COLOUR) | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        with decoding(width // factor, height // factor):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if image is None:
        return None
    if factor > 1 or COLOUR == cv2.IMREAD_COLOR:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return upright(image, orientation), (height, width)


def _check_passes(path: Path, header: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse a progressive JPEG that would take minutes.

    Raises:
        BadImage: it has too many passes for its size.
    """
    if "progressive" in header.info:
        passes = data.count(SCAN)
        if passes > MAX_SCANS and passes * header.width * header.height > MOST_WORK:
            raise BadImage(path, f"a progressive JPEG of {passes} passes, which would take very long to decode")


def _reduction(height: int, width: int, at_least: tuple[int, int] | None) -> int:
    """1, 2, 4 or 8: the part of its size that a picture can be decoded at."""
    if at_least is not None:
        ratio = min(height / max(at_least[0], 1), width / max(at_least[1], 1))
        for factor in REDUCED:
            if ratio >= factor:
                return factor
    return 1


def _decode(
    path: Path, stream: BinaryIO, rotate: bool, pixel_range: PixelRange | None, notes: list[str] | None
) -> np.ndarray:
    """Decode with PIL, which reads more formats and modes and reports damage."""
    with opened(path, stream) as (image, name):
        several = notes is not None and bool(getattr(image, "is_animated", False))
        if name == "JPEG" and isinstance(stream, io.BytesIO):
            _check_passes(path, image, stream.getvalue())
        deep_colour = _is_deep_colour(image, name)
        guessed = pixel_range is None and (deep_colour or is_deep(image))
        with decoding(*(size := image.size)):
            orientation = orientation_of(image)
            image.load()
            array = None if deep_colour and not guessed else to_array(image, pixel_range)
        if notes is not None:
            notes += [FIRST_IS_USED] if several else []
            notes += [RANGE_OF_TYPE] if guessed else []
            notes += [LOWEST_INSTEAD] if not_finite(image) else []
    del image  # its memory, before another decoder needs as much
    if array is None:
        with decoding(*size):
            array = scale_colours(_deep_colour(path, stream), pixel_range or (0.0, 65535.0))
    if name == "TIFF":  # turned by Pillow when it is decoded
        return array if rotate else as_stored(array, orientation)
    return upright(array, orientation) if rotate else array


def _is_deep_colour(image: ImageFile.ImageFile, name: str) -> bool:
    """Whether a picture has 16 bits in each of its colours. Pillow keeps the upper 8 of them."""
    if name not in ("PNG", "TIFF") or image.mode not in ("RGB", "RGBA") or not image.tile:
        return False
    raw = image.tile[0][3]
    return ";16" in str(raw[0] if isinstance(raw, tuple) and raw else raw)


def _deep_colour(path: Path, stream: BinaryIO) -> np.ndarray:
    """(H, W, 3) uint16 RGB of a picture for which ``_is_deep_colour`` holds, turned as Pillow does."""
    stream.seek(0)
    values = cv2.imdecode(np.frombuffer(stream.read(), np.uint8), DEEP_COLOUR)
    if values is None or values.dtype != np.uint16:
        raise BadImage(path, "its 16-bit colours cannot be decoded")
    return values[..., ::-1]


def _pages(image: ImageFile.ImageFile) -> int:
    """Pages of a TIFF, at most ``MOST_PAGES``."""
    for number in range(1, MOST_PAGES):
        try:
            image.seek(number)
        except EOFError:
            return number
    return MOST_PAGES


def _mpo_frames(stream: BinaryIO) -> int:
    """Pictures in a JPEG file; stereo cameras store two."""
    stream.seek(0)
    return int(getattr(jpeg_factory(stream), "n_frames", 1))

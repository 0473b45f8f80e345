"""Pictures that are read window by window: large TIFFs without ever being decoded whole, others decoded once.

A TIFF is stored in strips or tiles that can be decoded alone (uncompressed ones at any row). ``tifffile``, an extra,
reads them; what its pixels become is what ``read_image`` makes of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from mvision.structures.decoding import BIG, ORIENTATION, BadImage, format_of, size_limit
from mvision.structures.images import FIRST_IS_USED, RANGE_OF_TYPE, PixelRange, image_size, read_image, resize_image
from mvision.structures.pixels import scale_colours

INSTALL = 'pip install -e ".[tiles]"'
REDUCED_SIDE = 4096  # pixels of the longer side of a large picture where all of it is needed at once
MOST_CACHED = 512 << 20  # bytes of decoded strips or tiles of a TIFF
ROWS = 256  # of an uncompressed picture that are read at a time
RGB, BLACK_IS_ZERO, WHITE_IS_ZERO, YCBCR = 2, 1, 0, 6  # values of the tag PhotometricInterpretation
COLOURS = {1: 1, 2: 1, 3: 3, 4: 3}  # samples of a pixel -> those that are used; the others are transparency


class Picture(Protocol):
    """A picture of which windows are read, from several threads."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB of a part.

        Raises:
            BadImage: it is damaged there.
        """

    def reduced(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB of all of it, at a part of its size if it is large."""

    def release(self) -> None:
        """Free its memory: it is read no more."""


class ArrayPicture:
    """A picture in memory: (H, W, 3) uint8 RGB."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.size: tuple[int, int] = image.shape[:2]  # type: ignore[assignment]

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See ``Picture``."""
        return self.image[top:bottom, left:right]

    def reduced(self) -> np.ndarray:
        """See ``Picture``."""
        return self.image

    def release(self) -> None:
        """Nothing to free here."""


class PreparedPicture:
    """A picture that is predicted on as a single tile, whatever its size: ``image`` is the model's input already."""

    def __init__(self, image: np.ndarray, size: tuple[int, int]) -> None:
        self.image, self.size = image, size

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """All of it."""
        return self.image

    def reduced(self) -> np.ndarray:
        """See ``Picture``."""
        return self.image

    def release(self) -> None:
        """Nothing to free here."""


class DecodedPicture:
    """A large picture of a format that can only be decoded whole: when its first window is asked for."""

    in_parts = False

    def __init__(self, path: str | Path, size: tuple[int, int], pixel_range: PixelRange | None) -> None:
        self.path, self.size = path, size
        self.notes: list[str] = []
        self._pixel_range = pixel_range
        self._lock = threading.Lock()
        self._image: np.ndarray | None = None

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See ``Picture``."""
        return self.reduced()[top:bottom, left:right]

    def reduced(self) -> np.ndarray:
        """All of it: it is in memory anyway."""
        with self._lock:
            if self._image is None:
                self._image = read_image(self.path, pixel_range=self._pixel_range, notes=self.notes)
            return self._image

    def release(self) -> None:
        """See ``Picture``. It is decoded once more if it is asked for after that."""
        with self._lock:
            self._image = None


class TiffPicture:
    """A TIFF of which only the strips or tiles in a window are decoded; the last ones are kept.

    Args:
        path: the file.
        page: its first page, a ``tifffile.TiffPage``.
        rows: of pixels that are read one window after the other, from left to right: of so many, everything is kept.
        pixel_range: see ``read_image``.

    Attributes:
        notes: what was left out or guessed, a line each.

    Raises:
        BadImage: of a kind whose parts cannot be read alone; the reason says what it is.
    """

    in_parts = True

    def __init__(self, path: str | Path, page: Any, rows: int, pixel_range: PixelRange | None) -> None:
        self.path, self.page = path, page
        self.size = (int(page.imagelength), int(page.imagewidth))
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._reduced: np.ndarray | None = None
        if (problem := _obstacle(page)) is not None:
            raise BadImage(path, problem)
        self._inverted = page.photometric == WHITE_IS_ZERO
        self._colours = COLOURS[page.samplesperpixel]
        self._range = pixel_range
        if page.dtype == np.uint16 and pixel_range is None:
            # As Pillow reads them: of 16-bit colours the upper 8 bits, 16-bit grey is scaled.
            self._range = (0.0, 65535.0) if self._colours == 1 else None
            self.notes.append(RANGE_OF_TYPE)
        self._plain = page.compression == 1 and page.is_contiguous and page.planarconfig == 1
        self._part = (ROWS, self.size[1])
        if not self._plain:
            self._part = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, self.size[1])
        self._part = (min(self._part[0], self.size[0]), self._part[1])
        needed = (rows + 2 * self._part[0]) * (self.size[1] + self._part[1]) * self._colours
        self._most = min(needed, MOST_CACHED)
        if (one := self._part[0] * self._part[1] * self._colours) > size_limit():
            raise BadImage(path, f"its parts are of {self._part[1]} x {self._part[0]} pixels, {one / 1e9:.1f} GB each")

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """See ``Picture``."""
        found = np.empty((bottom - top, right - left, self._colours), np.uint8)
        height, width = self._part
        with self._lock:
            for row in range(top // height, -(-bottom // height)):
                for column in range(left // width, -(-right // width)):
                    y, x = row * height, column * width
                    y0, x0 = max(top, y), max(left, x)
                    y1, x1 = min(bottom, y + height), min(right, x + width)
                    inner = self._segment(row, column)[y0 - y : y1 - y, x0 - x : x1 - x]
                    if inner.shape[:2] != (y1 - y0, x1 - x0):
                        raise BadImage(self.path, f"the part at row {y}, column {x} is too small")
                    found[y0 - top : y1 - top, x0 - left : x1 - left] = inner
        return found if self._colours == 3 else np.repeat(found, 3, axis=2)

    def reduced(self) -> np.ndarray:
        """All of it, its longer side at most ``REDUCED_SIDE`` pixels; read once, some rows at a time."""
        if self._reduced is None:
            height, width = self.size
            factor = max(max(self.size) / REDUCED_SIDE, 1.0)
            small = np.empty((max(round(height / factor), 1), max(round(width / factor), 1), 3), np.uint8)
            step = max(int(self._part[0] / factor), 16)
            for begin in range(0, len(small), step):
                end = min(begin + step, len(small))
                top, bottom = (round(row * height / len(small)) for row in (begin, end))
                band = self.window(0, top, width, max(bottom, top + 1))
                small[begin:end] = cv2.resize(band, (small.shape[1], end - begin), interpolation=cv2.INTER_AREA)
            self._reduced = small
        return self._reduced

    def release(self) -> None:
        """See ``Picture``; the reduced one stays."""
        with self._lock:
            self._kept.clear()
        self.page.parent.filehandle.close()

    def _segment(self, row: int, column: int) -> np.ndarray:
        """(h, w, colours) uint8 of one strip or tile."""
        key = row * -(-self.size[1] // self._part[1]) + column
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self.page.parent.filehandle.open()  # again, if it was released
        try:
            values = self._rows(row) if self._plain else self._decoded(key)
        except BadImage:
            raise
        except Exception as error:  # of its decoders, which have no common base
            raise BadImage(self.path, f"cannot be decoded at row {row * self._part[0]} ({_line(error)})") from error
        self._kept[key] = self._as_pixels(values)
        while sum(part.size for part in self._kept.values()) > self._most and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _rows(self, row: int) -> np.ndarray:
        """Rows of an uncompressed picture that is stored in one piece."""
        page, width = self.page, self.size[1]
        first, last = row * self._part[0], min((row + 1) * self._part[0], self.size[0])
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        values = page.samplesperpixel * width
        data = _read(
            page, page.dataoffsets[0] + first * values * dtype.itemsize, (last - first) * values * dtype.itemsize
        )
        if len(data) < (last - first) * values * dtype.itemsize:
            raise BadImage(self.path, f"ends before row {last} of {self.size[0]}")
        return np.frombuffer(data, dtype).reshape(last - first, width, page.samplesperpixel)

    def _decoded(self, key: int) -> np.ndarray:
        """(h, w, samples) of a strip or tile; of planes that are stored one after the other, of all of them."""
        page = self.page
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        of_plane = len(page.dataoffsets) // planes
        parts = []
        for plane in range(min(planes, self._colours)):
            index = key + plane * of_plane
            if index >= len(page.dataoffsets):
                raise BadImage(self.path, f"lists {len(page.dataoffsets)} parts, too few for its size")
            data = _read(page, page.dataoffsets[index], page.databytecounts[index])
            if len(data) < page.databytecounts[index]:
                raise BadImage(self.path, "is truncated")
            values, _, shape = page.decode(data or None, index, jpegtables=page.jpegtables)
            samples = page.samplesperpixel if planes == 1 else 1
            if values is None:  # a part that is not stored: it has the value of its background
                values = np.full((*shape[:3], samples), page.nodata, page.dtype)
            parts.append(values[0])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def _as_pixels(self, values: np.ndarray) -> np.ndarray:
        values = values[..., : self._colours]
        if values.dtype != np.uint8:
            values = values >> 8 if self._range is None else scale_colours(values, self._range)
        values = np.ascontiguousarray(values, dtype=np.uint8)
        return np.invert(values) if self._inverted else values


def open_large(
    path: str | Path, rows: int, pixel_range: PixelRange | None = None
) -> TiffPicture | DecodedPicture | None:
    """A picture of more than ``BIG`` pixels, to be read window by window; None for a smaller one.

    Args:
        rows: see ``TiffPicture``.

    Raises:
        BadImage: it is no picture, or it needs more memory than allowed and cannot be read in parts: as it is, or for
            lack of the extra.
    """
    if _is_tiff(path):
        return _open_tiff(path, rows, pixel_range)
    try:
        height, width, _ = image_size(path)
    except BadImage as error:
        if "are allowed" not in error.reason:
            raise
        raise BadImage(path, f"{error.reason}; or convert it to a tiled TIFF, which tiles are read from") from error
    return DecodedPicture(path, (height, width), pixel_range) if height * width > BIG else None


def _open_tiff(path: str | Path, rows: int, pixel_range: PixelRange | None) -> TiffPicture | DecodedPicture | None:
    try:
        height, width, _ = image_size(path)
        decodable: BadImage | None = None
        if height * width <= BIG:
            return None
    except BadImage as error:
        decodable = error  # too large for it, or of a kind that Pillow does not read
    if find_spec("tifffile") is None:
        if decodable is None:
            return _decoded_whole(path, (height, width), pixel_range, f"the package tifffile is missing: {INSTALL}")
        if "are allowed" not in decodable.reason:
            raise decodable
        raise BadImage(path, f"{decodable.reason}; or read it in parts: the package tifffile is missing: {INSTALL}")
    try:
        picture, obstacle = _windowed(path, rows, pixel_range), ""
    except BadImage as error:
        picture, obstacle = None, error.reason
    if picture is not None:
        return picture if picture.size[0] * picture.size[1] > BIG else None
    if decodable is not None:
        raise BadImage(path, f"{decodable.reason}; it cannot be read in parts: {obstacle}") from decodable
    return _decoded_whole(path, (height, width), pixel_range, obstacle)


def _decoded_whole(
    path: str | Path, size: tuple[int, int], pixel_range: PixelRange | None, reason: str
) -> DecodedPicture:
    decoded = DecodedPicture(path, size, pixel_range)
    decoded.notes.append(f"large TIFF decoded whole: {reason}")
    return decoded


def _windowed(path: str | Path, rows: int, pixel_range: PixelRange | None) -> TiffPicture:
    """Raises BadImage."""
    import tifffile

    try:
        file = tifffile.TiffFile(path)
        page, several = file.pages.first, len(file.pages) > 1
    except Exception as error:  # of damaged files, of many kinds
        raise BadImage(path, f"cannot be decoded as TIFF ({_line(error)})") from error
    try:
        picture = TiffPicture(path, page, rows, pixel_range)
        picture.window(0, 0, 1, 1)  # whether there is a decoder for it
    except BadImage:
        file.close()
        raise
    picture.notes += [FIRST_IS_USED] if several else []
    return picture


def _obstacle(page: Any) -> str | None:
    """Why the parts of a TIFF are not read alone; None if they are."""
    orientation = page.tags.get(ORIENTATION)
    if orientation is not None and orientation.value != 1:
        return f"it is stored turned (orientation {orientation.value})"
    if page.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)) or page.bitspersample not in (8, 16):
        return f"its values are of type {page.dtype} with {page.bitspersample} bits"
    kinds = (RGB, BLACK_IS_ZERO) if page.dtype == np.uint16 else (RGB, BLACK_IS_ZERO, WHITE_IS_ZERO, YCBCR)
    if page.photometric not in kinds or page.samplesperpixel not in COLOURS or page.imagedepth != 1:
        return f"{page.samplesperpixel} values in a pixel of the kind {getattr(page.photometric, 'name', 'unknown')}"
    if page.photometric == YCBCR and page.compression not in (6, 7):
        return "colours in YCbCr that are not compressed as JPEG"
    if page.photometric in (RGB, YCBCR) and page.samplesperpixel < 3:
        return f"{page.samplesperpixel} values in a pixel of colour"
    if page.photometric not in (RGB, YCBCR) and page.samplesperpixel > 2:
        return f"{page.samplesperpixel} values in a pixel of grey"
    return None


def _read(page: Any, offset: int, count: int) -> bytes:
    handle = page.parent.filehandle
    handle.seek(offset)
    return bytes(handle.read(count))


def _is_tiff(path: str | Path) -> bool:
    try:
        with Path(path).open("rb") as file:
            return format_of(file.read(32)) == "TIFF"
    except (OSError, ValueError):
        return False  # what is wrong is said where it is read


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def small_input(picture: Picture, size: tuple[int, int]) -> np.ndarray:
    """All of a picture at the size of the model's input."""
    return resize_image(picture.reduced(), size)

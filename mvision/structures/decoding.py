"""Opening picture files: which formats are read, by which decoder, within how much memory, and what is said of others.

Pillow opens about forty formats, one of them (EPS) by starting a program, whatever the file's name says. Here the first
bytes decide, and only the formats of ``FORMATS`` have a decoder.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from mvision.errors import UserError

try:
    from PIL.AvifImagePlugin import AvifImageFile
except ImportError:  # Pillow before 11.3
    AvifImageFile = None  # type: ignore[assignment,misc]

ORIENTATION = 0x0112  # the tag of EXIF and TIFF
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that exchange height and width
PNG_START = b"\x89PNG\r\n\x1a\n"
START = 32  # bytes that tell a format

LIMIT_VARIABLE = "MVISION_MAX_IMAGE_BYTES"
# Decoded bytes of one picture. Twice as much as 14000 x 13000 pixels need; with the decoder's own copies, the memory of
# the process stays below 4 GB.
DEFAULT_LIMIT = 1 << 30
BYTES_PER_PIXEL = 3  # of the decoded RGB
# Decoders that hold far more than the result while they work (19, 18 and 14 bytes per pixel; others 6 to 8): a pixel
# counts as so many bytes that the limit means about the same memory.
HEAVY = {"JPEG 2000": 7, "WebP": 6, "AVIF": 5}
BIG = (
    64_000_000  # pixels; larger pictures are decoded one at a time, or several threads would take several times as much
)


class BadImage(Exception):
    """An image file that cannot be used: ``path`` and the ``reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Format:
    """A format that is read.

    Attributes:
        suffixes: the file endings that it is known by, in lower case.
        open: reads the header of a stream: a class of Pillow.
        feature: what Pillow has to be built with; empty: nothing.
        several: a file can have several frames or pages.
    """

    suffixes: tuple[str, ...]
    open: Callable[[BinaryIO], ImageFile.ImageFile]
    feature: str = ""
    several: bool = False


# JpegImageFile ignores the further pictures of an MPO file, which are read by ``jpeg_factory``.
FORMATS = {
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), JpegImagePlugin.JpegImageFile, "jpg"),
    "PNG": Format((".png", ".apng"), PngImagePlugin.PngImageFile, "zlib", several=True),
    "TIFF": Format((".tif", ".tiff"), TiffImagePlugin.TiffImageFile, several=True),
    "WebP": Format((".webp",), WebPImagePlugin.WebPImageFile, "webp", several=True),
    "BMP": Format((".bmp",), BmpImagePlugin.BmpImageFile),
    "GIF": Format((".gif",), GifImagePlugin.GifImageFile, several=True),
    "AVIF": Format((".avif",), AvifImageFile, "avif", several=True),
    "JPEG 2000": Format((".jp2", ".j2k", ".j2c", ".jpc", ".jpx"), Jpeg2KImagePlugin.Jpeg2KImageFile, "jpg_2000"),
    "PPM": Format((".ppm", ".pgm", ".pbm", ".pnm"), PpmImagePlugin.PpmImageFile),
}
READABLE = {
    name: kind
    for name, kind in FORMATS.items()
    if kind.open is not None and (not kind.feature or features.check(kind.feature))
}
IMAGE_SUFFIXES = frozenset(suffix for kind in READABLE.values() for suffix in kind.suffixes)
_OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".svg", ".eps", ".psd", ".ico", ".tga", ".pcx", ".exr", ".hdr", ".dds"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".dcm", ".fits", ".pfm"),
)
UNREADABLE_SUFFIXES = frozenset(
    {*_OTHER_SUFFIXES, *(suffix for kind in FORMATS.values() for suffix in kind.suffixes)} - IMAGE_SUFFIXES
)
"""Endings of pictures for which there is no decoder here: what has them is left out, and has to be counted."""

# What other files begin with that turn up under the name of a picture.
_OTHER_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the picture: run 'git lfs pull'",
    b"%!PS": "PostScript",
    b"%PDF": "a PDF",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"8BPS": "a Photoshop file",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"SIMPLE  =": "FITS",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "a Radiance picture",
    b"PK\x03\x04": "a ZIP archive",
    b"\x00\x05\x16\x07": "what macOS keeps about a file, not the picture",
}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
READ_AS_A_WHOLE = ("WebP", "AVIF", "JPEG 2000")
PPM_HEADER = 1 << 16  # bytes that have the width and height of a PPM among them
_lock = threading.Lock()

# Pillow warns of doubtful metadata, with its own source line. The pixels do not depend on it, and a file whose pixels
# are damaged is reported as ``BadImage``.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*ImagePlugin")
# A truncated file is an error here, whatever another library in the process has chosen.
ImageFile.LOAD_TRUNCATED_IMAGES = False


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a thread that decodes while the process is forked would leave it locked for ever
    os.register_at_fork(after_in_child=_renew_lock)


def format_of(start: bytes) -> str | None:
    """The name in ``FORMATS`` of the format that a file's first ``START`` bytes belong to."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(PNG_START):
        return "PNG"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if start[4:12] in (b"ftypavif", b"ftypavis") or (start[4:8] == b"ftyp" and b"avi" in start[16:START]):
        return "AVIF"
    if start[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or start[:4] == b"\xff\x4f\xff\x51":
        return "JPEG 2000"
    if start[:2] == b"BM":
        return "BMP"
    if start[:1] == b"P" and start[1:2].isdigit() and b"1" <= start[1:2] <= b"6" and start[2:3].strip() in (b"", b"#"):
        return "PPM"
    return None


@contextmanager
def opened(path: str | Path, stream: BinaryIO) -> Iterator[tuple[ImageFile.ImageFile, str]]:
    """The header of a picture, and its format; the size is checked, the pixels are not decoded yet.

    Whatever goes wrong inside the block is a ``BadImage``: decoders of damaged files raise errors of about fifteen
    kinds, which have no common base.

    Raises:
        BadImage: no picture of a known format, one that is damaged, or one that needs more memory than allowed.
    """
    start = stream.read(START)
    stream.seek(0)
    name = format_of(start)
    if name not in READABLE:
        raise BadImage(path, _other(start, name))
    _check_stream(path, stream, name)
    try:
        if name == "WebP":  # Pillow allocates the picture as soon as it is opened
            check_size(path, *_webp_size(start), name)
            with decoding(*_webp_size(start)):
                image = READABLE[name].open(stream)
        else:
            image = READABLE[name].open(stream)
        with image:
            check_size(path, *image.size, name, 4 if image.mode in ("I", "F") else BYTES_PER_PIXEL)
            yield image, name
    except (BadImage, UserError):
        raise
    except Exception as error:
        raise BadImage(path, _reason(error, name)) from error


def _check_stream(path: str | Path, stream: BinaryIO, name: str) -> None:
    """Refuse what would keep Pillow busy before it knows the size of the picture.

    Raises:
        BadImage: a file that is read as a whole and is larger than any picture may be, or a PPM with a long comment,
            which Pillow reads byte by byte.
    """
    if name in READ_AS_A_WHOLE:
        size, limit = stream.seek(0, os.SEEK_END), size_limit()
        if size > limit:
            raise BadImage(path, f"a {name} file of {_amount(size)}, and {_amount(limit)} are allowed")
    elif name == "PPM":
        words = re.sub(rb"#[^\r\n]*", b"", stream.read(PPM_HEADER)).split()
        if len(words) < 3:
            raise BadImage(path, f"cannot be decoded as PPM (no size in the first {PPM_HEADER} bytes)")
    else:
        return
    stream.seek(0)


def check_size(path: str | Path, width: int, height: int, name: str, depth: int = BYTES_PER_PIXEL) -> None:
    """Refuse a picture that needs more memory than allowed, before anything is decoded.

    Raises:
        BadImage: its decoded size is above the limit, or it has no pixels.
        UserError: the environment variable with the limit is no number.
    """
    if width < 1 or height < 1:
        raise BadImage(path, f"has no pixels ({width} x {height})")
    needed, limit = width * height * max(depth, HEAVY.get(name, 0)), size_limit()
    if needed > limit:
        raise BadImage(
            path,
            f"{width} x {height} pixels count as {_amount(needed)} of decoded {name}, and {_amount(limit)} are "
            f"allowed; if the file can be trusted, set the environment variable {LIMIT_VARIABLE}={needed}",
        )


def size_limit() -> int:
    """The largest number of bytes that a decoded picture may take.

    Raises:
        UserError: the environment variable is no number of bytes.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not text:
        return DEFAULT_LIMIT
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise UserError(f"{LIMIT_VARIABLE}={text}: a number of bytes is needed, such as {4 * DEFAULT_LIMIT}")
    return int(text)


def decoding(width: int, height: int) -> AbstractContextManager[None]:
    """To be held while the pixels of a picture of this size are decoded: one big picture at a time in a process."""
    if width * height <= min(BIG, Image.MAX_IMAGE_PIXELS or BIG):
        return nullcontext()
    return _decoding_big(width, height)


@contextmanager
def _decoding_big(width: int, height: int) -> Iterator[None]:
    with _lock, _unlimited(width, height):
        yield


@contextmanager
def _unlimited(width: int, height: int) -> Iterator[None]:
    """Without Pillow's own limit (179 million pixels, for all of the process) for a picture that was checked here."""
    former = Image.MAX_IMAGE_PIXELS
    if former is None or width * height <= former:
        yield
        return
    try:
        Image.MAX_IMAGE_PIXELS = None
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = former


def orientation_of(image: ImageFile.ImageFile) -> int:
    """How the picture has to be turned, 1..8 as in EXIF; 1, as it is, where EXIF is damaged."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile) and image.tile and not _has_late_text(image):
            value = Image.Image.getexif(image).get(ORIENTATION, 1)  # without decoding the pixels
        else:
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - of any kind; the pixels are not concerned
        return 1
    return value if value in range(2, 9) else 1


def _has_late_text(image: ImageFile.ImageFile) -> bool:
    """Whether a PNG has EXIF or text behind its pixels, where Pillow finds them only after decoding these."""
    stream = image.fp
    assert stream is not None
    here = stream.tell()
    try:
        stream.seek(len(PNG_START))
        kind, pixels = b"", False
        while len(head := stream.read(8)) == 8 and kind != b"IEND":
            kind = head[4:]
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels |= kind == b"IDAT"
            stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # the data and its checksum
        return False
    finally:
        stream.seek(here)


def stored_size(image: ImageFile.ImageFile, name: str) -> tuple[int, int]:
    """(width, height) before the picture is turned. Newer versions of Pillow exchange them for a TIFF."""
    if name == "TIFF":
        return int(image.tag_v2[256]), int(image.tag_v2[257])  # type: ignore[attr-defined]
    return image.size


def _reason(error: Exception, name: str) -> str:
    """The error of a decoder in one line."""
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = " ".join(str(error).split())
    if "unknown pixel mode" in text:
        return "a TIFF with pixels of a kind that is not read; grey or RGB is needed"
    understood = isinstance(error, OSError | SyntaxError | ValueError) and text
    return f"cannot be decoded as {name} ({text if understood else f'{type(error).__name__} {text}'.strip()})"


def _webp_size(start: bytes) -> tuple[int, int]:
    """(width, height) in the header of a WebP file."""
    chunk = start[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF


def _other(start: bytes, name: str | None) -> str:
    """What is said of a file without a decoder; nothing of its content is repeated."""
    if name is not None:
        return f"{name}, which this Pillow cannot decode; convert it to PNG or JPEG"
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "not an image that can be read: HEIC, for which there is no decoder; convert it to PNG or JPEG"
    for beginning, what in _OTHER_STARTS.items():
        if start.lstrip().lower().startswith(beginning.lower()):
            return f"not an image that can be read, but {what}" if " of Git" not in what else what
    return "not an image that can be read"


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count} bytes"

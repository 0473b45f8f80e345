"""Text files that users bring along, with the byte-order marks that editors and shells put in front."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from mvision.errors import UserError

# The marks of UTF-32 come first: the one for little-endian begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8",
}
LINE_END = b"\n"
PROBED = 4096  # bytes from which the encoding is guessed


class NotText(ValueError):
    """A file that is no text in the encoding that it seems to have; the message is a part of a line for the user."""


def read_limited(path: str | Path, limit: int) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file. Pipes and devices are refused, because reading them might never end.
        limit: largest number of bytes.

    Raises:
        NotText: no regular file, or a larger one.
        OSError: it is missing or cannot be read.
    """
    found = os.stat(path)  # noqa: PTH116 - a Path takes longer than reading a small file
    if not stat.S_ISREG(found.st_mode):
        raise NotText("not a file")
    # Without a buffer, and with one byte more than there is: a single call of the system reads it.
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        data = file.read(min(found.st_size, limit) + 1)
    if len(data) > limit:
        raise NotText(f"larger than {limit // 2**20} MiB")
    return data


def decode_text(data: bytes) -> tuple[str, str]:
    """Text and the name of its encoding: what its byte-order mark says, else UTF-8. The mark is no part of the text.

    UTF-16 without a mark is recognised where most of the text is plain letters and digits, by their zero bytes.

    Raises:
        NotText: the bytes cannot be decoded; the message names the line and the byte, and the encoding that is likely.
    """
    if data.isascii() and b"\0" not in data:
        return data.decode("ascii"), "UTF-8"  # at once, as there may be 100,000 files
    encoding = codec = next((name for mark, name in MARKS.items() if data.startswith(mark)), "UTF-8")
    if encoding == "UTF-8":
        codec = "utf-8-sig"
        if b"\0" in data[:PROBED]:
            encoding, codec = "UTF-16", _unmarked_utf16(data)
    try:
        return data.decode(codec), encoding
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} in line {data.count(LINE_END, 0, error.start) + 1}"
        likely = ", perhaps in cp1252 or GBK" if encoding == "UTF-8" else ""
        raise NotText(f"not text in {encoding} ({place}){likely}: save it as UTF-8") from error


def read_text(path: Path, limit: int, where: str | None = None) -> tuple[str, str]:
    """``decode_text`` of a whole file, for a file without which the caller cannot go on.

    Args:
        limit: largest number of bytes.
        where: what the error begins with; None: the path.

    Raises:
        UserError: it is missing, no regular file, too large, or no text.
    """
    try:
        return decode_text(read_limited(path, limit))
    except OSError as error:
        raise UserError(f"{where or path}: {(error.strerror or str(error)).lower()}") from error
    except NotText as error:
        raise UserError(f"{where or path}: {error}") from error


def _unmarked_utf16(data: bytes) -> str:
    even, odd = data[:PROBED:2], data[1:PROBED:2]
    for codec, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if zeros.count(0) > 0.9 * len(zeros) and others.count(0) == 0:
            return codec
    raise NotText("not text: it has zero bytes, as binary files have")

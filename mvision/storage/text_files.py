"""Text files that users bring along, with the byte-order marks that editors and shells put in front."""

from __future__ import annotations

import codecs

# The marks of UTF-32 come first: the one for little-endian begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8",
}


class NotText(ValueError):
    """Bytes that are no text in the encoding that they seem to have; the message is a part of a line for the user."""


def decode_text(data: bytes) -> tuple[str, str]:
    """Text and the name of its encoding: what its byte-order mark says, else UTF-8. The mark is no part of the text.

    Raises:
        NotText: the bytes cannot be decoded; the message names the line and the byte, and the encoding that is likely.
    """
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "UTF-8")
    try:
        return data.decode("utf-8-sig" if encoding == "UTF-8" else encoding), encoding
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        likely = "" if encoding != "UTF-8" else f", it looks like {_guess(data)}"
        raise NotText(
            f"not text in {encoding} (byte 0x{data[error.start]:02x} in line {line}){likely}; save it as UTF-8"
        ) from error


def has_no_text(data: bytes) -> bool:
    """Whether bytes without a byte-order mark are UTF-16 or binary: text in UTF-8 has no zero bytes."""
    return b"\0" in data and not any(data.startswith(mark) for mark in MARKS)


def _guess(data: bytes) -> str:
    start = data[:4096]
    if b"\0" in start:
        return "UTF-16 without a byte-order mark" if start.count(b"\0") * 3 > len(start) else "a binary file"
    return "the code page of an old Windows program (such as cp1252 or GBK)"

"""The run lengths of Label Studio's brush: those of https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack.

Red, green, blue and opacity of every pixel, row by row, as one list of bytes. A stream of bits holds it: its length (32
bits), the bits of a value less one (5), four widths less one (4 each), and then blocks. A block has a bit that says
whether one value is repeated or each has its own, two bits that choose one of the four widths, the number of values
less one in so many bits, and the value or values. Label Studio's own reader in Python makes a text of every value; a
picture of 12 megapixels takes it minutes, and its package asks for older versions of numpy and OpenCV.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHANNELS, OPACITY = 4, 3
WORD = 8
WIDTHS = (3, 4, 8, 16)  # those that Label Studio writes
MOST = 2**32 - 1  # values


class BadBrush(ValueError):
    """Run lengths that cannot be used; the message says why."""


def encode_brush(mask: np.ndarray) -> list[int]:
    """A mask as Label Studio stores it.

    Args:
        mask: (H, W) bool.

    Returns:
        Bytes as numbers from 0 to 255.
    """
    flat = mask.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    lengths = np.diff(ends, prepend=0) * CHANNELS
    value, bits = bool(flat[0]), [f"{flat.size * CHANNELS:032b}{WORD - 1:05b}", *(f"{w - 1:04b}" for w in WIDTHS)]
    for length in lengths.tolist():
        while length:
            which = next((i for i, width in enumerate(WIDTHS) if length <= 1 << width), len(WIDTHS) - 1)
            part = min(length, 1 << WIDTHS[which])
            bits.append(f"1{which:02b}{part - 1:0{WIDTHS[which]}b}{255 * value:08b}")
            length -= part
        value = not value
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode_brush(data: list[int], height: int, width: int) -> np.ndarray:
    """The pixels with any opacity.

    Args:
        data: bytes as numbers.
        height, width: of the picture in pixels.

    Returns:
        (height, width) bool.

    Raises:
        BadBrush: no such bytes, or of another number of pixels.
    """
    try:
        packed = bytes(data)
    except (TypeError, ValueError) as error:
        raise BadBrush("run lengths that are no bytes") from error
    size = height * width * CHANNELS
    if size > MOST or len(packed) < 7 or int.from_bytes(packed[:4], "big") != size:
        raise BadBrush(f"run lengths that are not those of a picture of {width} x {height}")
    changes = np.zeros(height * width + 1, dtype=np.int8)
    shown = np.zeros(height * width, dtype=bool)
    for start, end, values in _blocks(packed, size):
        # The opacity of pixel p is value 4 p + 3.
        first, last = -((OPACITY - start) // CHANNELS), -((OPACITY - end) // CHANNELS)
        if isinstance(values, int):
            if values and last > first:
                changes[first] += 1
                changes[last] -= 1
        else:
            shown[first:last] = values[first * CHANNELS + OPACITY - start :: CHANNELS] > 0
    shown |= np.cumsum(changes[:-1], dtype=np.int8) > 0
    return shown.reshape(height, width)


def _blocks(packed: bytes, size: int) -> Iterator[tuple[int, int, int | np.ndarray]]:
    """Position of the first value and behind the last; the value that is repeated, or all of them."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    text = (bits + ord("0")).tobytes().decode("ascii")
    word = int(text[32:37], 2) + 1
    widths = [int(text[place : place + 4], 2) + 1 for place in range(37, 53, 4)]
    place, done = 53, 0
    weights = 1 << np.arange(word - 1, -1, -1, dtype=np.int64)
    while done < size:
        width = widths[int(text[place + 1 : place + 3] or "0", 2)]
        body = place + 3 + width
        if body > len(text):
            raise BadBrush("run lengths that end too early")
        end = done + 1 + int(text[place + 3 : body], 2)
        if end > size:
            raise BadBrush("run lengths of more values than the picture has")
        count = 1 if text[place] == "1" else end - done
        place = body + count * word
        if place > len(text):
            raise BadBrush("run lengths that end too early")
        if text[body - width - 3] == "1":
            yield done, end, int(text[body:place], 2)
        else:
            yield done, end, bits[body:place].reshape(count, word) @ weights
        done = end

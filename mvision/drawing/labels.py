"""Text on pictures: a real font with every script that it has, and a place for each label where it hides nothing."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import Lock

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_COVER = 0.4
"""A label may cover this share of an object's box at most; of a small object that is all there is to see."""

_FONT_LOCK = Lock()  # FreeType faces must not be used by two threads at once


@lru_cache(maxsize=64)
def _font(size: int, path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _default_font() -> str:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic, Arabic and symbols."""
    return str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf")


@lru_cache(maxsize=256)
def _font_with(characters: frozenset[str]) -> str:
    """A font that has these characters: DejaVu Sans, else any of the system's (Chinese, Japanese, Thai, ...)."""
    from matplotlib.ft2font import FT2Font

    default = _default_font()
    if all(ord(c) < 0x250 for c in characters):
        return default
    from matplotlib.font_manager import fontManager

    for path in dict.fromkeys([default, *(entry.fname for entry in fontManager.ttflist)]):
        face = FT2Font(path)
        if all(face.get_char_index(ord(c)) for c in characters):
            return path
    return default


@lru_cache(maxsize=512)
def text_bitmap(text: str, size: int) -> np.ndarray:
    """(h, w) uint8 coverage of one line of text; all texts of a size and script have the same height."""
    text = " ".join(text.split())  # a class name may hold anything, but a label is one line
    with _FONT_LOCK:
        font = _font(size, _font_with(frozenset(text)))
        ascent, descent = font.getmetrics()
        canvas = Image.new("L", (max(1, round(font.getlength(text))) + 1, ascent + descent))
        ImageDraw.Draw(canvas).text((0, 0), text, font=font, fill=255)
    return np.asarray(canvas)


class LabelPainter:
    """Places labels beside boxes, one after another, where they hide no label and little of any object.

    Args:
        canvas: (H, W, 3) uint8 RGB that is drawn on.
        boxes: (N, 4) xyxy in pixels of all objects.
        font: size of the text in pixels.
        line: width of the boxes' lines in pixels.
    """

    def __init__(self, canvas: np.ndarray, boxes: np.ndarray, font: int, line: int) -> None:
        self._canvas = canvas
        self._boxes = boxes.astype(np.float32)
        self._areas = np.maximum(np.prod(self._boxes[:, 2:] - self._boxes[:, :2], axis=1), 1.0)
        self._font = font
        self._line = line
        self._pad = max(2, font // 4)
        self._placed = np.zeros((0, 4), np.float32)

    @property
    def height(self) -> int:
        """Height in pixels of every label."""
        return text_bitmap("0", self._font).shape[0] + max(1, self._pad // 2)

    def width(self, text: str) -> int:
        """Width in pixels of a label with this text."""
        return text_bitmap(text, self._font).shape[1] + 2 * self._pad

    def place(self, index: int, text: str, colour: tuple[int, int, int]) -> bool:
        """Draw the label of one box if there is a place for it; says whether there was."""
        bitmap = text_bitmap(text, self._font)
        height, width = max(self.height, bitmap.shape[0]), self.width(text)  # some fonts are higher
        places = self._candidates(index, height, width)
        best = self._best(places)
        if best is None:
            return False
        self._placed = np.concatenate((self._placed, places[best][None]))
        x, y = (int(v) for v in places[best][:2])
        self._canvas[y : y + height, x : x + width] = colour
        top, left = y + (height - bitmap.shape[0]) // 2, x + self._pad
        ink = 20.0 if _luminance(colour) > 0.36 else 255.0
        area = self._canvas[top : top + bitmap.shape[0], left : left + bitmap.shape[1]]
        cover = bitmap[..., None] / np.float32(255)
        area[:] = (area * (1 - cover) + ink * cover).round().astype(np.uint8)
        return True

    def _candidates(self, index: int, height: int, width: int) -> np.ndarray:
        """(n, 4) xyxy of places in order of preference: above the box, below it, then inside its corners."""
        edge = self._line // 2  # labels are flush with the outside of the lines
        x0, y0, x1, y1 = np.round(self._boxes[index]) + np.array([-edge, -edge, edge, edge])
        left, right = x0, x1 - width + 1
        corners = [
            (left, y0 - height),
            (right, y0 - height),
            (left, y1 + 1),
            (right, y1 + 1),
            (left, y0),
            (right, y0),
            (left, y1 - height + 1),
            (right, y1 - height + 1),
            (x1 + 1, y0),
            (x0 - width, y0),
        ]
        limit = (self._canvas.shape[1] - width, self._canvas.shape[0] - height)
        # Slide along the box to stay in the image, but never away from it (the check in _best drops what is outside).
        origin = np.array([(min(max(x, 0), max(limit[0], 0)), y) for x, y in corners], np.float32)
        return np.concatenate((origin, origin + np.array([width, height], np.float32)), axis=1)

    def _best(self, places: np.ndarray) -> int | None:
        """The first place that is in the image, free of labels and covers next to nothing; else the least covering."""
        high, wide = self._canvas.shape[:2]
        inside = (places[:, :2] >= 0).all(axis=1) & (places[:, 2] <= wide) & (places[:, 3] <= high)
        free = inside & ~(_overlaps(places, self._placed) > 0).any(axis=1)
        cover = (_overlaps(places, self._boxes) / self._areas).max(axis=1)
        good = free & (cover <= MAX_COVER)
        if not good.any():
            return None
        first = np.flatnonzero(good & (cover <= 0.1))
        return int(first[0]) if len(first) else int(np.where(good, cover, np.inf).argmin())


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) areas shared by (n, 4) and (m, 4) xyxy."""
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.clip(shared, 0, None).prod(axis=2)


def _luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance in 0..1 (WCAG 2, section 1.4.3), to choose dark or light text."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

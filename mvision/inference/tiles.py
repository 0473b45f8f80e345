"""How a picture is divided into tiles: windows of one size that overlap, in rows from the top down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from mvision.errors import UserError
from mvision.structures.decoding import BIG

SMALLEST, LARGEST = 32, 16_384  # pixels of a side of a tile
MOST_OVERLAP = 0.9  # with more, every place would be predicted on a hundred times and more
DEFAULT_OVERLAP = 0.2
MOST_TILES = 1_000_000  # of one picture; more are a slip, such as tiles of 32 pixels on a picture of 100,000

Window = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the picture."""


@dataclass(frozen=True)
class Tiling:
    """Settings of a prediction on tiles.

    Attributes:
        size: (height, width) of a tile in pixels of the picture. Each is stretched to the model's input, so a tile of
            that size is seen pixel by pixel.
        overlap: of neighbouring tiles, as a share (0..0.9) of the side of a tile, at least. Objects up to this size lie
            whole in one of the tiles, wherever they are.
        whole: predict on the whole picture too, as it is done without tiles, and take from that the objects of which
            no tile shows all.

    Raises:
        UserError: a side or an overlap out of range.
    """

    size: tuple[int, int]
    overlap: float = DEFAULT_OVERLAP
    whole: bool = True

    def __post_init__(self) -> None:
        if not all(SMALLEST <= side <= LARGEST for side in self.size):
            height, width = self.size
            raise UserError(f"tile {height}x{width}: sides of {SMALLEST} to {LARGEST} pixels are possible")
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise UserError(
                f"overlap {self.overlap}: a share of a tile from 0 to {MOST_OVERLAP} is needed, such as 0.2"
            )

    def grid(self, size: tuple[int, int]) -> Grid:
        """The tiles of a picture of this (height, width).

        Raises:
            UserError: more than a million.
        """
        height, width = (min(tile, side) for tile, side in zip(self.size, size))
        tops, lefts = (_starts(side, tile, self.overlap) for side, tile in zip(size, (height, width)))
        if len(tops) * len(lefts) > MOST_TILES:
            raise UserError(
                f"tile {self.size[0]}x{self.size[1]} with overlap {self.overlap:g}: a picture of {size[1]} x {size[0]} "
                f"would be {len(tops) * len(lefts):,} tiles; choose larger ones"
            )
        return Grid(size, (height, width), tops, lefts)

    @property
    def text(self) -> str:
        """The settings in a few words."""
        height, width = self.size
        whole = " and the whole picture" if self.whole else ""
        return f"tiles of {width} x {height} pixels that overlap by {self.overlap:g}{whole}"


@dataclass(frozen=True)
class Grid:
    """The tiles of one picture: number ``row * len(lefts) + column``.

    Attributes:
        size: (height, width) of the picture.
        tile: (height, width) of every tile; smaller than asked for where the picture is.
        tops, lefts: of the rows and columns of tiles, rising. The last ones end at the picture's border, and all are
            spread evenly, so that no two neighbours overlap less than the others.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    tops: list[int]
    lefts: list[int]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def window(self, number: int) -> Window:
        """The place of a tile."""
        row, column = divmod(number, len(self.lefts))
        top, left = self.tops[row], self.lefts[column]
        return left, top, left + self.tile[1], top + self.tile[0]

    def windows(self) -> np.ndarray:
        """(T, 4) int64: the places of all tiles."""
        return np.array([self.window(number) for number in range(len(self))], dtype=np.int64)

    def neighbours(self) -> Iterator[tuple[int, int]]:
        """All pairs of tiles that share pixels, the lower number first."""
        columns = len(self.lefts)
        beside = _within(self.lefts, self.tile[1])
        below = _within(self.tops, self.tile[0])
        for row, last_row in enumerate(below):
            for column in range(columns):
                number = row * columns + column
                for other in range(column + 1, beside[column] + 1):
                    yield number, row * columns + other
                first = next(c for c in range(columns) if beside[c] >= column)
                for lower in range(row + 1, last_row + 1):
                    for other in range(first, beside[column] + 1):
                        yield number, lower * columns + other

    def core(self, number: int) -> Window:
        """The part of the picture that is nearer to this tile's middle than to those of others; all cores fill it."""
        row, column = divmod(number, len(self.lefts))
        top, bottom = _core(self.tops, row, self.tile[0], self.size[0])
        left, right = _core(self.lefts, column, self.tile[1], self.size[1])
        return left, top, right, bottom


def make_tiling(tile: int | tuple[int, int] | None, overlap: float | None = None, whole: bool = True) -> Tiling | None:
    """The settings that a user gave; None without tiles.

    Args:
        tile: (height, width) in pixels, or one number for both; None or 0: no tiles.
        overlap: None: 0.2.
        whole: see ``Tiling``.

    Raises:
        UserError: a value out of range, or one that has no meaning without tiles.
    """
    sides: Any = () if tile is None else tile if isinstance(tile, list | tuple) else (tile, tile)
    try:
        size = tuple(map(index, sides))  # NumPy's whole numbers too
    except TypeError:
        size = (-1,)
    if size in ((), (0, 0)):
        if overlap is not None or not whole:
            raise UserError(f"{'--no-whole' if overlap is None else '--overlap'}: has no meaning without --tile")
        return None
    if len(size) != 2:
        raise UserError(f"tile {tile!r}: a number of pixels or (height, width) is needed")
    return Tiling((size[0], size[1]), DEFAULT_OVERLAP if overlap is None else overlap, whole)


def limited_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which results of the whole picture are wanted: masks of all of a large one would fill the
    memory."""
    factor = max(math.sqrt(size[0] * size[1] / BIG), 1.0)
    return max(int(size[0] / factor), 1), max(int(size[1] / factor), 1)


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    step = max(tile - math.ceil(overlap * tile), 1)
    count = 1 + math.ceil((side - tile) / step)
    return np.linspace(0, side - tile, count).round().astype(int).tolist()


def _within(starts: list[int], extent: int) -> list[int]:
    """For every tile of a row or column the last one that shares pixels with it."""
    return (np.searchsorted(starts, np.array(starts) + extent, side="left") - 1).tolist()


def _core(starts: list[int], index: int, extent: int, side: int) -> tuple[int, int]:
    begin = 0 if index == 0 else (starts[index - 1] + extent + starts[index]) // 2
    end = side if index == len(starts) - 1 else (starts[index] + extent + starts[index + 1]) // 2
    return begin, end

"""Masks of a large picture as the pixels at which they change, so that no mask of the whole picture is ever decoded.

A mask of 20,000 x 20,000 pixels is 400 MB as an array. Here it is an (R,) int64 array of rising places, counted down
the columns as in COCO's run lengths: from the first place on it is one, from the second on zero again, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mvision.errors import UserError
from mvision.structures.masks import Masks, encode_changes

MOST_PIXELS = 2**32 - 1  # run lengths are counted in 32 bits


def changes_of(part: np.ndarray, left: int, top: int, height: int) -> np.ndarray:
    """Of a mask that is ``part`` (h, w) bool at this place of a picture of this height, and zero elsewhere."""
    columns = np.zeros((part.shape[1], part.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = part.T
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    return (column + left) * height + row + top


def united(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Of the pixels that are in any of several masks; runs that touch become one."""
    places = np.concatenate([np.zeros(0, np.int64), *masks])
    steps = np.concatenate([np.zeros(0, np.int64), *(1 - 2 * (np.arange(len(mask)) % 2) for mask in masks)])
    order = np.lexsort((-steps, places))  # where one run ends and another begins, the beginning first
    depth = np.cumsum(steps[order])
    edge = (depth > 0) != (np.concatenate(([0], depth[:-1])) > 0)
    return places[order][edge]


def to_masks(changes: Iterable[np.ndarray], size: tuple[int, int]) -> Masks:
    """As ``Masks`` of a picture of this (height, width).

    Raises:
        UserError: the picture has more pixels than run lengths can count.
    """
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(
            f"a picture of {size[1]} x {size[0]}: masks are written for up to {MOST_PIXELS:,} pixels; cut it in parts, "
            "or predict boxes alone (--task detection)"
        )
    return Masks((encode_changes(mask, 1, size)[0] for mask in changes), size)


def shrunk(mask: np.ndarray, size: tuple[int, int], small: tuple[int, int]) -> np.ndarray:
    """The mask of a picture of (height, width) ``size`` on the same picture at a smaller size: (h, w) bool.

    Each pixel is that of the large mask under its middle.
    """
    found = np.zeros(small, dtype=bool)
    if not len(mask):
        return found
    rows, columns = (_middles(few, many) for few, many in zip(small, size))
    first, last = mask[0] // size[0], (mask[-1] - 1) // size[0]
    x0, x1 = np.searchsorted(columns, first), np.searchsorted(columns, last, side="right")
    # A few columns at a time: the places of all pixels are eight times as many bytes as the mask.
    for begin in range(x0, x1, 256):
        chosen = columns[begin : min(begin + 256, x1)]
        found[:, begin : begin + len(chosen)] = (
            np.searchsorted(mask, chosen * size[0] + rows[:, None], "right") % 2 == 1
        )
    return found


def enlarged(mask: np.ndarray, small: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The changes of an (h, w) bool mask of a picture at the size ``small`` on the picture at its own, larger ``size``.

    Each pixel becomes a rectangle.
    """
    if small == size:
        return changes_of(mask, 0, 0, size[0])
    changes = changes_of(mask, 0, 0, small[0] + 1)  # with a row more no run ends where the next column begins
    column, row = np.divmod(changes, small[0] + 1)
    y = _ends(small[0], size[0])[row]
    x = _ends(small[1], size[1])
    pairs, of_column = np.stack((y[0::2], y[1::2]), axis=1), column[0::2]
    copies = x[of_column + 1] - x[of_column]
    firsts = np.repeat(x[of_column], copies) + _counted(copies)
    runs = np.repeat(pairs, copies, axis=0) + (firsts * size[0])[:, None]
    return runs[np.argsort(runs[:, 0], kind="stable")].ravel()


def _middles(few: int, many: int) -> np.ndarray:
    return np.minimum(((np.arange(few) + 0.5) * many / few).astype(np.int64), many - 1)


def _ends(few: int, many: int) -> np.ndarray:
    """(few + 1,) the first of the many pixels that lies in each of the few."""
    return np.ceil(np.arange(few + 1) * many / few - 0.5).astype(np.int64).clip(0, many)


def _counted(copies: np.ndarray) -> np.ndarray:
    """0, 1, ... for every entry anew, ``copies`` numbers each."""
    return np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)

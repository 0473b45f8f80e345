"""Masks of instances as COCO's run lengths: a few kilobytes each, however large the image, and decoded one at a time.

Three hundred masks of a 4000 x 3000 image are 3.6 GB as booleans, and about as many kilobytes like this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from pycocotools import mask as coco_mask

RunLengths = dict[str, Any]
"""COCO's compressed form: {"size": [height, width], "counts": str or bytes}; the runs go down the columns."""


class Masks:
    """N masks of one image, to be used like an (N, H, W) bool array.

    ``masks[i]`` is an (H, W) bool array, ``masks[keep]`` (slice, indices, bool mask) are ``Masks`` again, and
    ``np.asarray(masks)`` is the whole array, which takes N * H * W bytes.

    Attributes:
        rles: the run lengths of each, ``counts`` as text so that JSON can hold them.
        shape: (N, H, W).
        areas: (N,) int64, pixels of each.
    """

    dtype = np.dtype(bool)
    ndim = 3

    def __init__(self, rles: Iterable[RunLengths], size: tuple[int, int]) -> None:
        self.rles = [_as_text(rle) for rle in rles]
        self.size = (int(size[0]), int(size[1]))

    @classmethod
    def from_array(cls, masks: np.ndarray) -> Masks:
        """(N, H, W) of bool or of 0 and 1."""
        return cls((encode_mask(mask) for mask in masks), masks.shape[1:])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, W)."""
        return (len(self.rles), *self.size)

    @property
    def areas(self) -> np.ndarray:
        """(N,) int64, pixels of each mask, without decoding them."""
        # One by one: pycocotools counts a list's entries in eight bits and refuses more than 255.
        return np.asarray([coco_mask.area(rle) for rle in self.rles], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(decode_mask, self.rles)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Masks: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return decode_mask(self.rles[index])
        chosen = np.arange(len(self))[index]
        return Masks([self.rles[i] for i in chosen.tolist()], self.size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.zeros(self.shape, dtype=bool)
        for row, mask in zip(array, self):
            row[:] = mask
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return f"Masks(shape={self.shape})"

    def polygons(self) -> list[list[np.ndarray]]:
        """The outlines of every mask: for each a list of (P, 2) float64 x, y in pixels, see ``mask_polygons``."""
        return [mask_polygons(mask) for mask in self]


def encode_mask(mask: np.ndarray) -> RunLengths:
    """(H, W) bool or uint8 to COCO's compressed run lengths: ``{"size": [H, W], "counts": str}``."""
    import cv2

    # Run lengths go down the columns; cv2 transposes several times faster than numpy copies to Fortran order.
    columns = cv2.transpose(np.ascontiguousarray(mask).view(np.uint8))
    return _as_text(coco_mask.encode(columns.T))


def decode_mask(rle: RunLengths) -> np.ndarray:
    """COCO's compressed run lengths to (H, W) bool."""
    return coco_mask.decode(rle).view(bool)


def encode_logits(logits: np.ndarray, size: tuple[int, int]) -> RunLengths:
    """Run lengths of the mask that ``logits`` stand for, on an image of another size.

    The logits are interpolated bilinearly between the centres of the grid's cells and compared with zero. This is the
    inverse of stretching a whole image to the network's input. Only the part of the image around cells above zero is
    computed, so a small object costs next to nothing on a large image.

    Args:
        logits: (h, w) float, above 0 inside the object; the grid covers the whole image.
        size: (height, width) of the image in pixels.
    """
    height, width = size
    inside = logits > 0
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return _encode_part(np.zeros((0, 0), dtype=bool), 0, 0, size)
    top, y0, y1, down = _stretch(int(rows[0]), int(rows[-1]), logits.shape[0], height)
    left, x0, x1, along = _stretch(int(columns[0]), int(columns[-1]), logits.shape[1], width)
    band = logits.astype(np.float32, copy=False)[:, x0.min() : x1.max() + 1]
    tall = band[y0] * (1 - down)[:, None] + band[y1] * down[:, None]
    x0, x1 = x0 - x0.min(), x1 - x0.min()
    part = tall[:, x0] * (1 - along) + tall[:, x1] * along
    return _encode_part(part > 0, top, left, size)


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of an (H, W) bool mask: (P, 2) float64 x, y in pixels each, not closed; holes are filled.

    Coordinates follow COCO's convention (pixel i covers [i, i + 1)), so rasterising the polygons gives the mask back.
    """
    from contourpy import contour_generator

    # Half-way between the centres of inner and outer pixels is the pixels' edge. The border of zeros closes outlines
    # at the edge of the image; it moves the coordinates by one, and centres lie at one half.
    padded = np.pad(mask.astype(np.float32), 1)
    lines = contour_generator(z=padded).lines(0.5)
    polygons = [np.asarray(line, dtype=np.float64)[:-1] - 0.5 for line in lines]
    # contourpy orders outer outlines and those of holes in opposite directions, so holes have a negative area.
    return [polygon for polygon in polygons if len(polygon) >= 3 and _signed_area(polygon) > 0]


def _signed_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _stretch(first: int, last: int, cells: int, pixels: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear interpolation along one axis, for the pixels that depend on the cells ``first`` to ``last``.

    Returns:
        The number of the first such pixel; for every pixel the cell before it and the one behind it, and the weight
        (0..1) of the latter.
    """
    ratio = pixels / cells
    begin = max(0, int(np.floor((first - 0.5) * ratio - 0.5)))
    end = min(pixels, int(np.ceil((last + 1.5) * ratio + 0.5)))
    at = ((np.arange(begin, end, dtype=np.float64) + 0.5) / ratio - 0.5).clip(0, cells - 1)
    low = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    return begin, low, np.minimum(low + 1, cells - 1), (at - low).astype(np.float32)


def _encode_part(part: np.ndarray, top: int, left: int, size: tuple[int, int]) -> RunLengths:
    """Run lengths of a mask that is ``part`` (h, w) at this place and zero elsewhere."""
    height, _ = size
    columns = np.zeros((part.shape[1], height), dtype=bool)
    columns[:, top : top + part.shape[0]] = part.T
    # With a zero at both ends there are as many changes to one as back to zero.
    changes = np.flatnonzero(np.diff(np.pad(columns.ravel(), 1))) + left * height
    return encode_changes(changes, 1, size)[0]


def encode_changes(changes: np.ndarray, count: int, size: tuple[int, int]) -> list[RunLengths]:
    """Run lengths of ``count`` masks of one size, from the pixels at which they change from zero to one and back.

    Args:
        changes: (P,) int64, rising. Pixels are counted down the columns of the first mask, then down those of the
            second, and so on; every mask begins with zero. A change behind the last pixel of all has no meaning.
        size: (height, width) of the images in pixels.
    """
    pixels = size[0] * size[1]
    changes = changes[changes < count * pixels]
    number = changes // pixels
    # The runs of a mask lie between 0, its changes and the number of its pixels.
    ends = np.searchsorted(number, np.arange(count), side="right") + 2 * np.arange(count) + 1
    places = np.zeros(len(changes) + 2 * count, dtype=np.int64)
    places[np.arange(len(changes)) + 2 * number + 1] = changes - number * pixels
    places[ends] = pixels
    runs = np.diff(places).astype(np.uint32)
    return [
        _as_text(coco_mask.frPyObjects({"size": list(size), "counts": runs[begin:end]}, *size))
        for begin, end in zip([0, *(ends[:-1] + 1).tolist()], ends.tolist())
    ]


def _as_text(rle: RunLengths) -> RunLengths:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }

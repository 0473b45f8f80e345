"""Outlines of objects: COCO's polygons and run lengths, checked, stored compactly, and rasterised at any resolution.

Both follow pycocotools' convention: pixel i covers [i, i + 1), and a pixel is inside if its centre is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mvision.data.formats.numbers import whole_number

Polygons = list[np.ndarray]  # parts of one object, each (P, 2) x, y; the object is their union
RunLengths = dict[str, Any]  # {"size": [height, width], "counts": bytes}, column by column as COCO has it
Outline = Polygons | RunLengths


FARTHEST = 64  # sides of the image by which a point may lie outside of it
LONGEST, LONGEST_PIXELS = 1000, 2**21  # the way round a polygon, in sides of the image and in pixels
LARGE = 2**24  # pixels of an image whose run lengths are not decoded as a whole


class BadSegmentation(ValueError):
    """A segmentation that cannot be used; the message says why."""


def parse_segmentation(segmentation: Any, height: int, width: int) -> tuple[Outline | None, int]:
    """Check one annotation's ``segmentation``.

    Args:
        segmentation: a list of flat polygons, or run lengths with ``counts`` as a list or as COCO's compressed string.
        height, width: of the image in pixels.

    Returns:
        The outline in pixels (None where the annotation has none), and how many unusable polygon parts were left out.

    Raises:
        BadSegmentation: nothing usable in it, or run lengths of another size than the image.
    """
    if not segmentation:
        return None, 0
    if isinstance(segmentation, dict):
        return _parse_run_lengths(segmentation, height, width), 0
    if not isinstance(segmentation, list):
        raise BadSegmentation("segmentation is neither a list of polygons nor run lengths")
    if isinstance(segmentation[0], int | float):
        segmentation = [segmentation]  # one flat polygon without the outer list: a common slip of exporters
    parts = [part for part in (_parse_polygon(part, height, width) for part in segmentation) if part is not None]
    if not parts:
        raise BadSegmentation("no polygon with three or more finite points near the image")
    return parts, len(segmentation) - len(parts)


def outline_box(outline: Outline) -> tuple[float, float, float, float]:
    """Extent of an outline as xyxy in its own unit."""
    if isinstance(outline, dict):
        x, y, w, h = (float(v) for v in coco_mask.toBbox(outline))
        return x, y, x + w, y + h
    points = np.concatenate(outline)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def outline_area(outline: Outline, height: int, width: int) -> float:
    """Area in pixels of an outline given in pixels; parts that overlap count once."""
    if isinstance(outline, list):
        parts = coco_mask.frPyObjects([part.reshape(-1).astype(np.float64) for part in outline], height, width)
        outline = coco_mask.merge(parts)
    return float(coco_mask.area(outline))


def rasterise(
    outline: Outline,
    scale: np.ndarray,
    offset: np.ndarray,
    window: tuple[int, int, int, int],
    size: tuple[int, int],
) -> np.ndarray:
    """Draw one object on a raster.

    Args:
        outline: polygons in fractions of the source image, or run lengths of the source image.
        scale, offset: (2,) x, y: a point p (in fractions) of the source image lands at p * scale + offset (in
            fractions) of the raster; a negative scale is a flip.
        window: x0, y0, x1, y1 in pixels of the raster; nothing is drawn outside of it.
        size: height and width of the raster.

    Returns:
        (height, width) uint8 of 0 and 1.
    """
    height, width = size
    raster = np.zeros(size, dtype=np.uint8)
    x0, y0, x1, y1 = _drawn_part(outline, scale, offset, window, size)
    if x1 <= x0 or y1 <= y0:
        return raster
    if isinstance(outline, dict):
        extent = outline["size"]
        rows = _source_indices(np.arange(y0, y1), height, float(scale[1]), float(offset[1]), extent[0])
        columns = _source_indices(np.arange(x0, x1), width, float(scale[0]), float(offset[0]), extent[1])
        raster[y0:y1, x0:x1] = _sample_run_lengths(outline, rows, columns)
        return raster
    factor = scale * np.array((width, height))
    shift = offset * np.array((width, height)) - np.array((x0, y0))
    parts = [(part * factor + shift).astype(np.float64).reshape(-1) for part in outline]
    merged = coco_mask.merge(coco_mask.frPyObjects(parts, y1 - y0, x1 - x0))
    raster[y0:y1, x0:x1] = coco_mask.decode(merged)
    return raster


class Outlines:
    """The outlines of all objects of a split in a few flat arrays, as millions of small lists would fill the memory.

    ``outlines[i]`` is the outline of object i or None.
    """

    def __init__(self, outlines: Sequence[Outline | None]) -> None:
        parts: list[np.ndarray] = []
        first_part = [0]
        self.run_lengths: dict[int, RunLengths] = {}
        for index, outline in enumerate(outlines):
            if isinstance(outline, dict):
                self.run_lengths[index] = outline
            elif outline is not None:
                parts.extend(outline)
            first_part.append(len(parts))
        self.first_part = np.array(first_part, dtype=np.int64)
        self.first_point = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        self.points = np.concatenate(parts).astype(np.float32) if parts else np.zeros((0, 2), np.float32)

    def __len__(self) -> int:
        return len(self.first_part) - 1

    @property
    def present(self) -> np.ndarray:
        """(N,) bool: the object has an outline."""
        present = np.diff(self.first_part) > 0
        present[list(self.run_lengths)] = True
        return present

    def __getitem__(self, index: int) -> Outline | None:
        if index in self.run_lengths:
            return self.run_lengths[index]
        begin, end = int(self.first_part[index]), int(self.first_part[index + 1])
        if begin == end:
            return None
        bounds = self.first_point[begin : end + 1]
        return [self.points[bounds[i] : bounds[i + 1]] for i in range(end - begin)]


def _drawn_part(
    outline: Outline,
    scale: np.ndarray,
    offset: np.ndarray,
    window: tuple[int, int, int, int],
    size: tuple[int, int],
) -> tuple[int, int, int, int]:
    """The part of the window that can hold pixels of the outline; the rest need not be rasterised."""
    x0, y0, x1, y1 = outline_box(outline)
    corners = np.array(((x0, y0), (x1, y1)))
    if isinstance(outline, dict):
        corners /= outline["size"][::-1]
    corners = (corners * scale + offset) * (size[1], size[0])
    low = np.maximum(np.floor(corners.min(axis=0)), window[:2]).astype(int)
    high = np.minimum(np.ceil(corners.max(axis=0)), window[2:]).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _source_indices(targets: np.ndarray, extent: int, scale: float, offset: float, source_extent: int) -> np.ndarray:
    """Source pixel under the centre of each target pixel; -1 where that is outside."""
    indices = np.floor(((targets + 0.5) / extent - offset) / scale * source_extent).astype(np.int64)
    indices[(indices < 0) | (indices >= source_extent)] = -1
    return indices


def _sample_run_lengths(outline: RunLengths, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels of a mask in these rows and columns; index -1 stands for "outside the image", which is 0."""
    height, width = outline["size"]
    if height * width <= LARGE:
        padded = np.pad(coco_mask.decode(outline), ((0, 1), (0, 1)))
        return padded[np.ix_(rows, columns)]
    ends = np.cumsum(_uncompress(outline["counts"]))
    run = np.searchsorted(ends, columns[None] * height + rows[:, None], side="right")
    run[(rows < 0)[:, None] | (columns < 0)[None]] = 0  # the first run is of pixels outside the object
    return (run % 2).astype(np.uint8)


def _parse_polygon(part: Any, height: int, width: int) -> np.ndarray | None:
    """(P, 2) points of one part of an object; None where it cannot be one.

    pycocotools walks along a polygon in steps of a fifth of a pixel, with whole numbers of 32 bits. A point far away
    takes the process down (signal 11), and a line that goes to and fro over the image thousands of times the memory.
    """
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return None
    try:
        points = np.array(part, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return None
    # Most polygons are short enough whatever way they take. Not-a-number fails every comparison.
    most, side = float(np.abs(points).max()), min(height, width)
    if most <= FARTHEST * side and 2 * most * len(points) <= min(LONGEST * side, LONGEST_PIXELS):
        return points
    if not (np.abs(points) <= (FARTHEST * width, FARTHEST * height)).all():
        return None
    steps = np.abs(np.diff(points, axis=0, append=points[:1]))
    if (steps / (width, height)).max(axis=1).sum() > LONGEST or steps.max(axis=1).sum() > LONGEST_PIXELS:
        return None
    return points


def _parse_run_lengths(segmentation: dict[str, Any], height: int, width: int) -> RunLengths:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or [whole_number(side) for side in size] != [height, width]:
        raise BadSegmentation(f"run lengths of size {size!r:.60} on an image of [{height}, {width}]")
    if isinstance(counts, list):
        try:
            runs = np.array(counts, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadSegmentation("run lengths that are no numbers") from error
    elif isinstance(counts, str | bytes):
        if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
            counts = counts[2:-1].replace("\\\\", "\\")  # Python's way to show bytes, written by mistake
        runs = _uncompress(counts.encode() if isinstance(counts, str) else counts)
    else:
        raise BadSegmentation("run lengths without counts")
    # Run by run, as a sum of huge ones could wrap around to the right one.
    if not ((runs >= 0) & (runs <= height * width) & (runs % 1 == 0)).all() or runs.sum() != height * width:
        raise BadSegmentation(f"run lengths do not add up to {height} x {width} pixels")
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def _uncompress(counts: bytes) -> np.ndarray:
    """COCO's compressed run lengths as (R,) int64.

    Each character holds five bits of a number, counted from '0'; its sixth bit is set if more bits follow. From the
    third run on, the difference to the run two before is stored. Done here because pycocotools reads past the end of a
    damaged string without an error.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes >= 64)).any():
        raise BadSegmentation("run lengths hold a character that does not belong there")
    if not len(codes):
        return codes
    last = np.flatnonzero(codes < 32)  # character of each number
    if codes[-1] >= 32:
        raise BadSegmentation("run lengths end in the middle of a number")
    first = np.concatenate(([0], last[:-1] + 1))
    if (last - first).max() >= 7:
        raise BadSegmentation("run lengths hold a number of more than 35 bits")
    length = last - first + 1
    place = np.arange(len(codes)) - np.repeat(first, length)
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    values -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)
    values[2::2] = np.cumsum(values[2::2])
    values[1::2] = np.cumsum(values[1::2])
    return values

"""The shapes of tools for labelling as objects of a COCO dictionary, and which of them are parts of one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mvision.data.formats.problems import Problems
from mvision.structures.decoding import BadImage, check_size
from mvision.structures.masks import RunLengths, encode_mask

ELLIPSE_POINTS = 64
SLACK = 0.1  # of an object's box, by which a point may lie outside of it and still belong to it
Point = tuple[float, float, float]
"""x, y in pixels, and COCO's visibility."""


@dataclass
class Shape:
    """An object, or a part of one.

    Attributes:
        name: its class.
        place: where it stands, for problems.
        box: x0, y0, x1, y1.
        polygons: flat x, y lists.
        mask: run lengths.
        points: by name; None for a shape that is none of them.
        alone: nothing says to which other shape it belongs.
    """

    name: str
    place: str
    box: list[float] | None = None
    polygons: list[list[float]] = field(default_factory=list)
    mask: RunLengths | None = None
    points: dict[str, Point] | None = None
    alone: bool = True

    @property
    def extent(self) -> list[float] | None:
        """x0, y0, x1, y1 of box or outlines; None of a mask or points alone."""
        if self.box is not None:
            return self.box
        values = [np.reshape(polygon, (-1, 2)) for polygon in self.polygons]
        if not values:
            return None
        every = np.concatenate(values)
        return [*every.min(axis=0).tolist(), *every.max(axis=0).tolist()]


def merge(parts: Sequence[Shape]) -> Shape:
    """Parts of one object as one shape."""
    whole = Shape(parts[0].name, parts[0].place, alone=False)
    for part in parts:
        whole.box = whole.box if part.box is None else part.box
        whole.polygons += part.polygons
        whole.mask = whole.mask if part.mask is None else part.mask
        if part.points is not None:
            whole.points = {**(whole.points or {}), **part.points}
    return whole


def give_points(shapes: list[Shape], problems: Problems, kind: str) -> list[Shape]:
    """Points of their own go to the object of their class that has none and is the smallest around them.

    Args:
        shapes: of one picture.
        kind: what is said of those that found one.

    Returns:
        The shapes without those whose points another one has now.
    """
    left = []
    for shape in shapes:
        is_points = shape.points is not None and shape.box is None and not shape.polygons and shape.mask is None
        owner = _owner(shape, shapes) if is_points and shape.alone else None
        if owner is None:
            left.append(shape)
            continue
        problems.add(kind, shape.place, "keypoints")
        owner.points = {**(owner.points or {}), **(shape.points or {})}
    return left


def _owner(points: Shape, shapes: Sequence[Shape]) -> Shape | None:
    places = [(x, y) for x, y, v in (points.points or {}).values() if v]
    fitting: list[tuple[float, int, Shape]] = []
    for shape in shapes:
        extent = shape.extent
        if shape is points or shape.name != points.name or extent is None or not places:
            continue
        if (shape.points or {}).keys() & (points.points or {}).keys():
            continue
        x0, y0, x1, y1 = extent
        dx, dy = SLACK * (x1 - x0), SLACK * (y1 - y0)
        if all(x0 - dx <= x <= x1 + dx and y0 - dy <= y <= y1 + dy for x, y in places):
            fitting.append(((x1 - x0) * (y1 - y0), len(fitting), shape))
    return min(fitting)[2] if fitting else None


def annotation(shape: Shape, image: int, category: int, names: Sequence[str]) -> dict[str, Any]:
    """A shape in COCO's format; ``names`` are the keypoints of its class."""
    entry: dict[str, Any] = {"image_id": image, "category_id": category, "iscrowd": 0}
    if shape.box is not None:
        x0, y0, x1, y1 = shape.box
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    if shape.mask is not None:
        entry["segmentation"] = shape.mask
    elif shape.polygons:
        entry["segmentation"] = shape.polygons
    if shape.points is not None:
        entry["keypoints"] = [value for name in names for value in shape.points.get(name, (0.0, 0.0, 0))]
    return entry


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float) -> list[float]:
    """The outline of an ellipse, which is turned clockwise."""
    at = np.arange(ELLIPSE_POINTS) * (2 * np.pi / ELLIPSE_POINTS)
    turn = math.radians(degrees)
    x, y = rx * np.cos(at), ry * np.sin(at)
    places = (cx + x * math.cos(turn) - y * math.sin(turn), cy + x * math.sin(turn) + y * math.cos(turn))
    return np.stack(places, axis=1).reshape(-1).tolist()


def box_around(corners: Sequence[tuple[float, float]]) -> list[float]:
    """x0, y0, x1, y1 of points."""
    xs, ys = zip(*corners)
    return [min(xs), min(ys), max(xs), max(ys)]


def turned(x: float, y: float, w: float, h: float, pivot: tuple[float, float], degrees: float) -> list[float]:
    """x0, y0, x1, y1 around a rectangle that is turned clockwise about a point."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    px, py = pivot
    return box_around(
        [(px + (a - px) * cos - (b - py) * sin, py + (a - px) * sin + (b - py) * cos) for a, b in corners]
    )


def too_large(name: str, height: int, width: int) -> str:
    """Why masks of a picture of this size are not read; empty where they are."""
    try:
        check_size(name, width, height, "mask")
    except BadImage as error:
        return error.reason
    return ""


def run_lengths(pixels: np.ndarray) -> RunLengths:
    """(H, W) bool as COCO has it."""
    return encode_mask(pixels)

"""Outlines of the shapes that objects are made of: (N, 2) float arrays, x to the right, y downwards."""

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

Outline = np.ndarray


def polygon(*corners: tuple[float, float]) -> Outline:
    return np.array(corners, float)


@lru_cache(maxsize=256)
def _unit_arc(start: float, stop: float, count: int) -> Outline:
    t = np.radians(np.linspace(start, stop, count))
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def ellipse(x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0, count: int = 32) -> Outline:
    """A closed ellipse (a circle without `ry`); `turn` rotates it clockwise, in degrees."""
    return arc(x, y, rx, rx if ry is None else ry, 0.0, 360 * (1 - 1 / count), turn, count)


def arc(
    x: float, y: float, rx: float, ry: float, start: float, stop: float, turn: float = 0.0, count: int = 20
) -> Outline:
    """Points on an ellipse from angle `start` to `stop`, in degrees, clockwise from the right."""
    points = _unit_arc(start, stop, count) * (rx, ry)
    if turn:
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        points = points @ np.array([[cos, sin], [-sin, cos]])
    return points + np.array([x, y])


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> Outline:
    """A rectangle, with rounded corners when `radius` is given."""
    if radius <= 0:
        return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    r = min(radius, (x1 - x0) / 2, (y1 - y0) / 2)
    corners = ((x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180), (x1 - r, y0 + r, 270))
    return np.concatenate([arc(x, y, r, r, a, a + 90, count=6) for x, y, a in corners])


def hull(circles: Sequence[tuple[float, float, float]]) -> Outline:
    """Convex hull of circles (x, y, radius): limbs are the hull of two, a trunk that of four."""
    rings = np.asarray(circles, float)[:, None]
    points = rings[..., :2] + rings[..., 2:] * _unit_arc(0.0, 360 * 13 / 14, 14)
    return cv2.convexHull(points.reshape(-1, 2).astype(np.float32))[:, 0].astype(float)


def smooth(*corners: tuple[float, float], count: int = 6) -> Outline:
    """Closed Catmull-Rom curve through the corners."""
    p = np.array(corners, float)
    before, after, beyond = (np.concatenate((p[shift:], p[:shift])) for shift in (-1, 1, 2))
    t = np.linspace(0, 1, count, endpoint=False)[None, :, None]
    a, b, c, d = (q[:, None] for q in (before, p, after, beyond))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.reshape(-1, 2)


def stroke(points: Sequence[tuple[float, float]] | Outline, width: float, end_width: float | None = None) -> Outline:
    """Outline of a polyline with a width that may taper."""
    p = np.asarray(points, float)
    tangent = np.empty_like(p)
    tangent[0], tangent[1:-1], tangent[-1] = p[1] - p[0], p[2:] - p[:-2], p[-1] - p[-2]
    tangent /= np.maximum(np.sqrt((tangent**2).sum(axis=1, keepdims=True)), 1e-9)
    normal = tangent[:, ::-1] * (-1, 1)
    half = np.linspace(width, width if end_width is None else end_width, len(p))[:, None] / 2
    return np.concatenate([p + normal * half, (p - normal * half)[::-1]])

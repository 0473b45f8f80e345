"""The rigid classes: car, ball, kite, umbrella, mug. Each function returns a display list in units of its own."""

from functools import lru_cache
from itertools import pairwise

import numpy as np

from mvision.builtin.canvas import Shape
from mvision.builtin.geometry import Outline, arc, box, ellipse, hull, polygon, smooth, stroke
from mvision.builtin.patterns import Colour, Pattern, blend, hsv, random_colour, random_pattern, scaled

_GLASS = (150, 185, 205)
_RUBBER = (32, 32, 35)


def car(rng: np.random.Generator) -> list[Shape]:
    """Saloon, hatchback, van or pickup from the side, or any car from the front or back."""
    paint = random_colour(rng, (0.0, 0.9), (0.15, 0.95))
    if rng.random() < 0.2:
        return _car_end(rng, paint)
    long, roof, wheel = rng.uniform(0.9, 1.15), rng.uniform(0.28, 0.36), rng.uniform(0.085, 0.11)
    glass = scaled(_GLASS, rng.uniform(0.45, 1.1))
    kind = str(rng.choice(["saloon", "hatchback", "van", "pickup"], p=[0.35, 0.3, 0.2, 0.15]))
    a, b = 0.5 * long, roof + 0.02
    front = a * rng.uniform(0.35, 0.55)
    cabin = {
        "saloon": [(-0.62 * a, -0.2), (-0.4 * a, -b), (0.2 * a, -b), (front + 0.1, -0.2)],
        "hatchback": [(-0.96 * a, -0.2), (-0.8 * a, -b), (0.15 * a, -b), (front + 0.08, -0.2)],
        "van": [(-0.98 * a, -0.2), (-0.96 * a, -b - 0.1), (0.45 * a, -b - 0.1), (0.8 * a, -0.2)],
        "pickup": [(-0.15 * a, -0.2), (-0.1 * a, -b), (0.25 * a, -b), (front + 0.1, -0.2)],
    }[kind]
    belt = -0.2 - 0.01 * rng.random()
    body = smooth(
        (-a, belt), (0.5 * a, belt - 0.01), (0.97 * a, belt + 0.07), (a, -0.04), (0, -0.02), (-0.99 * a, -0.05)
    )
    pattern = random_pattern(rng, (0.1, 0.3), ("stripes", "bands", "patches")) if rng.random() < 0.2 else None
    shapes = [
        Shape(polygon(*cabin), scaled(paint, 0.95), relief=0.3),
        Shape(_inset(polygon(*cabin), 0.8), glass, relief=0.15),
        Shape(body, paint, pattern=pattern, relief=0.6),
    ]
    middle = (cabin[0][0] + cabin[3][0]) / 2
    shapes.append(Shape(box(middle - 0.014, cabin[1][1], middle + 0.014, belt), scaled(paint, 0.9)))
    shapes.append(Shape(box(middle - 0.006, belt, middle, -0.05), scaled(paint, 0.7)))
    shapes.append(Shape(box(-0.98 * a, -0.075, 0.98 * a, -0.05), scaled(paint, 0.6)))
    shapes.append(Shape(ellipse(0.94 * a, belt + 0.085, 0.035, 0.022, count=12), (250, 244, 200)))
    shapes.append(Shape(ellipse(-0.96 * a, belt + 0.06, 0.022, 0.03, count=12), (190, 30, 30)))
    rim = random_colour(rng, (0.0, 0.3), (0.5, 0.95))
    for x in (-0.62 * a, 0.6 * a):
        shapes += _wheel(x, -0.03, wheel, rim, spokes=int(rng.integers(4, 8)))
    return shapes


def _inset(outline: Outline, factor: float) -> Outline:
    centre = (outline.min(axis=0) + outline.max(axis=0)) / 2
    return centre + factor * (outline - centre)


def _wheel(x: float, y: float, radius: float, rim: Colour, spokes: int) -> list[Shape]:
    shapes = [Shape(ellipse(x, y, radius), _RUBBER, relief=0.3), Shape(ellipse(x, y, 0.62 * radius, count=20), rim)]
    for i in range(spokes):
        t = 2 * np.pi * i / spokes
        end = (x + 0.55 * radius * np.cos(t), y + 0.55 * radius * np.sin(t))
        shapes.append(Shape(stroke([(x, y), end], 0.16 * radius), scaled(rim, 0.55)))
    return shapes


def _car_end(rng: np.random.Generator, paint: Colour) -> list[Shape]:
    tall = rng.uniform(0.36, 0.6)
    back = rng.random() < 0.5
    lamp = (200, 35, 30) if back else (252, 246, 210)
    glass = scaled(_GLASS, rng.uniform(0.45, 1.1))
    shapes = [Shape(box(s * 0.37 - 0.06, -0.1, s * 0.37 + 0.06, 0.06, 0.02), _RUBBER) for s in (-1, 1)]
    top = polygon((-0.42, -0.36), (-0.33, -0.36 - tall), (0.33, -0.36 - tall), (0.42, -0.36))
    shapes.append(Shape(top, scaled(paint, 0.95), relief=0.3))
    shapes.append(Shape(_inset(top, 0.84), glass, relief=0.15))
    shapes.append(Shape(box(-0.48, -0.38, 0.48, -0.02, 0.09), paint, relief=0.6))
    for s in (-1, 1):
        shapes.append(Shape(ellipse(s * 0.37, -0.25, 0.075, rng.uniform(0.04, 0.07), count=20), lamp, relief=0.3))
        shapes.append(Shape(ellipse(s * 0.51, -0.42, 0.05, 0.035, count=14), scaled(paint, 0.8)))
    shapes.append(Shape(box(-0.2, -0.27, 0.2, -0.19, 0.02), (30, 30, 32) if not back else scaled(paint, 0.7)))
    shapes.append(Shape(box(-0.11, -0.14, 0.11, -0.07), (238, 238, 225)))
    shapes.append(Shape(box(-0.49, -0.06, 0.49, -0.015, 0.02), scaled(paint, 0.55)))
    return shapes


def ball(rng: np.random.Generator) -> list[Shape]:
    """Beach ball, football, basketball, tennis ball or printed ball: marks on a sphere in any orientation."""
    base, mark = random_colour(rng, (0.0, 0.9), (0.4, 1.0)), random_colour(rng)
    kind = str(rng.choice(["beach", "football", "seams", "curve", "printed"]))
    turn = _random_rotation(rng)
    shapes = [Shape(ellipse(0, 0, 1, count=48), base)]
    if kind == "beach":
        third = random_colour(rng)
        for i in range(18):  # six gores in slices narrow enough to be cut off at the rim one by one
            patch = np.concatenate([_meridian(20 * i), _meridian(20 * i + 21)[::-1]])
            shapes += _on_sphere(patch @ turn.T, (mark, (245, 244, 238), third)[i // 3 % 3])
        shapes += _on_sphere(_cap((0, 0, 1), 14) @ turn.T, mark)
    elif kind == "football":
        for direction in _icosahedron():
            shapes += _on_sphere(_cap(direction, 21, count=5) @ turn.T, mark)
    elif kind == "seams":
        for normal in ((1, 0, 0), (0, 1, 0), (0.72, 0, 0.69), (0.72, 0, -0.69)):
            shapes += _on_sphere(_ring(normal, 88, 92) @ turn.T, scaled(base, 0.35))
    elif kind == "curve":
        for sign in (-1, 1):
            shapes += _on_sphere(_ring((0, sign * 0.5, 0.87), 46, 54) @ turn.T, (240, 240, 232))
    else:
        shapes[0].pattern = random_pattern(rng, (0.5, 1.1))
    for t in np.linspace(0, 1, 7):  # shading of a sphere: a dark rim, a bright spot towards the light
        shapes.append(Shape(ellipse(0, -0.28 * t, 1 - 0.85 * t, count=28), None, tone=0.62 + 0.58 * t))
    return shapes


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


@lru_cache(maxsize=64)
def _meridian(degrees: float, count: int = 13) -> np.ndarray:
    t, a = np.linspace(0, np.pi, count), np.radians(degrees)
    return np.column_stack([np.sin(t) * np.cos(a), np.sin(t) * np.sin(a), np.cos(t)])


@lru_cache(maxsize=64)
def _circle_on_sphere(direction: tuple[float, float, float], degrees: float, count: int) -> np.ndarray:
    axis = np.asarray(direction, float) / np.linalg.norm(direction)
    helper = np.array([1.0, 0, 0]) if abs(axis[0]) < 0.8 else np.array([0, 1.0, 0])
    u = np.cross(axis, helper)
    u /= np.linalg.norm(u)
    v = np.cross(axis, u)
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)[:, None]
    a = np.radians(degrees)
    return np.cos(a) * axis + np.sin(a) * (np.cos(t) * u + np.sin(t) * v)


def _cap(direction: tuple[float, float, float], degrees: float, count: int = 20) -> np.ndarray:
    return _circle_on_sphere(direction, degrees, count)


def _ring(direction: tuple[float, float, float], inner: float, outer: float, count: int = 28) -> np.ndarray:
    """A band between two parallel circles, as quadrilaterals: (count, 4, 3)."""
    a, b = _circle_on_sphere(direction, inner, count), _circle_on_sphere(direction, outer, count)
    return np.stack([a, np.roll(a, -1, 0), np.roll(b, -1, 0), b], axis=1)


def _on_sphere(patches: np.ndarray, colour: Colour) -> list[Shape]:
    """Patches (N, 3) or (M, N, 3) on the unit sphere, cut off at the rim: what lies behind it is not seen."""
    shapes = []
    for patch in patches if patches.ndim == 3 else patches[None]:
        front = patch[:, 2] >= 0
        if front.all():
            shapes.append(Shape(patch[:, :2], colour))
        elif front.any():
            after, front_after = np.concatenate((patch[1:], patch[:1])), [*front[1:], front[0]]
            outline = []
            for p, q, p_front, q_front in zip(patch, after, front, front_after):
                if p_front:
                    outline.append(p[:2])
                if p_front != q_front:  # the edge crosses the rim
                    crossing = (p + (q - p) * p[2] / (p[2] - q[2]))[:2]
                    outline.append(crossing / max(float(np.hypot(*crossing)), 1e-6))
            shapes.append(Shape(np.array(outline), colour))
    return shapes


def _icosahedron() -> list[tuple[float, float, float]]:
    g = (1 + 5**0.5) / 2
    signs = [(a, b) for a in (-1, 1) for b in (-g, g)]
    return [(0, a, b) for a, b in signs] + [(a, b, 0) for a, b in signs] + [(b, 0, a) for a, b in signs]


def kite(rng: np.random.Generator) -> list[Shape]:
    """A diamond or delta kite, with spars and a tail with bows."""
    colours = [random_colour(rng) for _ in range(3)]
    wide, drop = rng.uniform(0.32, 0.5), rng.uniform(0.3, 0.45)
    delta = rng.random() < 0.3
    top, bottom, left, right = (0.0, 0.0), (0.0, 1.0), (-wide, drop), (wide, drop)
    cross = (0.0, drop)
    if delta:
        left, right, bottom, cross = (-wide * 1.5, 0.55), (wide * 1.5, 0.55), (0.0, 0.62), (0.0, 0.35)
    shapes = _kite_tail(rng, bottom, colours)
    pattern = random_pattern(rng, (0.12, 0.35)) if rng.random() < 0.4 else None
    quarters = [(top, left, cross), (top, cross, right), (left, bottom, cross), (cross, bottom, right)]
    layout = rng.integers(0, 3, 4) if rng.random() < 0.5 else np.array([0, 1, 1, 0])
    for corners, c in zip(quarters, layout):
        shapes.append(
            Shape(polygon(*corners), scaled(colours[c], rng.uniform(0.85, 1.1)), pattern=pattern, relief=0.25)
        )
    spar = hsv(0.08, 0.5, rng.uniform(0.2, 0.5))
    shapes.append(Shape(stroke([top, bottom], 0.016), spar))
    shapes.append(Shape(stroke([left, cross, right], 0.016), spar))
    return shapes


def _kite_tail(rng: np.random.Generator, start: tuple[float, float], colours: list[Colour]) -> list[Shape]:
    length, swing, phase = rng.uniform(0.3, 0.8), rng.uniform(0.04, 0.12), rng.uniform(0, 6)
    t = np.linspace(0, 1, 16)
    x = start[0] + swing * (np.sin(6 * t + phase) - np.sin(phase))
    line = np.column_stack([x, start[1] + length * t])
    shapes = [Shape(stroke(line, 0.022), scaled(colours[0], 0.6))]
    for i in range(4, 16, int(rng.integers(3, 5))):
        (px, py), r = line[i], rng.uniform(0.05, 0.075)
        bow = polygon(
            (px - r, py - r * 0.6),
            (px, py),
            (px + r, py - r * 0.6),
            (px + r, py + r * 0.6),
            (px, py),
            (px - r, py + r * 0.6),
        )
        shapes.append(Shape(bow, colours[i % 3]))
    return shapes


def umbrella(rng: np.random.Generator) -> list[Shape]:
    """An open umbrella with a crook, or a parasol on a straight pole."""
    first, second = random_colour(rng), random_colour(rng)
    if rng.random() < 0.35:
        second = scaled(first, rng.uniform(0.75, 0.9))
    high, segments = rng.uniform(0.26, 0.5), int(rng.integers(4, 9))
    shaft, metal = rng.uniform(0.55, 1.0), random_colour(rng, (0.0, 0.5), (0.2, 0.8))
    shapes = [Shape(box(-0.012, -high - 0.05, 0.012, shaft * 0.55), metal)]
    if rng.random() < 0.6:
        y, r = shaft * 0.55, 0.06
        side = 1 if rng.random() < 0.5 else -1
        crook = arc(side * r, y, r, r, 180, 0, count=12) if side > 0 else arc(-r, y, r, r, 0, 180, count=12)
        shapes.append(Shape(stroke(crook, 0.036), random_colour(rng, (0.2, 0.8), (0.15, 0.7))))
    else:
        shapes.append(Shape(box(-0.016, 0, 0.016, shaft), metal, relief=0.3))
    # The underside, seen a little from below, and the canopy in gores from one rib to the next.
    shapes.append(Shape(ellipse(0, 0, 0.5, rng.uniform(0.02, 0.06)), scaled(first, 0.45)))
    ribs = np.sin(np.linspace(-np.pi / 2, np.pi / 2, segments + 1)) * 0.5
    pattern = random_pattern(rng, (0.1, 0.25), ("dots", "checks", "patches")) if rng.random() < 0.25 else None
    t = np.linspace(0, np.pi / 2, 9)
    for i, (x0, x1) in enumerate(pairwise(ribs)):
        left = np.column_stack([x0 * np.sin(t), -high * np.cos(t)])
        right = np.column_stack([x1 * np.sin(t), -high * np.cos(t)])[::-1]
        scallop = np.array([[(x0 + x1) / 2, -0.035]])
        gore = np.concatenate([left, scallop, right])
        shapes.append(Shape(gore, (first, second)[i % 2], pattern=pattern, relief=0.35))
    shapes.append(Shape(polygon((-0.014, -high + 0.01), (0, -high - 0.08), (0.014, -high + 0.01)), metal))
    return shapes


def mug(rng: np.random.Generator) -> list[Shape]:
    """A mug or cup with a handle, seen from slightly above."""
    glaze, drink = (
        random_colour(rng, (0.0, 0.9), (0.3, 1.0)),
        hsv(rng.uniform(0, 0.15), rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.7)),
    )
    half, high, taper = rng.uniform(0.3, 0.48), rng.uniform(0.6, 1.05), rng.uniform(0.7, 1.05)
    lid = half * rng.uniform(0.14, 0.42)
    foot = half * taper
    shapes = []
    if rng.random() < 0.9:
        reach, span = rng.uniform(0.2, 0.32), high * rng.uniform(0.24, 0.34)
        handle = arc(half * 0.9, high * 0.46, reach, span, -100, 100, count=16)
        shapes.append(Shape(stroke(handle, rng.uniform(0.07, 0.11)), scaled(glaze, 0.92), relief=0.6))
    base = arc(0, high, foot, lid * taper * 0.8, 0, 180, count=16)
    wall = np.concatenate([[(-half, 0.0), (half, 0.0)], base])
    shapes.append(Shape(wall, glaze, pattern=_print(rng, high)))
    for t in np.linspace(0, 1, 5):  # a cylinder's shading
        x0, x1 = -1 + 0.25 * t, 1 - 1.05 * t
        column = polygon((half * x0, 0), (half * x1, 0), (foot * x1, high), (foot * x0, high))
        shapes.append(Shape(column, None, tone=0.68 + 0.45 * t))
    shapes.append(Shape(ellipse(0, 0, half, lid), scaled(glaze, 1.08)))
    shapes.append(Shape(ellipse(0, 0.01, half * 0.9, lid * 0.86), scaled(glaze, 0.55)))
    if rng.random() < 0.7:
        shapes.append(Shape(ellipse(0, 0.06, half * 0.84, lid * 0.72), drink))
    if rng.random() < 0.3:
        shapes.append(Shape(ellipse(0, high * 0.55, half * 0.5, high * 0.2), random_colour(rng)))
        shapes.append(Shape(hull([(0, high * 0.55, half * 0.2)]), blend(glaze, (255, 255, 255), 0.5)))
    return shapes


def _print(rng: np.random.Generator, high: float) -> Pattern | None:
    return random_pattern(rng, (0.15 * high, 0.5 * high)) if rng.random() < 0.6 else None

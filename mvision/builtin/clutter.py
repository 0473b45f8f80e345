"""Unlabelled things: look-alikes and occluders, made of the same parts and colours as the classes."""

from collections.abc import Callable

import numpy as np

from mvision.builtin.canvas import Shape
from mvision.builtin.geometry import arc, box, ellipse, hull, polygon, smooth, stroke
from mvision.builtin.patterns import hsv, random_colour, random_pattern, scaled


def tree(rng: np.random.Generator) -> list[Shape]:
    bark, leaf = (
        hsv(0.07, 0.5, rng.uniform(0.2, 0.5)),
        hsv(rng.uniform(0.15, 0.4), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.7)),
    )
    shapes = [Shape(polygon((-0.05, 0), (-0.035, -0.5), (0.035, -0.5), (0.05, 0)), bark, relief=0.6)]
    if rng.random() < 0.35:
        for k in range(3):
            y, half = -0.25 - 0.22 * k, 0.3 - 0.07 * k
            shapes.append(
                Shape(polygon((-half, y), (0, y - 0.36), (half, y)), scaled(leaf, 0.85 + 0.1 * k), relief=0.4)
            )
        return shapes
    for _ in range(6):
        x, y, r = rng.uniform(-0.2, 0.2), rng.uniform(-0.85, -0.5), rng.uniform(0.13, 0.22)
        shapes.append(Shape(ellipse(x, y, r, count=18), scaled(leaf, rng.uniform(0.8, 1.15)), relief=0.5))
    return shapes


def bush(rng: np.random.Generator) -> list[Shape]:
    leaf = hsv(rng.uniform(0.15, 0.42), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.65))
    shapes = []
    for x in np.linspace(-0.4, 0.4, 5):
        r = rng.uniform(0.14, 0.24)
        shapes.append(Shape(ellipse(x, -r * 0.7, r, count=18), scaled(leaf, rng.uniform(0.75, 1.15)), relief=0.5))
    return shapes


def crate(rng: np.random.Generator) -> list[Shape]:
    """A box with slats or a print."""
    side, high = random_colour(rng, (0.1, 0.8), (0.3, 0.9)), rng.uniform(0.4, 1.0)
    deep = rng.uniform(0.1, 0.25)
    pattern = random_pattern(rng, (0.15, 0.5)) if rng.random() < 0.6 else None
    return [
        Shape(
            polygon((-0.5, -high), (-0.5 + deep, -high - deep), (0.5 + deep, -high - deep), (0.5, -high)),
            scaled(side, 1.15),
        ),
        Shape(polygon((0.5, 0), (0.5 + deep, -deep), (0.5 + deep, -high - deep), (0.5, -high)), scaled(side, 0.65)),
        Shape(box(-0.5, -high, 0.5, 0), side, pattern=pattern, relief=0.2),
    ]


def sign(rng: np.random.Generator) -> list[Shape]:
    """A round, square or pointed plate on a pole: from afar a ball or a kite."""
    plate, edge = random_colour(rng), random_colour(rng)
    corners = int(rng.choice([4, 4, 8, 28]))
    outline = ellipse(0, -0.8, 0.2, turn=float(rng.choice([0, 180 / corners])), count=corners)
    inner = (outline - (0, -0.8)) * 0.78 + (0, -0.8)
    pattern = random_pattern(rng, (0.1, 0.3)) if rng.random() < 0.5 else None
    return [
        Shape(box(-0.018, -0.8, 0.018, 0), random_colour(rng, (0, 0.3), (0.3, 0.8)), relief=0.5),
        Shape(outline, edge),
        Shape(inner, plate, pattern=pattern),
    ]


def bottle(rng: np.random.Generator) -> list[Shape]:
    """Near to a mug, without a handle."""
    glass, half = random_colour(rng), rng.uniform(0.12, 0.2)
    body = smooth(
        (-half, 0),
        (half, 0),
        (half, -0.55),
        (0.05, -0.72),
        (0.05, -0.95),
        (-0.05, -0.95),
        (-0.05, -0.72),
        (-half, -0.55),
    )
    label = box(-half * 0.98, -0.42, half * 0.98, -0.18)
    return [
        Shape(body, glass, relief=0.7),
        Shape(label, random_colour(rng)),
        Shape(box(-0.055, -1.0, 0.055, -0.93), scaled(glass, 0.5)),
    ]


def balloon(rng: np.random.Generator) -> list[Shape]:
    """Near to a ball, on a string like a kite."""
    skin, wide = random_colour(rng, (0.3, 0.95), (0.4, 1.0)), rng.uniform(0.22, 0.27)
    string = np.column_stack([0.04 * np.sin(np.linspace(0, 7, 12)), np.linspace(0.3, 0.9, 12)])
    shapes = [
        Shape(stroke(string, 0.012), (225, 225, 220)),
        Shape(polygon((0, 0.26), (-0.04, 0.34), (0.04, 0.34)), scaled(skin, 0.8)),
    ]
    shapes.append(Shape(ellipse(0, 0, wide, 0.3, count=28), skin, relief=0.9))
    shapes.append(Shape(ellipse(-0.09, -0.12, 0.03, 0.06, 25, count=12), scaled(skin, 1.6)))
    return shapes


def mannequin(rng: np.random.Generator) -> list[Shape]:
    """A dressmaker's dummy: a trunk and a knob on a stand, with neither limbs nor face."""
    cloth = random_colour(rng)
    pattern = random_pattern(rng, (0.08, 0.2)) if rng.random() < 0.5 else None
    trunk = hull(
        [(-0.12, -0.78, 0.05), (0.12, -0.78, 0.05), (0, -0.55, 0.1), (-0.07, -0.38, 0.09), (0.07, -0.38, 0.09)]
    )
    return [
        Shape(box(-0.015, -0.4, 0.015, 0), (70, 60, 55)),
        Shape(polygon((-0.16, 0.02), (0, -0.06), (0.16, 0.02)), (70, 60, 55)),
        Shape(ellipse(0, -0.88, 0.04, 0.06, count=16), scaled(cloth, 0.6)),
        Shape(trunk, cloth, pattern=pattern, relief=0.7),
    ]


def blob(rng: np.random.Generator) -> list[Shape]:
    """A smooth shape that is nothing in particular."""
    count = int(rng.integers(4, 9))
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radii = rng.uniform(0.25, 0.5, count)
    corners = [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles)]
    outline = smooth(*corners) if rng.random() < 0.6 else polygon(*corners)
    pattern = random_pattern(rng, (0.1, 0.4)) if rng.random() < 0.6 else None
    return [Shape(outline, random_colour(rng), pattern=pattern, relief=rng.uniform(0, 0.7))]


def sticks(rng: np.random.Generator) -> list[Shape]:
    """Loose limbs: capsules in the colours of skin, cloth and bark, in a heap."""
    shapes = []
    for _ in range(int(rng.integers(1, 5))):
        x, y = rng.uniform(-0.3, 0.3, 2)
        angle, reach, r = rng.uniform(0, np.pi), rng.uniform(0.2, 0.4), rng.uniform(0.03, 0.07)
        end = (x + reach * np.cos(angle), y + reach * np.sin(angle))
        colour = hsv(0.07, 0.45, rng.uniform(0.3, 0.95)) if rng.random() < 0.5 else random_colour(rng)
        shapes.append(Shape(hull([(x, y, r), (*end, r * 0.8)]), colour, relief=0.7))
    return shapes


def spare_wheel(rng: np.random.Generator) -> list[Shape]:
    rim = random_colour(rng, (0, 0.3), (0.5, 0.95))
    return [
        Shape(ellipse(0, 0, 0.5), (34, 34, 36), relief=0.3),
        Shape(ellipse(0, 0, 0.3), rim),
        Shape(ellipse(0, 0, 0.1, count=14), scaled(rim, 0.5)),
    ]


def fence(rng: np.random.Generator) -> list[Shape]:
    paint, gap = random_colour(rng, (0.0, 0.5), (0.4, 0.95)), rng.uniform(0.1, 0.18)
    shapes = [Shape(box(-0.5, y, 0.5, y + 0.04), scaled(paint, 0.85)) for y in (-0.3, -0.14)]
    for x in np.arange(-0.47, 0.5, gap):
        shapes.append(
            Shape(polygon((x, 0), (x, -0.36), (x + 0.025, -0.41), (x + 0.05, -0.36), (x + 0.05, 0)), paint, relief=0.3)
        )
    return shapes


def lamp_post(rng: np.random.Generator) -> list[Shape]:
    metal = random_colour(rng, (0.0, 0.3), (0.15, 0.6))
    return [
        Shape(box(-0.02, -1, 0.02, 0), metal, relief=0.6),
        Shape(arc(0, -1.0, 0.09, 0.1, 180, 360), scaled(metal, 0.8)),
        Shape(ellipse(0, -0.99, 0.06, 0.03, count=16), (250, 240, 190)),
    ]


Maker = Callable[[np.random.Generator], list[Shape]]
# Largest size as a fraction of the image's shorter side.
_LARGEST: dict[Maker, float] = {
    tree: 0.8, bush: 0.4, crate: 0.35, sign: 0.55, bottle: 0.35, balloon: 0.45, mannequin: 0.6, blob: 0.25,
    sticks: 0.25, spare_wheel: 0.3, fence: 0.6, lamp_post: 0.8,
}  # fmt: skip
_OUTDOORS = (
    tree,
    tree,
    bush,
    bush,
    crate,
    sign,
    balloon,
    mannequin,
    blob,
    sticks,
    spare_wheel,
    fence,
    lamp_post,
    bottle,
)
_INDOORS = (crate, bottle, balloon, mannequin, blob, sticks, spare_wheel)
_FLAT = (bottle, blob, sticks, spare_wheel, balloon, crate)
_SEA = (bush, blob, bottle, spare_wheel, sticks, crate)
_BY_PLACE = {"park": _OUTDOORS, "street": _OUTDOORS, "beach": _OUTDOORS, "room": _INDOORS, "table": _FLAT, "sea": _SEA}


def sample_clutter(rng: np.random.Generator, place: str) -> tuple[list[Shape], float]:
    """A display list and the largest size it should have, as a fraction of the image's shorter side."""
    makers = _BY_PLACE[place]
    maker = makers[rng.integers(len(makers))]
    return maker(rng), _LARGEST[maker]

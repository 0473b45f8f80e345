"""Dog and fish: display lists in units of their own, heads to the right."""

import numpy as np

from mvision.builtin.canvas import Shape
from mvision.builtin.geometry import arc, ellipse, hull, polygon, smooth, stroke
from mvision.builtin.patterns import Colour, Pattern, hsv, random_colour, random_pattern, scaled


def dog(rng: np.random.Generator) -> list[Shape]:
    """A dog from the side, standing, walking or sitting: long or short legs, ears up or hanging, plain or spotted."""
    coat = hsv(rng.uniform(0.04, 0.13), rng.uniform(0.05, 0.65), rng.uniform(0.15, 0.95))
    if rng.random() < 0.25:  # toys and odd light: colour alone must not give a dog away
        coat = random_colour(rng, (0.1, 0.6), (0.3, 0.9))
    spots = None
    if rng.random() < 0.45:
        spots = Pattern(
            "patches", scaled(coat, rng.choice([0.45, 1.6])), rng.uniform(0.25, 0.55), rng.uniform(0, 90), rng.random()
        )
    length, leg, girth = rng.uniform(0.42, 0.62), rng.uniform(0.17, 0.36), rng.uniform(0.1, 0.15)
    sitting = rng.random() < 0.25
    rump, chest, ground = np.array([-length / 2, 0.0]), np.array([length / 2, -0.02]), girth * 0.5 + leg
    if sitting:
        chest, ground = rump + np.array([0.5, -0.68]) * length, girth * 0.95
    shapes = _tail(rng, rump, girth, coat)
    shapes += _legs(rng, rump, chest, ground, girth, coat, sitting)
    trunk = [(*rump, girth * 0.9), (*((rump + chest) / 2), girth * 0.88), (*chest, girth * 1.02)]
    shapes.append(Shape(hull(trunk), coat, pattern=spots, relief=0.8))
    return shapes + _dog_head(rng, chest, girth, coat, spots)


def _tail(rng: np.random.Generator, rump: np.ndarray, girth: float, coat: Colour) -> list[Shape]:
    rise, curl = rng.uniform(-0.1, 0.3), rng.uniform(-0.1, 0.12)
    x, y = rump - np.array([girth * 0.6, girth * 0.4])
    line = [(x, y), (x - 0.1, y - rise * 0.5), (x - 0.15 + curl, y - rise)]
    return [Shape(stroke(line, 0.065, 0.03), scaled(coat, 0.9), relief=0.5)]


def _legs(
    rng: np.random.Generator,
    rump: np.ndarray,
    chest: np.ndarray,
    ground: float,
    girth: float,
    coat: Colour,
    sitting: bool,
) -> list[Shape]:
    """Far legs first, then near ones; a walking dog swings them."""
    shapes = []
    swing = rng.uniform(0, 0.14) * (not sitting)
    for near in (False, True):
        shade = coat if near else scaled(coat, 0.72)
        for at, phase in ((rump, 1 if near else -1), (chest, -1 if near else 1)):
            if sitting and at is rump:
                haunch = hull([(rump[0] + 0.03, ground - girth, girth), (rump[0] + 0.17, ground - 0.03, 0.03)])
                shapes.append(Shape(haunch, shade, relief=0.6))
                continue
            hip = at + np.array([0.0 if near else 0.05, girth * 0.3])
            paw = np.array([at[0] + phase * swing + (0.0 if near else 0.05), ground - 0.025])
            knee = (hip + paw) / 2 + np.array([0.03 if at is chest else -0.03, 0])
            shapes.append(Shape(hull([(*hip, 0.07), (*knee, 0.042)]), shade, relief=0.6))
            shapes.append(Shape(hull([(*knee, 0.042), (*paw, 0.032)]), shade, relief=0.6))
            shapes.append(Shape(hull([(*paw, 0.03), (paw[0] + 0.035, paw[1] + 0.004, 0.022)]), scaled(shade, 0.85)))
    return shapes


def _dog_head(
    rng: np.random.Generator, chest: np.ndarray, girth: float, coat: Colour, spots: Pattern | None
) -> list[Shape]:
    head = chest + np.array([rng.uniform(0.08, 0.16), -rng.uniform(0.14, 0.24)])
    radius, snout = rng.uniform(0.1, 0.13), rng.uniform(0.11, 0.2)
    drop = rng.uniform(0.0, 0.06)
    nose = head + np.array([snout, drop])
    shapes = [
        Shape(hull([(*chest, girth * 0.75), (*head, radius * 0.75)]), coat, pattern=spots, relief=0.6),
        Shape(hull([(*head, radius * 0.62), (nose[0], nose[1] + 0.015, 0.045)]), scaled(coat, 1.08), relief=0.5),
        Shape(ellipse(head[0], head[1], radius, radius * 0.95), coat, pattern=spots, relief=0.6),
        Shape(ellipse(nose[0] + 0.03, nose[1] - 0.012, 0.03, 0.024, count=12), (28, 24, 26)),
        Shape(ellipse(head[0] + radius * 0.45, head[1] - radius * 0.2, 0.018, count=10), (25, 20, 20)),
    ]
    ear_colour = scaled(coat, rng.uniform(0.5, 0.85))
    x, y = float(head[0]), float(head[1])
    if rng.random() < 0.5:
        ear = polygon((x - 0.07, y - radius * 0.6), (x - 0.05, y - radius * 1.75), (x + 0.04, y - radius * 0.8))
    else:
        ear = ellipse(x - 0.06, y + 0.03, 0.042, rng.uniform(0.08, 0.12), rng.uniform(0, 25), 20)
    shapes.append(Shape(ear, ear_colour, relief=0.4))
    if rng.random() < 0.4:
        collar = stroke([(x - 0.11, y + 0.04), (x + 0.04, y + 0.15)], 0.032)
        shapes.append(Shape(collar, random_colour(rng, (0.6, 1.0), (0.5, 1.0))))
    return shapes


def fish(rng: np.random.Generator) -> list[Shape]:
    """A fish from the side: slender to round, with fins, an eye and stripes, spots or scales."""
    skin, fin = random_colour(rng), random_colour(rng)
    high, tail = rng.uniform(0.14, 0.38), rng.uniform(0.14, 0.28)
    kinds = ("stripes", "bands", "dots", "checks", "patches")
    pattern = random_pattern(rng, (0.1, 0.32), kinds) if rng.random() < 0.75 else None
    fork = rng.uniform(0.0, 0.12)
    root, tip = -0.34, -0.34 - tail
    spread = rng.uniform(0.6, 1.1) * max(high, 0.2)
    shapes = [
        Shape(
            polygon((root, -0.03), (tip, -spread), (tip + fork, 0), (tip, spread), (root, 0.03)),
            fin,
            pattern=None,
            relief=0.3,
        )
    ]
    back = rng.uniform(-0.25, 0.0)
    dorsal = smooth((back - 0.1, -high * 0.6), (back, -high * rng.uniform(1.2, 1.7)), (back + 0.32, -high * 0.75))
    shapes.append(Shape(dorsal, scaled(fin, 0.9), relief=0.2))
    belly = polygon((-0.12, high * 0.7), (-0.2, high * rng.uniform(1.15, 1.5)), (0.06, high * 0.8))
    shapes.append(Shape(belly, scaled(fin, 0.85), relief=0.2))
    body = smooth(
        (0.5, 0.02), (0.36, -high * 0.62), (0.1, -high), (-0.2, -high * 0.66), (-0.38, -0.045),
        (-0.38, 0.045), (-0.2, high * 0.66), (0.1, high), (0.36, high * 0.68),
    )  # fmt: skip
    shapes.append(Shape(body, skin, pattern=pattern, relief=0.75))
    shapes.append(Shape(arc(0.24, 0, 0.05, high * 0.62, -70, 70, count=12), scaled(skin, 0.75)))
    fin_y = high * rng.uniform(0.1, 0.35)
    side = smooth((0.16, fin_y - 0.03), (-0.02, fin_y + rng.uniform(-0.04, 0.1)), (0.12, fin_y + 0.06))
    shapes.append(Shape(side, scaled(fin, 1.1), relief=0.2))
    eye = (0.36, -high * 0.22)
    shapes.append(Shape(ellipse(*eye, 0.04, count=16), (246, 246, 240)))
    shapes.append(Shape(ellipse(eye[0] + 0.008, eye[1], 0.022, count=12), (20, 20, 24)))
    shapes.append(Shape(stroke([(0.5, 0.03), (0.42, 0.055)], 0.014), scaled(skin, 0.5)))
    return shapes

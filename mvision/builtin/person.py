"""The person: a dressed figure drawn from a `Skeleton`, with COCO's 17 keypoints."""

from dataclasses import dataclass

import numpy as np

from mvision.builtin.canvas import Shape, Sprite
from mvision.builtin.geometry import arc, ellipse, hull, polygon, smooth, stroke
from mvision.builtin.patterns import Colour, Pattern, blend, hsv, random_colour, random_pattern, scaled
from mvision.builtin.skeleton import KEYPOINTS, SIDES, Skeleton, sample_skeleton

# Part numbers in the sprite's part map. Arms and legs: left, right.
HEAD, TRUNK = 1, 2
UPPER_ARM, FOREARM, THIGH, SHANK, FOOT = (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)
# Which parts show a keypoint: anything else on top of it hides it.
_OWNERS: dict[str, tuple[int, ...]] = dict.fromkeys(KEYPOINTS[:5], (HEAD,))
for _i, _side in enumerate(SIDES):
    _OWNERS |= {
        f"{_side}_shoulder": (TRUNK, UPPER_ARM[_i]),
        f"{_side}_elbow": (UPPER_ARM[_i], FOREARM[_i]),
        f"{_side}_wrist": (FOREARM[_i],),
        f"{_side}_hip": (TRUNK, THIGH[_i]),
        f"{_side}_knee": (THIGH[_i], SHANK[_i]),
        f"{_side}_ankle": (SHANK[_i], FOOT[_i]),
    }
# (17, 256) bool: does part p show keypoint k?
_SHOWS = np.zeros((len(KEYPOINTS), 256), bool)
for _i, _name in enumerate(KEYPOINTS):
    _SHOWS[_i, list(_OWNERS[_name])] = True


@dataclass
class Person:
    """shapes: the display list. keypoints: (17, 2) in object units. facing: (17,) bool, not on the body's far side."""

    shapes: list[Shape]
    keypoints: np.ndarray
    facing: np.ndarray

    def visible(self, sprite: Sprite) -> np.ndarray:
        """(17,) bool: which keypoints the figure itself leaves in sight, read from the rendered part map."""
        height, width = sprite.parts.shape
        result = np.zeros(len(KEYPOINTS), bool)
        corners = np.floor(sprite.to_image(self.keypoints) - (sprite.left, sprite.top)).astype(int)
        for i, (x, y) in enumerate(corners):
            near = sprite.parts[max(y - 1, 0) : min(y + 2, height), max(x - 1, 0) : min(x + 2, width)]
            result[i] = self.facing[i] and _SHOWS[i][near].any()
        return result


@dataclass
class _Outfit:
    skin: Colour
    hair: Colour
    hair_style: str
    top: Colour
    bottom: Colour
    shoes: Colour
    sleeves: str
    legwear: str
    top_pattern: Pattern | None
    bottom_pattern: Pattern | None
    hat: str
    hat_colour: Colour
    open_jacket: Colour | None


def person(rng: np.random.Generator) -> Person:
    skeleton = sample_skeleton(rng)
    outfit = _sample_outfit(rng)
    layers: list[tuple[float, list[Shape]]] = []
    joints, width = skeleton.joints, skeleton.build.width
    for i, side in enumerate(SIDES):
        layers += _leg(joints, side, i, width, outfit)
        layers += _arm(joints, side, i, width, outfit)
    thigh_depth = max(depth for depth, shapes in layers if shapes[0].part in THIGH)
    layers.append((0.0, _trunk(skeleton, outfit)))
    if outfit.legwear in ("skirt", "dress"):
        layers.append((max(thigh_depth + 0.001, -0.005), [_skirt(skeleton, outfit)]))
    layers.append((joints["head"][2] * 0.5 + 0.03, _head(skeleton, outfit)))
    layers.sort(key=lambda layer: layer[0])
    shapes = [shape for _, group in layers for shape in group]
    keypoints = np.array([joints[name] for name in KEYPOINTS])
    return Person(shapes, keypoints[:, :2].copy(), _facing(skeleton, keypoints))


def _facing(skeleton: Skeleton, keypoints: np.ndarray) -> np.ndarray:
    """Face points are on view when they lie on the near side of the head, shoulders and hips of the trunk."""
    depth = keypoints[:, 2].copy()
    depth[:5] -= skeleton.joints["head"][2]
    limit = np.full(len(KEYPOINTS), -np.inf)
    limit[0], limit[1:3], limit[3:5] = 0.0, 0.01, -0.03
    limit[5:7], limit[11:13] = -0.07, -0.045
    return depth > limit


def _sample_outfit(rng: np.random.Generator) -> _Outfit:
    skin = blend(hsv(0.07, 0.25, 0.98), hsv(0.06, 0.6, 0.32), rng.beta(1.1, 1.3))
    dye = (
        random_colour(rng)
        if rng.random() < 0.1
        else hsv(rng.uniform(0.04, 0.12), rng.uniform(0.1, 0.7), rng.uniform(0.08, 0.8))
    )
    pattern = random_pattern(rng, (0.035, 0.11)) if rng.random() < 0.5 else None
    return _Outfit(
        skin=skin,
        hair=dye,
        hair_style=str(rng.choice(["short", "long", "bun", "tail", "bald"], p=[0.42, 0.25, 0.12, 0.12, 0.09])),
        top=random_colour(rng),
        bottom=random_colour(rng, (0.05, 0.7), (0.15, 0.85)),
        shoes=random_colour(rng, (0.0, 0.7), (0.1, 0.95)),
        sleeves=str(rng.choice(["long", "short", "none"], p=[0.45, 0.42, 0.13])),
        legwear=str(rng.choice(["trousers", "shorts", "skirt", "dress"], p=[0.55, 0.25, 0.1, 0.1])),
        top_pattern=pattern,
        bottom_pattern=random_pattern(rng, (0.03, 0.09)) if rng.random() < 0.15 else None,
        hat=str(rng.choice(["none", "cap", "beanie", "sunhat"], p=[0.72, 0.12, 0.09, 0.07])),
        hat_colour=random_colour(rng),
        open_jacket=random_colour(rng) if rng.random() < 0.2 else None,
    )


def _limb(start: np.ndarray, stop: np.ndarray, r0: float, r1: float, colour: Colour, part: int) -> Shape:
    outline = hull([(start[0], start[1], r0), (stop[0], stop[1], r1)])
    return Shape(outline, colour, part, relief=0.75)


def _leg(
    joints: dict[str, np.ndarray], side: str, i: int, width: float, outfit: _Outfit
) -> list[tuple[float, list[Shape]]]:
    hip, knee, ankle, toe = (joints[f"{side}_{name}"] for name in ("hip", "knee", "ankle", "toe"))
    trousers, covered = outfit.legwear == "trousers", outfit.legwear in ("trousers", "shorts")
    bare = outfit.skin
    thigh = _limb(hip, knee, 0.058 * width, 0.041 * width, outfit.bottom if covered else bare, THIGH[i])
    if outfit.legwear == "shorts":
        middle = hip + 0.7 * (knee - hip)
        skin = _limb(middle, knee, 0.04 * width, 0.037 * width, bare, THIGH[i])
        cloth = _limb(hip, middle, 0.059 * width, 0.053 * width, outfit.bottom, THIGH[i])
        upper = [skin, cloth]
    else:
        upper = [thigh]
    if covered:
        upper[-1].pattern = outfit.bottom_pattern
    r0, r1 = (0.041, 0.033) if trousers else (0.036, 0.022)
    lower = [_limb(knee, ankle, r0 * width, r1 * width, outfit.bottom if trousers else bare, SHANK[i])]
    if trousers:
        lower[0].pattern = outfit.bottom_pattern
    foot = _limb(ankle + np.array([0, 0.012, 0]), toe, 0.026, 0.02, outfit.shoes, FOOT[i])
    # The trunk's clothes overlap the thighs of a standing figure.
    return [
        ((hip[2] + knee[2]) / 2 - 0.02, upper),
        ((knee[2] + ankle[2]) / 2 - 0.015, lower),
        ((ankle[2] + toe[2]) / 2 - 0.016, [foot]),
    ]


def _arm(
    joints: dict[str, np.ndarray], side: str, i: int, width: float, outfit: _Outfit
) -> list[tuple[float, list[Shape]]]:
    shoulder, elbow, wrist, hand = (joints[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "hand"))
    cloth = outfit.open_jacket or outfit.top
    girth = 0.8 + 0.2 * width
    sleeve = outfit.sleeves if outfit.open_jacket is None else "long"
    upper = [
        _limb(shoulder, elbow, 0.04 * girth, 0.031 * girth, cloth if sleeve == "long" else outfit.skin, UPPER_ARM[i])
    ]
    if sleeve == "short":
        upper.append(
            _limb(shoulder, shoulder + 0.55 * (elbow - shoulder), 0.043 * girth, 0.04 * girth, cloth, UPPER_ARM[i])
        )
    forearm = _limb(elbow, wrist, 0.031 * girth, 0.023 * girth, cloth if sleeve == "long" else outfit.skin, FOREARM[i])
    palm = Shape(ellipse(hand[0], hand[1], 0.026, count=14), outfit.skin, FOREARM[i], relief=0.5)
    if outfit.open_jacket is None and sleeve != "none":
        upper[-1].pattern = outfit.top_pattern
        if sleeve == "long":
            forearm.pattern = outfit.top_pattern
    return [
        ((shoulder[2] + elbow[2]) / 2 + 0.012, upper),
        ((elbow[2] + wrist[2]) / 2 + 0.014, [palm, forearm]),
    ]


def _trunk(skeleton: Skeleton, outfit: _Outfit) -> list[Shape]:
    joints, width = skeleton.joints, skeleton.build.width
    shoulders = [joints[f"{s}_shoulder"] for s in SIDES]
    hips = [joints[f"{s}_hip"] for s in SIDES]
    head = joints["head"]
    chest, seat = (shoulders[0] + shoulders[1]) / 2, (hips[0] + hips[1]) / 2
    belly = seat + 0.3 * (chest - seat)
    top_colour = outfit.open_jacket or outfit.top
    pelvis_colour = outfit.top if outfit.legwear == "dress" else outfit.bottom
    pelvis = hull([(h[0], h[1] - 0.005, 0.06 * width) for h in hips] + [(belly[0], belly[1], 0.07 * width)])
    shirt = hull(
        [(s[0], s[1] + 0.008, 0.042) for s in shoulders]
        + [(chest[0], chest[1] + 0.02, 0.065)]
        + [(belly[0] + dx, belly[1] + 0.015, 0.066 * width) for dx in (-0.012, 0.012)]
    )
    neck_root = chest + np.array([0, -0.02, 0])
    shapes = [
        Shape(pelvis, pelvis_colour, TRUNK, outfit.bottom_pattern, relief=0.5),
        _limb(neck_root, head + np.array([0, 0.05, 0]), 0.034, 0.031, scaled(outfit.skin, 0.9), TRUNK),
        Shape(shirt, top_colour, TRUNK, outfit.top_pattern if outfit.open_jacket is None else None, relief=0.6),
    ]
    if outfit.open_jacket is not None and skeleton.forward[2] > 0.35:  # the shirt under an open jacket, in front only
        x, y0, y1 = chest[0] + 0.02 * skeleton.forward[0], chest[1] - 0.03, belly[1] + 0.07
        front = polygon((x - 0.03, y0), (x + 0.03, y0), (belly[0] + 0.022, y1), (belly[0] - 0.022, y1))
        shapes.append(Shape(front, outfit.top, TRUNK, outfit.top_pattern, relief=0.2))
    return shapes


def _skirt(skeleton: Skeleton, outfit: _Outfit) -> Shape:
    joints, width = skeleton.joints, skeleton.build.width
    circles = []
    for side in SIDES:
        hip, knee = joints[f"{side}_hip"], joints[f"{side}_knee"]
        hem = hip + 0.72 * (knee - hip)
        circles += [(hip[0], hip[1] - 0.02, 0.055 * width), (hem[0], hem[1], 0.072 * width)]
    dress = outfit.legwear == "dress"
    pattern = outfit.top_pattern if dress else outfit.bottom_pattern
    return Shape(hull(circles), outfit.top if dress else outfit.bottom, TRUNK, pattern, relief=0.5)


def _head(skeleton: Skeleton, outfit: _Outfit) -> list[Shape]:
    size, tilt = skeleton.build.head, skeleton.tilt
    fx, fz = skeleton.forward[0], skeleton.forward[2]
    x, y = skeleton.joints["head"][:2]
    rx, ry = 0.074 * size, 0.094 * size
    style = outfit.hair_style
    hair = outfit.skin if style == "bald" else outfit.hair
    shapes: list[Shape] = []

    def add(outline: np.ndarray, colour: Colour, relief: float = 0.0) -> None:
        shapes.append(Shape(outline, colour, HEAD, relief=relief))

    if style == "long":
        add(ellipse(x - 0.25 * fx * rx, y + 0.32 * ry, 1.12 * rx, 1.2 * ry, tilt), scaled(hair, 0.85), 0.4)
    if style == "tail":
        add(
            ellipse(x - (1.15 * fx + 0.15) * rx, y + 0.35 * ry, 0.38 * rx, 0.95 * ry, tilt + 22 * fx),
            scaled(hair, 0.9),
            0.4,
        )
    if style == "bun":
        add(ellipse(x - 0.6 * fx * rx, y - 0.98 * ry, 0.48 * rx, turn=tilt), scaled(hair, 0.9), 0.5)
    add(ellipse(x, y, rx * (1 + 0.06 * abs(fx)), ry, tilt), hair, 0.6)
    if style == "short" and fz <= 0.1:  # the nape
        add(ellipse(x + 0.2 * fx * rx, y + 0.8 * ry, 0.6 * rx, 0.22 * ry, tilt), scaled(outfit.skin, 0.9))
    if fz > -0.25:
        centre = x + 0.38 * fx * rx, y + 0.12 * ry
        add(ellipse(*centre, rx * (0.9 - 0.24 * abs(fx)), 0.86 * ry, tilt), outfit.skin, 0.5)
    shapes += _face(skeleton, outfit)
    shapes += _hat(skeleton, outfit)
    return shapes


def _face(skeleton: Skeleton, outfit: _Outfit) -> list[Shape]:
    joints, size, tilt = skeleton.joints, skeleton.build.head, skeleton.tilt
    points = np.array([joints[name] for name in KEYPOINTS])
    seen = _facing(skeleton, points)
    shapes = []
    for i in (3, 4):
        if seen[i]:
            ear = ellipse(points[i, 0], points[i, 1], 0.017 * size, 0.024 * size, tilt, 14)
            shapes.append(Shape(ear, scaled(outfit.skin, 0.92), HEAD, relief=0.3))
    narrow = max(abs(skeleton.forward[2]), 0.35)
    for i in (1, 2):
        if seen[i]:
            x, y = points[i, :2]
            shapes.append(Shape(ellipse(x, y, 0.017 * size * narrow, 0.013 * size, tilt, 14), (245, 245, 242), HEAD))
            pupil = ellipse(x + 0.004 * skeleton.forward[0], y, 0.0095 * size * narrow, 0.011 * size, tilt, 10)
            shapes.append(Shape(pupil, (45, 30, 25), HEAD))
            brow = stroke([(x - 0.018 * size, y - 0.024 * size), (x + 0.018 * size, y - 0.024 * size)], 0.007 * size)
            shapes.append(Shape(brow, scaled(outfit.hair, 0.7), HEAD))
    if seen[0]:
        x, y = points[0, :2]
        shapes.append(
            Shape(ellipse(x, y, 0.013 * size, 0.016 * size, tilt, 12), scaled(outfit.skin, 0.8), HEAD, relief=0.3)
        )
    mouth = joints["head"] + size * 0.07 * skeleton.forward
    if skeleton.forward[2] > 0.1:
        lips = arc(mouth[0], mouth[1] + 0.036 * size, 0.026 * size * narrow, 0.014 * size, 0, 180, tilt, 10)
        shapes.append(Shape(lips, blend(scaled(outfit.skin, 0.6), (150, 40, 45), 0.4), HEAD))
    return shapes


def _hat(skeleton: Skeleton, outfit: _Outfit) -> list[Shape]:
    if outfit.hat == "none":
        return []
    size, tilt, fx, fz = skeleton.build.head, skeleton.tilt, skeleton.forward[0], skeleton.forward[2]
    x, y = skeleton.joints["head"][:2]
    rx, ry = 0.081 * size, 0.094 * size
    crown = arc(x, y - 0.3 * ry, rx, 0.78 * ry, 180, 360, tilt)
    shapes = [Shape(crown, outfit.hat_colour, HEAD, relief=0.5)]
    if outfit.hat == "cap" and fz > -0.3:
        peak = ellipse(x + 0.85 * fx * rx, y - 0.3 * ry, rx * (0.85 - 0.25 * abs(fx)), 0.2 * ry, tilt)
        shapes.append(Shape(peak, scaled(outfit.hat_colour, 0.75), HEAD))
    elif outfit.hat == "sunhat":
        shapes.append(
            Shape(
                ellipse(x, y - 0.32 * ry, 1.75 * rx, 0.26 * ry, tilt), scaled(outfit.hat_colour, 0.88), HEAD, relief=0.3
            )
        )
    elif outfit.hat == "beanie":
        band = smooth((x - rx, y - 0.42 * ry), (x + rx, y - 0.42 * ry), (x + rx, y - 0.2 * ry), (x - rx, y - 0.2 * ry))
        shapes.append(Shape(band, scaled(outfit.hat_colour, 0.8), HEAD))
        shapes.append(
            Shape(ellipse(x, y - 1.12 * ry, 0.26 * rx, count=12), scaled(outfit.hat_colour, 1.2), HEAD, relief=0.5)
        )
    return shapes

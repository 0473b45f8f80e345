"""One picture of the built-in set: its objects, their places, and which of them hide others."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from mvision.builtin.animals import dog, fish
from mvision.builtin.annotate import encode_crowd, encode_keypoints, encode_mask
from mvision.builtin.backdrop import PLACES, Backdrop, make_backdrop
from mvision.builtin.camera import expose
from mvision.builtin.canvas import Shape, Sprite, overlap, paste, render
from mvision.builtin.clutter import sample_clutter
from mvision.builtin.person import Person, person
from mvision.builtin.things import ball, car, kite, mug, umbrella

# Category ids have gaps on purpose, as COCO's have: code that takes them for class indices fails here already.
CATEGORY_IDS = {"person": 1, "dog": 3, "car": 4, "ball": 7, "kite": 8, "umbrella": 12, "mug": 17, "fish": 21}
_MAKERS: dict[str, Callable[[np.random.Generator], list[Shape]]] = {
    "dog": dog, "car": car, "ball": ball, "kite": kite, "umbrella": umbrella, "mug": mug, "fish": fish,
}  # fmt: skip
_THINGS = tuple(_MAKERS)
# How much likelier a class is in its usual place; every class occurs everywhere, so that the place does not reveal it.
_HABITAT = {
    "park": {"dog": 3, "ball": 2, "kite": 3},
    "street": {"car": 5, "dog": 2, "umbrella": 2},
    "beach": {"umbrella": 4, "ball": 3, "kite": 3},
    "room": {"mug": 3, "dog": 2, "ball": 2},
    "table": {"mug": 4, "car": 2, "fish": 1},
    "sea": {"fish": 7, "ball": 1},
}
# Height of a class beside a person's, for its place on the ground: loosely, toys and giants are welcome.
_STATURE = {"person": 1.0, "dog": 0.75, "car": 1.1, "ball": 0.5, "kite": 0.8, "umbrella": 0.9, "mug": 0.5, "fish": 0.6}
_FRAMES = ((240, 320), (240, 320), (320, 240), (256, 288), (272, 272), (208, 320))  # height, width
MIN_VISIBLE_FRACTION, MIN_VISIBLE_AREA = 0.3, 60


@dataclass
class _Item:
    """Something in the scene. category: None for clutter. depth: larger is nearer to the viewer."""

    sprite: Sprite
    depth: float
    category: str | None = None
    figure: Person | None = None
    crowd: bool = False
    floating: bool = False


@dataclass
class _Stage:
    rng: np.random.Generator
    backdrop: Backdrop
    light: tuple[float, float]
    items: list[_Item] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def height(self) -> int:
        return int(self.backdrop.image.shape[0])

    @property
    def width(self) -> int:
        return int(self.backdrop.image.shape[1])

    @property
    def side(self) -> int:
        return min(self.height, self.width)


def generate_image(seed: int, index: int, split: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one picture; it depends on the three arguments alone.

    Returns:
        image: (H, W, 3) uint8, RGB.
        annotations: COCO annotations without `id` and `image_id`, nearest object last. Every object that was drawn is
            labelled; an object that would show less than 30 % of itself, or fewer than 60 pixels, is not drawn.
            Coordinates are continuous: the image spans 0..W and 0..H.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    height, width = _FRAMES[rng.integers(len(_FRAMES))]
    place = str(rng.choice(list(PLACES), p=list(PLACES.values())))
    slant = rng.uniform(-0.8, 0.8)
    stage = _Stage(rng, make_backdrop(rng, height, width, place), (slant, -float(np.sqrt(1 - slant**2))))
    _populate(stage)
    shown = _resolve_occlusion(stage)
    image = stage.backdrop.image
    for item, _ in shown:
        if not item.floating:
            _cast_shadow(stage, image, item.sprite)
        paste(image, item.sprite)
    annotations = [_annotation(item, mask) for item, mask in shown if item.category is not None]
    return expose(rng, image), annotations


def _populate(stage: _Stage) -> None:
    rng = stage.rng
    for _ in range(int(rng.integers(0, 4))):
        _add_clutter(stage, behind=True)
    kind = str(rng.choice(["empty", "people", "flock", "mixed"], p=[0.03, 0.13, 0.03, 0.81]))
    if kind == "people":
        size = _person_size(stage)
        for _ in range(int(rng.integers(4, 9))):
            _add_object(stage, "person", size * rng.uniform(0.7, 1.35), crowding=0.8)
        _add_things(stage, int(rng.integers(0, 4)))
    elif kind in ("mixed", "flock"):
        if kind == "flock":
            _add_flock(stage, "fish" if stage.backdrop.place == "sea" or rng.random() < 0.3 else "person")
        people = int(rng.choice([0, 1, 2, 3], p=[0.25, 0.43, 0.21, 0.11]))
        for _ in range(people):
            _add_object(stage, "person", _person_size(stage))
        things = min(int(rng.poisson(5.0)), 10)
        _add_things(stage, max(things, 1 - people))
    if rng.random() < 0.25:
        _add_clutter(stage, behind=False)


def _add_things(stage: _Stage, count: int) -> None:
    habitat = _HABITAT[stage.backdrop.place]
    weights = np.array([1.0 + habitat.get(name, 0) for name in _THINGS])
    for name in stage.rng.choice(_THINGS, count, p=weights / weights.sum()):
        # 16 pixels to 75 % of the shorter side, most of them about two fifths.
        size = float(np.exp(stage.rng.triangular(np.log(16), np.log(0.42 * stage.side), np.log(0.75 * stage.side))))
        _add_object(stage, str(name), size)


def _person_size(stage: _Stage) -> float:
    if stage.rng.random() < 0.06:  # a close-up, cut off by the frame
        return stage.rng.uniform(0.9, 1.5) * stage.side
    return float(np.exp(stage.rng.triangular(np.log(28), np.log(0.55 * stage.side), np.log(0.9 * stage.side))))


def _add_object(stage: _Stage, category: str, size: float, crowding: float | None = None) -> None:
    rng = stage.rng
    figure = person(rng) if category == "person" else None
    shapes = figure.shapes if figure else _MAKERS[category](rng)
    angle = _angle(stage, category)
    flip = figure is None and bool(rng.random() < 0.5)
    floating = category == "kite" or (stage.backdrop.place == "sea" and category != "mug")
    centre, depth = _place(stage, category, shapes, size, angle, floating, crowding)
    sprite = render(shapes, size, centre, stage.light, angle, flip)
    stage.items.append(_Item(sprite, depth, category, figure, floating=floating))


def _angle(stage: _Stage, category: str) -> float:
    rng = stage.rng
    if category == "ball":
        return rng.uniform(0, 360)
    upright = stage.backdrop.horizon is not None
    if category == "person":
        if rng.random() < (0.04 if upright else 0.15):
            return float(rng.choice([-90, 90]) + rng.normal(0, 15))  # lying
        return rng.normal(0, 3 if upright else 14)
    if category == "kite":
        return rng.normal(0, 30)
    if category == "umbrella":
        return rng.normal(0, 12 if upright else 35)
    return rng.normal(0, 4 if upright else 28)


def _extent(shapes: list[Shape], size: float, angle: float) -> tuple[float, float]:
    """Width and height in pixels of what `render` will draw."""
    points = np.concatenate([s.points for s in shapes])
    points = points * (size / max((points.max(axis=0) - points.min(axis=0)).max(), 1e-6))
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    points = points @ np.array([[cos, sin], [-sin, cos]])
    w, h = points.max(axis=0) - points.min(axis=0)
    return float(w), float(h)


def _place(
    stage: _Stage,
    category: str | None,
    shapes: list[Shape],
    size: float,
    angle: float,
    floating: bool,
    crowding: float | None,
) -> tuple[tuple[float, float], float]:
    """Centre and depth: on the ground where its size puts it, and the least hidden of a few tries."""
    rng, horizon = stage.rng, stage.backdrop.horizon
    w, h = _extent(shapes, size, angle)
    limit = crowding if crowding is not None else float(rng.choice([0.1, 0.35, 0.7], p=[0.55, 0.25, 0.2]))
    best, least = None, np.inf
    for _ in range(8):
        x = rng.uniform(-0.1 * w, stage.width + 0.1 * w)
        if horizon is None:
            y = rng.uniform(0.0, stage.height)
            depth = rng.uniform(0, stage.height)
        elif floating:
            y = rng.uniform(0.02, 0.75) * stage.height
            depth = rng.uniform(0, stage.height)
        else:
            near = size / (0.8 * stage.side * _STATURE.get(category or "", 0.8)) * np.exp(rng.normal(0, 0.2))
            base = horizon + (1.06 * stage.height - horizon) * float(np.clip(near, 0.04, 1.05))
            y, depth = base - h / 2, base
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        cover = max((_coverage(box, other) for other in stage.boxes), default=0.0)
        if cover < least:
            best, least = (x, y, depth, box), cover
        if cover <= limit:
            break
    assert best is not None
    if category is not None:
        stage.boxes.append(best[3])
    return (best[0], best[1]), best[2]


def _coverage(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over the smaller box."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _add_clutter(stage: _Stage, behind: bool) -> None:
    rng = stage.rng
    shapes, largest = sample_clutter(rng, stage.backdrop.place)
    size = float(np.exp(rng.uniform(np.log(14), np.log(largest * stage.side))))
    angle = rng.normal(0, 4 if stage.backdrop.horizon is not None else 40)
    centre, depth = _place(stage, None, shapes, size, angle, False, 1.0)
    sprite = render(shapes, size, centre, stage.light, angle, bool(rng.random() < 0.5))
    stage.items.append(_Item(sprite, depth if behind else np.inf))


def _add_flock(stage: _Stage, category: str) -> None:
    """A dozen tiny figures, labelled as one crowd region."""
    rng = stage.rng
    canvas = np.zeros((stage.height, stage.width, 4), np.uint8)
    middle = stage.backdrop.horizon
    cx = rng.uniform(0.25, 0.75) * stage.width
    cy = rng.uniform(0.3, 0.7) * stage.height if middle is None else middle + 0.08 * stage.height
    heading = bool(rng.random() < 0.5)
    spots = rng.normal(0, 1, (int(rng.integers(12, 22)), 2)) * (0.11 * stage.width, 0.03 * stage.height) + (cx, cy)
    for x, y in spots[np.argsort(spots[:, 1])]:
        shapes = person(rng).shapes if category == "person" else _MAKERS[category](rng)
        flip = heading and category != "person"
        paste(canvas, render(shapes, rng.uniform(13, 19), (x, y), stage.light, rng.normal(0, 4), flip))
    sprite = Sprite(canvas, (canvas[..., 3] >= 128).astype(np.uint8), 0, 0, np.eye(2, 3))
    stage.items.append(_Item(sprite, 0.0, category, crowd=True, floating=True))
    xs, ys = np.flatnonzero(sprite.mask.any(axis=0)), np.flatnonzero(sprite.mask.any(axis=1))
    stage.boxes.append((float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)))


def _resolve_occlusion(stage: _Stage) -> list[tuple[_Item, np.ndarray]]:
    """Items that are drawn, farthest first, with their visible pixels (H, W) bool.

    From front to back, so that leaving out an object that is nearly hidden changes nothing that was settled before.
    """
    frame = stage.height, stage.width
    taken = np.zeros(frame, bool)
    shown = []
    for item in sorted(stage.items, key=lambda item: item.depth, reverse=True):
        window, part = overlap(frame, item.sprite)
        if part is None:
            continue
        mask = item.sprite.mask
        visible = np.zeros(frame, bool)
        visible[window] = mask[part] & ~taken[window]
        area, full = int(visible.sum()), int(mask.sum())
        if item.category is not None and (area < MIN_VISIBLE_AREA or area < MIN_VISIBLE_FRACTION * full):
            continue
        taken[window] |= mask[part]
        shown.append((item, visible))
    return shown[::-1]


def _cast_shadow(stage: _Stage, image: np.ndarray, sprite: Sprite) -> None:
    """On the ground the silhouette laid flat behind the feet; on a table the silhouette moved away from the light."""
    alpha = sprite.rgba[..., 3]
    height, width = alpha.shape
    if stage.backdrop.horizon is None:
        shift = max(1, round(0.03 * max(height, width)))
        top, left, pad = sprite.top + shift, sprite.left - round(shift * 1.5 * stage.light[0]), 0
    else:
        alpha = cv2.resize(alpha, (width, max(3, round(0.14 * height))), interpolation=cv2.INTER_AREA)
        left, pad = sprite.left, 3
        top = sprite.top + height - 2 - round(alpha.shape[0] * 0.75)
    alpha = cv2.copyMakeBorder(alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
    alpha = cv2.GaussianBlur(alpha, (0, 0), max(0.8, 0.012 * max(height, width)))
    rgba = np.zeros((*alpha.shape, 4), np.uint8)
    rgba[..., 3] = cv2.convertScaleAbs(alpha, alpha=0.45)
    paste(image, Sprite(rgba, rgba[..., 3], left - pad, top - pad, sprite.matrix))


def _annotation(item: _Item, visible: np.ndarray) -> dict[str, Any]:
    assert item.category is not None
    segmentation, bbox, area = (encode_crowd if item.crowd else encode_mask)(visible)
    annotation: dict[str, Any] = {
        "category_id": CATEGORY_IDS[item.category],
        "bbox": bbox,
        "area": area,
        "iscrowd": int(item.crowd),
        "segmentation": segmentation,
    }
    if item.category == "person":
        keypoints: list[float] = [0] * 51
        count = 0
        if item.figure is not None:
            points = item.sprite.to_image(item.figure.keypoints)
            keypoints, count = encode_keypoints(points, item.figure.visible(item.sprite), visible)
        annotation |= {"keypoints": keypoints, "num_keypoints": count}
    return annotation

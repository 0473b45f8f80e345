"""Backgrounds: places with a horizon, and surfaces seen from above. Nothing drawn here is labelled."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from mvision.builtin.patterns import Colour, blend, hsv, noise, random_colour, scaled

_SIDE = 256  # of the square textures that are laid on grounds and tables
PLACES = {"park": 0.22, "street": 0.2, "beach": 0.14, "room": 0.18, "table": 0.14, "sea": 0.12}


@dataclass
class Backdrop:
    """image: (H, W, 3) uint8. horizon: row where the ground ends, or None when things may lie anywhere at any size."""

    image: np.ndarray
    place: str
    horizon: float | None


def make_backdrop(rng: np.random.Generator, height: int, width: int, place: str) -> Backdrop:
    if place in ("table", "sea"):
        image = _sea(rng, height, width) if place == "sea" else _table(rng, height, width)
        return Backdrop(image, place, None)
    horizon = height * rng.uniform(0.28, 0.55)
    row = round(horizon)
    image = np.empty((height, width, 3), np.uint8)
    image[row:] = _perspective(rng, _GROUNDS[place](rng), height - row, width)
    if place == "room":
        image[:row] = _wall(rng, row, width)
        cv2.rectangle(
            image, (0, row - max(2, height // 60)), (width, row), random_colour(rng, (0, 0.3), (0.3, 0.95)), -1
        )
        _furnish(rng, image, row)
    else:
        image[:row] = _sky(rng, row, width)
        (_skyline if place == "street" else _hills)(rng, image, row)
        if place == "beach":
            band = slice(round(row * 0.86), row)
            image[band] = _speckled(
                rng,
                hsv(rng.uniform(0.5, 0.62), 0.5, rng.uniform(0.5, 0.8)),
                16,
                stretch=8.0,
                shape=image[band].shape[:2],
            )
    return Backdrop(image, place, horizon)


def _speckled(
    rng: np.random.Generator,
    colour: Colour,
    cell: float,
    depth: float = 22,
    stretch: float = 1.0,
    shape: tuple[int, int] = (_SIDE, _SIDE),
) -> np.ndarray:
    """A noisy surface of one colour; its hue drifts a little with a second, coarser noise."""
    fine = noise(rng, *shape, cell, 3, stretch) * np.float32(depth)
    coarse = noise(rng, shape[0] // 4 + 1, shape[1] // 4 + 1, cell, 1, stretch)[..., None]
    field = np.array(colour, np.float32) + coarse * rng.uniform(-14, 14, 3).astype(np.float32)
    field = cv2.resize(field, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.add(field, cv2.merge([fine, fine, fine]), dtype=cv2.CV_8U))  # saturates


def _grass(rng: np.random.Generator) -> np.ndarray:
    plane = _speckled(rng, hsv(rng.uniform(0.18, 0.36), rng.uniform(0.3, 0.65), rng.uniform(0.35, 0.75)), 7, 34)
    if rng.random() < 0.4:  # mown in stripes
        _stripe(plane, int(rng.integers(24, 64)), rng.uniform(0.85, 0.95))
    if rng.random() < 0.35:  # a path
        x = int(rng.integers(30, 190))
        plane[:, x : x + 44] = _speckled(rng, hsv(0.1, 0.2, rng.uniform(0.5, 0.8)), 5)[:, x : x + 44]
    if rng.random() < 0.5:  # flowers
        for x, y in rng.integers(0, _SIDE, (int(rng.integers(20, 70)), 2)):
            cv2.circle(plane, (int(x), int(y)), 1, random_colour(rng, (0.1, 0.9), (0.7, 1.0)), -1, cv2.LINE_AA)
    return plane


def _pavement(rng: np.random.Generator) -> np.ndarray:
    plane = _speckled(rng, hsv(rng.random(), rng.uniform(0, 0.12), rng.uniform(0.35, 0.75)), 4, 13)
    kind = rng.random()
    if kind < 0.45:  # lane marks
        for x in range(int(rng.integers(16, 80)), _SIDE, int(rng.integers(72, 130))):
            for y in range(0, _SIDE, 51):
                cv2.rectangle(plane, (x, y), (x + 4, y + 28), (225, 222, 205), -1)
    elif kind < 0.6:  # a zebra crossing
        y = int(rng.integers(40, 180))
        for x in range(0, _SIDE, 22):
            cv2.rectangle(plane, (x, y), (x + 11, y + 50), (226, 226, 222), -1)
    else:
        _tiles(rng, plane, int(rng.integers(22, 54)))
    return plane


def _sand(rng: np.random.Generator) -> np.ndarray:
    return _speckled(rng, hsv(rng.uniform(0.08, 0.14), rng.uniform(0.2, 0.45), rng.uniform(0.7, 0.95)), 9, 20, 2.0)


def _floor(rng: np.random.Generator) -> np.ndarray:
    kind = rng.random()
    if kind < 0.4:
        return _planks(rng)
    plane = _speckled(rng, random_colour(rng, (0.0, 0.5), (0.4, 0.95)), 9, 6)
    if kind < 0.7:
        y, x = np.indices((_SIDE, _SIDE)) // int(rng.choice([24, 32, 48]))
        odd = (x + y) % 2 == 0
        plane[odd] = _speckled(rng, random_colour(rng, (0.0, 0.5), (0.2, 0.9)), 9, 6)[odd]
    elif kind < 0.85:
        _tiles(rng, plane, int(rng.integers(28, 64)))
    return plane


def _planks(rng: np.random.Generator) -> np.ndarray:
    base, wide = hsv(rng.uniform(0.05, 0.11), rng.uniform(0.3, 0.65), rng.uniform(0.3, 0.8)), int(rng.integers(20, 44))
    plane = np.ascontiguousarray(_speckled(rng, base, 6, 24, 9.0).transpose(1, 0, 2))
    for x in range(0, _SIDE, wide):
        strip = plane[:, x : x + wide]
        strip[:] = np.clip(strip * np.float32(rng.uniform(0.85, 1.12)), 0, 255)
        cv2.line(plane, (x, 0), (x, _SIDE), scaled(base, 0.5), 1)
    return plane


def _tiles(rng: np.random.Generator, plane: np.ndarray, size: int) -> None:
    r, g, b = (int(c) for c in plane[0, 0])
    joint = scaled((r, g, b), rng.choice([0.6, 1.35]))
    offset = int(rng.integers(0, 2)) * size // 2
    for k, y in enumerate(range(0, _SIDE, size)):
        cv2.line(plane, (0, y), (_SIDE, y), joint, 1, cv2.LINE_AA)
        for x in range((k % 2) * offset, _SIDE, size):
            cv2.line(plane, (x, y), (x, y + size), joint, 1, cv2.LINE_AA)


def _stripe(plane: np.ndarray, period: int, factor: float) -> None:
    """Darken every second band of columns."""
    columns = (np.arange(plane.shape[1]) // period) % 2 == 0
    plane[:, columns] = plane[:, columns] * np.float32(factor)


_GROUNDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "park": _grass,
    "street": _pavement,
    "beach": _sand,
    "room": _floor,
}


def _perspective(rng: np.random.Generator, plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lay a square texture on the ground: it converges towards the horizon."""
    side = plane.shape[0]
    squeeze, skew = rng.uniform(0.15, 0.4), rng.uniform(-0.25, 0.25) * side
    plane = cv2.copyMakeBorder(plane, 0, 0, side, side, cv2.BORDER_REFLECT)
    middle, reach = 1.5 * side, 0.5 * side
    source = np.array(
        [[middle - reach / squeeze, 0], [middle + reach / squeeze, 0], [middle + reach, side], [middle - reach, side]]
    )
    source[:2, 0] += skew
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    matrix = cv2.getPerspectiveTransform(source.astype(np.float32), target.astype(np.float32))
    return cv2.warpPerspective(plane, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _sky(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    hue = rng.choice([rng.uniform(0.52, 0.64), rng.uniform(0.0, 0.12), rng.uniform(0.6, 0.8)], p=[0.7, 0.2, 0.1])
    top = np.array(hsv(hue, rng.uniform(0.05, 0.6), rng.uniform(0.55, 0.95)), np.float32)
    low = np.array(hsv(hue + 0.03, rng.uniform(0.0, 0.25), rng.uniform(0.8, 1.0)), np.float32)
    rows, columns = height // 2 + 1, width // 2 + 1  # clouds are soft: half the resolution will do
    ramp = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    clouds = noise(rng, rows, columns, rng.uniform(15, 35), 3, 2.0)[..., None]
    clouds = np.clip(clouds * np.float32(1.1) + np.float32(rng.uniform(-0.7, 0.1)), 0, 1)
    base = top + ramp * (low - top)
    sky = (base + clouds * (np.float32(250) - base) * np.float32(0.85)).astype(np.uint8)
    return np.asarray(cv2.resize(sky, (width, height), interpolation=cv2.INTER_LINEAR))


def _hills(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """One to three ridges, with trees along some of them."""
    width, x = image.shape[1], np.linspace(0, 1, 40)
    for k in range(int(rng.integers(1, 4))):
        colour = blend(hsv(rng.uniform(0.2, 0.42), 0.4, rng.uniform(0.3, 0.55)), (170, 190, 205), 0.55 - 0.2 * k)
        high = row * rng.uniform(0.08, 0.35) * (1 - 0.25 * k)
        ridge = row - high * (
            0.6 + 0.25 * np.sin(rng.uniform(3, 9) * x + rng.uniform(0, 6)) + 0.15 * np.sin(19 * x + rng.uniform(0, 6))
        )
        outline = np.concatenate([np.column_stack([x * width, ridge]), [(width, row), (0, row)]])
        cv2.fillPoly(image, [outline.astype(np.int32)], colour, cv2.LINE_AA)
        if rng.random() < 0.6:
            for t in rng.integers(0, 40, int(rng.integers(3, 12))):
                r = row * rng.uniform(0.03, 0.09)
                tint = scaled(colour, rng.uniform(0.7, 0.95))
                cv2.ellipse(
                    image,
                    (int(x[t] * width), int(ridge[t] - r)),
                    (int(r), int(r * 1.4)),
                    0,
                    0,
                    360,
                    tint,
                    -1,
                    cv2.LINE_AA,
                )


def _skyline(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """A row of houses with windows and some roofs."""
    x, width = -int(rng.integers(0, 30)), image.shape[1]
    while x < width:
        w, h = int(rng.uniform(0.1, 0.26) * width), int(rng.uniform(0.35, 0.95) * row)
        wall = blend(random_colour(rng, (0.05, 0.45), (0.4, 0.9)), (175, 185, 195), 0.35)
        cv2.rectangle(image, (x, row - h), (x + w, row), wall, -1)
        cv2.rectangle(image, (x, row - h), (x + w, row), scaled(wall, 0.8), 1)
        if rng.random() < 0.35:
            peak = np.array([(x - 3, row - h), (x + w // 2, row - h - w // 3), (x + w + 3, row - h)], np.int32)
            cv2.fillPoly(image, [peak], scaled(wall, 0.6), cv2.LINE_AA)
        step, glass = int(rng.integers(9, 16)), scaled(wall, rng.choice([0.55, 1.3]))
        for wy in range(row - h + 5, row - step // 2, step):
            for wx in range(x + 4, x + w - step // 2, step):
                cv2.rectangle(image, (wx, wy), (wx + step // 2, wy + step // 2), glass, -1)
        x += w + int(rng.integers(0, 8)) * int(rng.random() < 0.5)


def _wall(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    colour = random_colour(rng, (0.0, 0.45), (0.45, 0.97))
    wall = _speckled(rng, colour, 40, 6, shape=(height, width))
    kind = rng.random()
    if kind < 0.25:
        _stripe(wall, int(rng.integers(6, 24)), rng.uniform(0.8, 0.95))
    elif kind < 0.4:
        joint, size = scaled(colour, 0.8), int(rng.integers(8, 16))
        for k, y in enumerate(range(0, height, size)):
            cv2.line(wall, (0, y), (width, y), joint, 1)
            for x in range(k % 2 * size, width, 2 * size):
                cv2.line(wall, (x, y), (x, y + size), joint, 1)
    elif kind < 0.55:
        dot, size = random_colour(rng, (0.0, 0.5), (0.4, 0.95)), int(rng.integers(14, 28))
        for k, y in enumerate(range(0, height, size)):
            for x in range(k % 2 * size // 2, width, size):
                cv2.circle(wall, (x, y), size // 6, dot, -1, cv2.LINE_AA)
    return wall


def _furnish(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Picture frames, a window, a cupboard: rectangles that mean nothing."""
    width = image.shape[1]
    for _ in range(int(rng.integers(0, 4))):
        w, h = int(rng.uniform(0.1, 0.3) * width), int(rng.uniform(0.25, 0.7) * row)
        x, y = int(rng.integers(0, max(1, width - w))), int(rng.uniform(0.05, 0.25) * row)
        frame = random_colour(rng, (0.0, 0.6), (0.2, 0.95))
        h = min(h, row - y - 1)
        if h < 8:
            continue
        cv2.rectangle(image, (x, y), (x + w, y + h), frame, -1)
        inner = image[y + 3 : y + h - 2, x + 3 : x + w - 2]
        if inner.size:
            inner[:] = (
                _sky(rng, *inner.shape[:2])
                if rng.random() < 0.5
                else _speckled(rng, random_colour(rng), 9, 40, shape=inner.shape[:2])
            )
    if rng.random() < 0.5:
        w, h = int(rng.uniform(0.15, 0.35) * width), int(rng.uniform(0.3, 0.6) * row)
        x, colour = int(rng.integers(0, width - w)), random_colour(rng, (0.1, 0.6), (0.25, 0.85))
        cv2.rectangle(image, (x, row - h), (x + w, row + 4), colour, -1)
        for k in range(1, 3):
            cv2.line(image, (x + 2, row - h + k * h // 3), (x + w - 2, row - h + k * h // 3), scaled(colour, 0.65), 1)


def _table(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Wood, cloth, tiles or leaves from above."""
    kind = rng.random()
    if kind < 0.35:
        plane = _planks(rng)
    elif kind < 0.6:
        plane = _floor(rng)
    elif kind < 0.8:
        return _leaves(rng, height, width)
    else:
        plane = _speckled(rng, random_colour(rng, (0.05, 0.7), (0.3, 0.95)), 4, 12)
        _stripe(plane, int(rng.integers(8, 40)), rng.uniform(0.7, 0.92))
    scale, turn = max(height, width) / _SIDE * rng.uniform(1.0, 1.6), rng.uniform(0, 180)
    matrix = cv2.getRotationMatrix2D((_SIDE / 2, _SIDE / 2), turn, scale)
    matrix[:, 2] = matrix[:, 2] + ((width - _SIDE) / 2, (height - _SIDE) / 2)
    return cv2.warpAffine(plane, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _leaves(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    hue = rng.uniform(0.05, 0.4)
    image = _speckled(rng, hsv(hue, 0.5, 0.28), 14, shape=(height, width))
    for _ in range(int(rng.integers(60, 120))):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.uniform(5, 15)
        colour = hsv(hue + rng.normal(0, 0.03), rng.uniform(0.35, 0.7), rng.uniform(0.25, 0.7))
        turn = rng.uniform(0, 180)
        cv2.ellipse(
            image, (int(x), int(y)), (int(r), int(r * rng.uniform(0.3, 0.6))), turn, 0, 360, colour, -1, cv2.LINE_AA
        )
        dx, dy = r * np.cos(np.radians(turn)), r * np.sin(np.radians(turn))
        cv2.line(image, (int(x - dx), int(y - dy)), (int(x + dx), int(y + dy)), scaled(colour, 0.75), 1, cv2.LINE_AA)
    return image


def _sea(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Under water: darker with depth, rays of light, weed and sand."""
    hue = rng.uniform(0.45, 0.62)
    top, low = (
        np.array(hsv(hue, rng.uniform(0.3, 0.7), v), np.float32)
        for v in (rng.uniform(0.65, 0.95), rng.uniform(0.2, 0.5))
    )
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    light = noise(rng, height, width, rng.uniform(16, 40), 3, 1.6)[..., None] * np.float32(16)
    image = np.clip(top + ramp * (low - top) + light, 0, 255).astype(np.uint8)
    bed = round(height * rng.uniform(0.75, 1.0))
    if bed < height - 4:
        image[bed:] = image[bed:] // 2 + _speckled(rng, (200, 190, 150), 8, shape=(height - bed, width)) // 2
    for _ in range(int(rng.integers(3, 12))):
        x, high = rng.uniform(0, width), rng.uniform(0.1, 0.45) * height
        t = np.linspace(0, 1, 10)
        line = np.column_stack([x + 6 * np.sin(5 * t + rng.uniform(0, 6)), height - high * t])
        weed = hsv(rng.uniform(0.2, 0.45), rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.55))
        cv2.polylines(image, [line.astype(np.int32)], False, weed, int(rng.integers(2, 6)), cv2.LINE_AA)
    for x, y in rng.integers(0, (width, height), (int(rng.integers(3, 20)), 2)):
        cv2.circle(image, (int(x), int(y)), int(rng.integers(1, 5)), (225, 240, 245), 1, cv2.LINE_AA)
    return image

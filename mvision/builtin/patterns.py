"""Colours, printed patterns and noise."""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

Colour = tuple[int, int, int]
KINDS = ("stripes", "checks", "dots", "chevrons", "bands", "patches")


def random_colour(
    rng: np.random.Generator, saturation: tuple[float, float] = (0.15, 0.9), value: tuple[float, float] = (0.25, 0.97)
) -> Colour:
    """Any hue: colour never tells the class."""
    return hsv(rng.random(), rng.uniform(*saturation), rng.uniform(*value))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue, saturation and value in 0..1 (the hue wraps around) to RGB in 0..255."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * r), round(255 * g), round(255 * b)


def scaled(colour: Colour, factor: float) -> Colour:
    """Darker (< 1) or brighter (> 1)."""
    r, g, b = (min(255, max(0, round(c * factor))) for c in colour)
    return r, g, b


def blend(first: Colour, second: Colour, weight: float) -> Colour:
    """`first` at weight 0, `second` at weight 1."""
    r, g, b = (round(a + weight * (c - a)) for a, c in zip(first, second))
    return r, g, b


@dataclass
class Pattern:
    """A second colour laid over a shape. period: in object units; angle: degrees; phase: object units."""

    kind: str
    colour: Colour
    period: float
    angle: float = 0.0
    phase: float = 0.0
    strength: float = 1.0

    def mix(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Weight of the second colour, float32 in 0..1, at object coordinates (u, v)."""
        cos, sin = np.float32(np.cos(np.radians(self.angle))), np.float32(np.sin(np.radians(self.angle)))
        scale = np.float32(2 * np.pi / self.period)
        a = (cos * u + sin * v + np.float32(self.phase)) * scale
        b = (cos * v - sin * u) * scale
        if self.kind == "stripes":
            wave = np.sin(a)
        elif self.kind == "bands":
            wave = np.sin(a) + 0.6 * np.sin(2.7 * a + 1)
        elif self.kind == "checks":
            wave = np.sin(a) * np.sin(b)
        elif self.kind == "dots":
            wave = np.sin(a) * np.sin(b) - 0.35
        elif self.kind == "chevrons":
            wave = np.sin(a + 2.2 * np.abs(np.sin(b / 2)))
        else:  # patches: a few incommensurate waves
            wave = np.sin(a + 1.3 * np.sin(0.7 * b)) + np.sin(1.31 * b + 1.7 * np.sin(0.53 * a)) - 0.3
        return np.clip(wave * np.float32(4) + np.float32(0.5), 0, 1) * np.float32(self.strength)


def random_pattern(rng: np.random.Generator, period: tuple[float, float], kinds: tuple[str, ...] = KINDS) -> Pattern:
    return Pattern(
        kind=str(rng.choice(kinds)),
        colour=random_colour(rng),
        period=rng.uniform(*period),
        angle=float(rng.choice([0, 90, 0, 90, rng.uniform(0, 180)])),
        phase=rng.uniform(0, period[1]),
        strength=rng.uniform(0.6, 1.0),
    )


def noise(
    rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 3, stretch: float = 1.0
) -> np.ndarray:
    """(height, width) float32 of multi-octave value noise, zero mean, about -1..1.

    cell: size of the coarsest cells in pixels; stretch: how much wider than high they are.
    """
    total = np.zeros((height, width), np.float32)
    weight = 1.0
    for _ in range(octaves):
        shape = max(2, round(height / cell)) + 1, max(2, round(width / (cell * stretch))) + 1
        grid = rng.random(shape, dtype=np.float32) * 2 - 1
        total += np.float32(weight) * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weight, cell = weight * 0.55, cell / 2.3
        if cell < 1.5:
            break
    return total

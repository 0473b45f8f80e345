"""Display lists and their rasteriser: an object is a list of `Shape`s, drawn anti-aliased by `render`.

Coordinates: x to the right, y downwards. An object is described in units of its own; `render` scales it to pixels.
Image coordinates are continuous: pixel (i, j) covers [i, i + 1) x [j, j + 1), as in COCO's boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mvision.builtin.patterns import Colour, Pattern

Points = np.ndarray
_SHIFT = 4  # fractional bits of cv2's drawing functions
_MARGIN = 2  # pixels around a sprite, so that anti-aliased edges are never cut


@dataclass
class Shape:
    """One filled polygon of a display list.

    points: (N, 2) float, in object units. colour: RGB in 0..255, or None to change the shading of what lies below only.
    part: written into the sprite's part map, so that a point can be asked which part is visible there.
    relief: 0 is flat, 1 is as round as a ball; lights the side towards the light and darkens the rim.
    tone: brightness factor of a shape without colour.
    """

    points: Points
    colour: Colour | None
    part: int = 1
    pattern: Pattern | None = None
    relief: float = 0.0
    tone: float = 1.0


@dataclass
class Sprite:
    """A rendered object: colours with premultiplied alpha, at (left, top) of the image.

    rgba: (h, w, 4) uint8; parts: (h, w) uint8, 0 outside of the object; matrix: (2, 3), object units to image pixels.
    """

    rgba: np.ndarray
    parts: np.ndarray
    left: int
    top: int
    matrix: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool: pixels at least half covered."""
        return self.rgba[..., 3] >= 128

    def to_image(self, points: Points) -> Points:
        """(N, 2) object units -> (N, 2) image pixels."""
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]


def render(
    shapes: Sequence[Shape],
    size: float,
    centre: tuple[float, float],
    light: tuple[float, float],
    angle: float = 0.0,
    flip: bool = False,
) -> Sprite:
    """Draw a display list.

    Args:
        shapes: painted in this order.
        size: longer side, in pixels, of the upright object's bounding box.
        centre: image position of the bounding box's centre after rotation.
        light: unit vector in the image that points towards the light.
        angle: clockwise rotation in degrees.
        flip: mirror the object left to right (before the rotation).
    """
    points = np.concatenate([s.points for s in shapes])
    scale = size / max(float((points.max(axis=0) - points.min(axis=0)).max()), 1e-6)
    cos, sin = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    linear = np.array([[cos, -sin], [sin, cos]])
    if flip:
        linear = linear * np.array([-1.0, 1.0])
    points = points @ linear.T
    low, high = points.min(axis=0), points.max(axis=0)
    offset = np.asarray(centre) - (low + high) / 2
    left, top = np.floor(low + offset).astype(int) - _MARGIN
    width, height = (np.ceil(high + offset).astype(int) + _MARGIN) - (left, top)
    points = points + (offset - (left, top))

    # Small objects need more samples a pixel: their limbs are thinner than one.
    factor = 2 if size >= 64 else 4
    rgba = _paint(shapes, points, (height, width), factor, linear, offset - (left, top))
    shade, parts = _shade_and_parts(shapes, points, (height, width), light)
    parts = (rgba[..., 3] >= 128).astype(np.uint8) if parts is None else parts
    shade = cv2.GaussianBlur(shade, (0, 0), max(0.5, 0.018 * size))
    *colours, alpha = cv2.split(rgba)
    # Premultiplied colours never exceed their alpha.
    colours = [cv2.min(cv2.multiply(colour, shade, scale=1 / 128), alpha) for colour in colours]
    rgba = cv2.merge([*colours, alpha])
    return Sprite(rgba, parts, int(left), int(top), np.column_stack([linear, offset]))


def _fixed(points: Points, factor: int) -> np.ndarray:
    """Continuous pixel coordinates to the fixed-point coordinates of pixel centres that cv2 draws with."""
    return np.round((points * factor - 0.5) * (1 << _SHIFT)).astype(np.int32)


def _paint(
    shapes: Sequence[Shape], points: Points, size: tuple[int, int], factor: int, linear: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """Colours and coverage, `factor` times oversampled and averaged: (h, w, 4) uint8."""
    canvas = np.zeros((size[0] * factor, size[1] * factor, 4), np.uint8)
    fixed = _fixed(points, factor)
    inverse = np.linalg.inv(linear) if any(shape.pattern is not None for shape in shapes) else linear
    start = 0
    for shape in shapes:
        stop = start + len(shape.points)
        if shape.colour is not None:
            cv2.fillPoly(canvas, [fixed[start:stop]], (*shape.colour, 255), cv2.LINE_AA, _SHIFT)
            if shape.pattern is not None:
                _apply_pattern(canvas, points[start:stop], factor, shape.pattern, inverse, offset)
        start = stop
    return cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)


def _shade_and_parts(
    shapes: Sequence[Shape], points: Points, size: tuple[int, int], light: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Brightness (128 is neutral) and part numbers (None when all are 1), both (h, w) uint8.

    A round shape gets a dark rim and two brighter cores shifted towards the light; the blur afterwards makes a smooth
    body of them.
    """
    shade = np.full(size, 128, np.uint8)
    parts = np.zeros(size, np.uint8) if any(s.part != 1 for s in shapes) else None
    lengths = np.array([len(s.points) for s in shapes])
    starts = np.cumsum(lengths) - lengths
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    thickness = (high - low).min(axis=1, keepdims=True)
    towards = 0.32 * thickness * np.asarray(light)
    centre = np.repeat((low + high) / 2, lengths, axis=0)
    shift = np.repeat(towards, lengths, axis=0)
    fixed = _fixed(points, 1)
    cores = [
        (_fixed(centre + k * (points - centre) + (1 - k) * shift, 1), gain) for k, gain in ((0.78, -0.02), (0.45, 0.22))
    ]
    for i, shape in enumerate(shapes):
        span = slice(starts[i], starts[i] + lengths[i])
        if shape.colour is None:
            cv2.fillPoly(shade, [fixed[span]], (min(255, round(128 * shape.tone)),), cv2.LINE_AA, _SHIFT)
            continue
        if parts is not None:
            cv2.fillPoly(parts, [fixed[span]], (shape.part,), cv2.LINE_8, _SHIFT)
        cv2.fillPoly(shade, [fixed[span]], (round(128 * (1 - 0.38 * shape.relief)),), cv2.LINE_AA, _SHIFT)
        if shape.relief > 0 and thickness[i, 0] > 1.5:  # thinner ones are blurred away
            for core, gain in cores:
                cv2.fillPoly(shade, [core[span]], (round(128 * (1 + gain * shape.relief)),), cv2.LINE_AA, _SHIFT)
    return shade, parts


def _apply_pattern(
    canvas: np.ndarray, points: Points, factor: int, pattern: Pattern, inverse: np.ndarray, offset: np.ndarray
) -> None:
    """Blend the pattern's colour into one polygon; it is defined in object units, so that it turns with the object."""
    x0, y0 = np.maximum(np.floor(points.min(axis=0) * factor).astype(int), 0)
    x1, y1 = np.ceil(points.max(axis=0) * factor).astype(int) + 1
    region = canvas[y0:y1, x0:x1]
    cover = np.zeros(region.shape[:2], np.uint8)
    cv2.fillPoly(cover, [_fixed(points - np.array([x0, y0]) / factor, factor)], (255,), cv2.LINE_AA, _SHIFT)
    # One sample for 2 x 2 canvas pixels, which will be averaged anyway.
    dx = (np.arange(x0, x0 + region.shape[1], 2, dtype=np.float32) + 1) / factor - np.float32(offset[0])
    dy = (np.arange(y0, y0 + region.shape[0], 2, dtype=np.float32) + 1) / factor - np.float32(offset[1])
    inverse = inverse.astype(np.float32)
    u = inverse[0, 0] * dx[None] + inverse[0, 1] * dy[:, None]
    v = inverse[1, 0] * dx[None] + inverse[1, 1] * dy[:, None]
    mix = np.repeat(np.repeat(pattern.mix(u, v), 2, axis=0), 2, axis=1)[: region.shape[0], : region.shape[1]]
    weight = mix * cover * np.float32(1 / 255)
    for channel, colour in enumerate(pattern.colour):  # one by one: numpy is slow on a last axis of three
        plane = region[..., channel].astype(np.float32)
        region[..., channel] = plane + weight * (np.float32(colour) - plane)


def paste(image: np.ndarray, sprite: Sprite) -> None:
    """Compose a sprite over an image, in place. image: (H, W, 3) uint8, or (H, W, 4) with premultiplied alpha."""
    window, part = overlap(image.shape[:2], sprite)
    if part is None:
        return
    channels = image.shape[2]
    rgba = sprite.rgba[part]
    keep = 255 - cv2.merge([rgba[..., 3]] * channels)
    image[window] = cv2.add(rgba[..., :channels], cv2.multiply(image[window], keep, scale=1 / 255))


def overlap(shape: tuple[int, int], sprite: Sprite) -> tuple[tuple[slice, slice], tuple[slice, slice] | None]:
    """Slices of the image (H, W) and of the sprite that cover each other; the second is None when they do not meet."""
    height, width = sprite.parts.shape
    x0, x1 = max(sprite.left, 0), min(sprite.left + width, shape[1])
    y0, y1 = max(sprite.top, 0), min(sprite.top + height, shape[0])
    if x0 >= x1 or y0 >= y1:
        return (slice(0), slice(0)), None
    inside = slice(y0 - sprite.top, y1 - sprite.top), slice(x0 - sprite.left, x1 - sprite.left)
    return (slice(y0, y1), slice(x0, x1)), inside

"""Pictures of results: boxes, masks and keypoints with labels that stay readable at any image size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from mvision.drawing.labels import LabelPainter, text_bitmap

Colour = tuple[int, int, int]

# Clearly different hues first, strong enough on light and dark backgrounds; more classes get generated colours.
PALETTE: tuple[Colour, ...] = (
    (255, 77, 79),
    (42, 130, 255),
    (0, 190, 120),
    (255, 168, 0),
    (160, 100, 255),
    (0, 190, 220),
    (255, 105, 190),
    (140, 200, 40),
    (255, 122, 60),
    (90, 110, 230),
    (0, 155, 140),
    (205, 75, 215),
)
LEFT: Colour = (0, 200, 110)
RIGHT: Colour = (255, 140, 0)
MIDDLE: Colour = (60, 150, 255)
MASK_OPACITY = 0.45
MAX_LABELLED = 0.08  # share of the picture that labels may cover before they are shortened
SUBPIXEL = 4  # bits of the fixed-point coordinates that cv2 draws with


class Drawable(Protocol):
    """What is read of the instances of one image; ``mvision.structures.Instances`` has it all."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]
    categories: Any
    masks: Any
    keypoints: np.ndarray | None
    regions: Any

    @property
    def names(self) -> list[str]:
        """Class names."""
        ...

    def __len__(self) -> int: ...

    def resized(self, size: tuple[int, int]) -> Any:
        """The same on the image at another size (height, width)."""
        ...


def class_colour(index: int) -> Colour:
    """The colour of a class: the same index gives the same colour in every picture."""
    if index < len(PALETTE):
        return PALETTE[index]
    # Steps by the golden angle never come close to a hue that was used a few steps before.
    hue = (index * 0.618033988749895) % 1.0
    saturation, value = ((0.75, 0.95), (0.55, 1.0), (0.85, 0.8))[index % 3]
    pixel = np.array([[[hue * 360, saturation, value]]], np.float32)
    red, green, blue = (cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0] * 255).round().astype(int).tolist()
    return red, green, blue


@dataclass(frozen=True)
class Style:
    """Sizes in pixels that suit an image: everything grows with it, a little slower than the image does."""

    line: int
    font: int
    radius: float

    @classmethod
    def of(cls, height: int, width: int) -> Style:
        """The style for an image of this size."""
        growth = (max(height, width) / 640) ** 0.8
        return cls(line=max(1, round(2.7 * growth)), font=max(10, round(13 * growth)), radius=max(1.5, 3.2 * growth))


def draw_instances(
    image: np.ndarray, instances: Drawable, *, scores: bool = True, keypoint_threshold: float = 0.3
) -> np.ndarray:
    """A copy of the image with masks, boxes, skeletons and labels on it.

    A label goes where it covers neither another label nor much of another object; where there is no such place (dense
    scenes, tiny images) the colour has to tell the class. With a single class, crowded labels are the score alone, and
    masks get a colour each; masks of several classes get a shade of their class's colour each.

    Args:
        image: (H, W, 3) uint8 RGB of the size that the instances refer to.
        instances: what to draw, sorted by falling score: the best are on top and get their labels first.
        scores: write the score behind the class name.
        keypoint_threshold: keypoints with a lower score (0..1) are left out, with the lines that end there.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    canvas = np.ascontiguousarray(image).copy()
    if instances.regions is not None and instances.masks is None:
        _draw_masks(canvas, instances.regions, _colours(instances.regions), Style.of(*canvas.shape[:2]))
    if not len(instances):
        return canvas
    style = Style.of(*canvas.shape[:2])
    colours = _colours(instances)
    if instances.masks is not None:
        _draw_masks(canvas, instances, colours, style)
    slim = instances.masks is not None or instances.keypoints is not None
    line = max(1, style.line // 2) if slim else style.line
    _draw_boxes(canvas, instances.boxes, colours, line)
    if instances.keypoints is not None:
        _draw_keypoints(canvas, instances, colours, style, keypoint_threshold)
    painter = LabelPainter(canvas, instances.boxes, style.font, line)
    for index, text in enumerate(_texts(instances, painter, scores)):
        if text:
            painter.place(index, text, colours[index])
    return canvas


def side_by_side(image: np.ndarray, truth: Drawable, found: Drawable, side: int = 640) -> np.ndarray:
    """Ground truth (left) and prediction (right) of one image, with a caption each.

    Args:
        image: (H, W, 3) uint8 RGB of the size that both refer to.
        truth: the labels, as ``Dataset.truth`` gives them; their scores are not shown.
        found: the prediction.
        side: the longer side of each half in pixels; small images are enlarged to it so that labels can be read.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    scale = side / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    size = small.shape[:2]
    halves = []
    for title, instances, scores in (("ground truth", truth, False), ("prediction", found, True)):
        drawn = draw_instances(small, instances.resized(size), scores=scores)
        halves.append(np.concatenate((_caption(f"{title}: {len(instances)}", size[1]), drawn)))
    gap = np.full((halves[0].shape[0], max(2, side // 100), 3), 255, np.uint8)
    return np.concatenate((halves[0], gap, halves[1]), axis=1)


def grid(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures of any sizes in rows on white, in order.

    Args:
        images: (h, w, 3) uint8 RGB each, at least one.
        columns: pictures in a row; None makes the whole about as wide as high.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    if columns is None:
        shape = np.mean([image.shape[:2] for image in images], axis=0)
        columns = max(1, min(len(images), round(math.sqrt(len(images) * shape[0] / shape[1]))))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    widths = [max(image.shape[1] for image in images[column::columns]) for column in range(columns)]
    gap = max(4, sum(widths) // 100)
    parts = []
    for row in rows:
        height = max(image.shape[0] for image in row)
        line = np.full((height + gap, sum(widths) + gap * (columns + 1), 3), 255, np.uint8)
        left = gap
        for image, width in zip(row, widths):
            top = (height - image.shape[0]) // 2
            start = left + (width - image.shape[1]) // 2
            line[top : top + image.shape[0], start : start + image.shape[1]] = image
            left += width + gap
        parts.append(line)
    return np.concatenate((np.full((gap, parts[0].shape[1], 3), 255, np.uint8), *parts))


def _texts(instances: Drawable, painter: LabelPainter, scores: bool) -> list[str]:
    """Class name and score; the score alone where the labels would hide much of a picture with one class."""
    names, labels = instances.names, instances.labels.tolist()
    numbers = [f"{score:.2f}" if scores else "" for score in instances.scores.tolist()]
    texts = [f"{names[label]} {number}".rstrip() for label, number in zip(labels, numbers)]
    crowded = sum(painter.width(text) * painter.height for text in texts) > MAX_LABELLED * math.prod(instances.size)
    return numbers if crowded and len(names) == 1 else texts


def _colours(instances: Drawable) -> list[Colour]:
    """One colour per instance, by class; with masks also by instance, because masks of a class touch each other."""
    labels = instances.labels.tolist()
    if instances.masks is None:
        return [class_colour(label) for label in labels]
    if len(instances.categories) == 1:
        return [class_colour(index) for index in range(len(labels))]
    seen: Counter[int] = Counter()
    colours = []
    for label in labels:
        colours.append(_shade(class_colour(label), seen[label] % 3))
        seen[label] += 1
    return colours


def _shade(colour: Colour, number: int) -> Colour:
    """The colour itself (0), a lighter (1) or a darker one (2)."""
    target, share = ((0, 0.0), (255, 0.4), (0, 0.35))[number]
    red, green, blue = (round(value + (target - value) * share) for value in colour)
    return red, green, blue


def _draw_boxes(canvas: np.ndarray, boxes: np.ndarray, colours: list[Colour], line: int) -> None:
    """Frames with exact, crisp lines (cv2 draws even widths one pixel wider), the best on top."""
    limits = np.array([canvas.shape[1], canvas.shape[0]] * 2) - 1
    corners = np.clip(np.round(boxes), 0, limits).astype(int)
    before, after = line // 2, line - line // 2
    for (x0, y0, x1, y1), colour in zip(corners[::-1].tolist(), colours[::-1]):
        left, top, right, bottom = max(0, x0 - before), max(0, y0 - before), x1 + before + 1, y1 + before + 1
        canvas[top : y0 + after, left:right] = colour
        canvas[max(0, y1 - after + 1) : bottom, left:right] = colour
        canvas[top:bottom, left : x0 + after] = colour
        canvas[top:bottom, max(0, x1 - after + 1) : right] = colour


def _draw_masks(canvas: np.ndarray, instances: Drawable, colours: list[Colour], style: Style) -> None:
    """Transparent areas, large ones first so that small ones on them are seen, then every outline."""
    assert instances.masks is not None
    outlines = []
    for index in np.argsort(-instances.masks.areas, kind="stable").tolist():
        left, top, inside = instances.masks.crop(index)
        if not inside.size:
            continue
        part = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
        shades = np.arange(256)[:, None] * (1 - MASK_OPACITY) + np.array(colours[index]) * MASK_OPACITY
        tinted = cv2.LUT(part, shades.round().astype(np.uint8)[:, None])
        cv2.copyTo(tinted, inside.view(np.uint8), part)
        offset = (left, top)
        contours, _ = cv2.findContours(
            inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_TC89_L1, offset=offset
        )
        outlines.append((contours, colours[index]))
    for contours, colour in outlines:
        cv2.polylines(canvas, contours, True, colour, max(1, style.line - 1), cv2.LINE_AA)


def _draw_keypoints(
    canvas: np.ndarray, instances: Drawable, colours: list[Colour], style: Style, threshold: float
) -> None:
    assert instances.keypoints is not None
    labels = instances.labels.tolist()
    for index in reversed(range(len(instances))):
        category = instances.categories[labels[index]]
        # A class may have fewer points than the richest one, whose number all rows have.
        points = instances.keypoints[index][: len(category.keypoints) or None]
        shown = points[:, 2] >= threshold
        sides = _sides(category, len(points), colours[index])
        where = np.round(points[:, :2] * 2**SUBPIXEL).astype(int)
        # One object's size decides too: a small person must not vanish under its own joints.
        extent = float(np.ptp(instances.boxes[index].reshape(2, 2), axis=0).max())
        radius = max(1.2, min(style.radius, extent / 24))
        line = max(1, round(min(style.line - 1, radius)))
        for a, b in category.skeleton:
            if max(a, b) < len(points) and shown[a] and shown[b]:
                colour = sides[a] if sides[a] == sides[b] else MIDDLE
                cv2.line(canvas, where[a].tolist(), where[b].tolist(), colour, line, cv2.LINE_AA, SUBPIXEL)
        for point, colour in zip(where[shown].tolist(), [c for c, s in zip(sides, shown) if s]):
            size = 2**SUBPIXEL
            cv2.circle(canvas, point, round((radius + 0.8) * size), (255, 255, 255), -1, cv2.LINE_AA, SUBPIXEL)
            cv2.circle(canvas, point, round(radius * size), colour, -1, cv2.LINE_AA, SUBPIXEL)


def _sides(category: Any, count: int, colour: Colour) -> list[Colour]:
    """A colour per keypoint: left, right and middle by name; the object's colour where no name tells a side."""
    sides = []
    for name in category.keypoints[:count]:
        words = name.lower().replace("-", "_").replace(" ", "_").split("_")
        sides.append(LEFT if {"left", "l"} & set(words) else RIGHT if {"right", "r"} & set(words) else MIDDLE)
    if len(sides) < count or set(sides) <= {MIDDLE}:
        return [colour] * count
    return sides


def _caption(text: str, width: int) -> np.ndarray:
    """A white strip with dark text in the middle."""
    bitmap = text_bitmap(text, max(12, width // 36))[:, :width]
    strip = np.full((round(bitmap.shape[0] * 1.7), width), 255, np.float32)
    top, left = (strip.shape[0] - bitmap.shape[0]) // 2, (width - bitmap.shape[1]) // 2
    strip[top : top + bitmap.shape[0], left : left + bitmap.shape[1]] -= bitmap * (215 / 255)
    return np.repeat(strip.astype(np.uint8)[..., None], 3, axis=2)

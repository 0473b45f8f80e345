"""The labelled objects of a split: one annotation checked at a time, all of them in flat arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvision.data.formats.problems import Problems
from mvision.data.formats.segmentation import (
    BadSegmentation,
    Outline,
    Outlines,
    outline_area,
    outline_box,
    parse_segmentation,
)
from mvision.structures import Category

BORDER = 1.0  # pixels by which a box may reach over the border unmentioned: rounding in COCO's own files


@dataclass
class CleanObject:
    """One usable annotation in pixels of its image: xyxy ``box``, index of the category, and what else it has."""

    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool
    outline: Outline | None
    keypoints: np.ndarray | None


@dataclass
class Objects:
    """All objects of a split; those of image i are the rows ``start[i]:start[i + 1]``.

    Attributes:
        start: (images + 1,) int64.
        boxes: (M, 4) float32 xyxy in fractions of the image, inside it.
        labels: (M,) int64 index into the categories.
        areas: (M,) float32 fraction of the image.
        crowd: (M,) bool: a region that holds many objects and is no training target.
        keypoints: (M, K, 3) float32 x, y in fractions and visibility 0, 1, 2, or None where they were not asked for.
            Classes with fewer keypoints than K, and objects without any, are filled with zeros.
        outlines: polygons in fractions, run lengths as they are; None where masks were not asked for.
    """

    start: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    keypoints: np.ndarray | None
    outlines: Outlines | None

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, image: int) -> slice:
        """Rows of one image."""
        return slice(int(self.start[image]), int(self.start[image + 1]))


def clean_object(
    annotation: dict[str, Any],
    label: int,
    category: Category,
    size: tuple[int, int],
    fields: frozenset[str],
    problems: Problems,
    where: str,
) -> CleanObject | None:
    """Check one annotation; what is wrong with it goes to ``problems``. None where nothing of it can be used."""
    outline = _outline(annotation, size, fields, problems, where)
    box = _box(annotation, outline, size, problems, where)
    if box is None:
        return None
    keypoints = _keypoints(annotation, category, size, problems, where) if "keypoints" in fields else None
    area = _positive(annotation.get("area")) or (outline_area(outline, *size) if outline is not None else 0.0)
    area = area or (box[2] - box[0]) * (box[3] - box[1])
    return CleanObject(box, label, area, bool(annotation.get("iscrowd")), outline, keypoints)


def pack_objects(
    objects: Sequence[Sequence[CleanObject]], sizes: Sequence[tuple[int, int]], fields: frozenset[str], num_points: int
) -> Objects:
    """Objects image by image (``sizes``: height, width of each) to flat arrays in fractions of their images."""
    flat = [item for of_image in objects for item in of_image]
    scales = np.array(
        [(width, height) for (height, width), of_image in zip(sizes, objects) for _ in of_image], dtype=np.float64
    ).reshape(-1, 2)
    boxes = np.array([item.box for item in flat], dtype=np.float64).reshape(-1, 4) / np.tile(scales, 2)
    areas = np.array([item.area for item in flat], dtype=np.float64) / scales.prod(axis=1)
    keypoints = None
    if "keypoints" in fields:
        keypoints = np.zeros((len(flat), num_points, 3), dtype=np.float32)
        for row, item in enumerate(flat):
            if item.keypoints is not None:
                keypoints[row, : len(item.keypoints)] = item.keypoints / (*scales[row], 1)
    outlines = None
    if "masks" in fields:
        outlines = Outlines(
            [
                [part / scales[row] for part in item.outline] if isinstance(item.outline, list) else item.outline
                for row, item in enumerate(flat)
            ]
        )
    return Objects(
        start=np.cumsum([0, *(len(of_image) for of_image in objects)], dtype=np.int64),
        boxes=boxes.astype(np.float32).clip(0, 1),
        labels=np.array([item.label for item in flat], dtype=np.int64),
        areas=areas.astype(np.float32),
        crowd=np.array([item.crowd for item in flat], dtype=bool),
        keypoints=keypoints,
        outlines=outlines,
    )


def _outline(
    annotation: dict[str, Any], size: tuple[int, int], fields: frozenset[str], problems: Problems, where: str
) -> Outline | None:
    segmentation = annotation.get("segmentation")
    if not segmentation or ("masks" not in fields and "bbox" in annotation):
        return None
    try:
        outline, left_out = parse_segmentation(segmentation, *size)
    except BadSegmentation as error:
        problems.add("segmentation that cannot be used: the object has no mask", f"{where}: {error}")
        return None
    if left_out:
        problems.add("polygon parts with fewer than three points or with NaN: left out", where)
    return outline


def _box(
    annotation: dict[str, Any], outline: Outline | None, size: tuple[int, int], problems: Problems, where: str
) -> tuple[float, float, float, float] | None:
    """The xyxy box inside the image, or None with the reason in ``problems``."""
    height, width = size
    bbox = annotation.get("bbox")
    if isinstance(bbox, list) and len(bbox) == 4 and all(_is_number(value) for value in bbox):
        x, y, w, h = bbox
        raw = (x, y, x + w, y + h)
        if w <= 0 or h <= 0:
            problems.add("box without area: annotation skipped", f"{where}: bbox {bbox}")
            return None
    elif outline is not None:
        raw = outline_box(outline)
        if bbox:
            problems.add("bbox that is not four finite numbers: taken from the segmentation", f"{where}: bbox {bbox}")
    else:
        kind = "bbox that is not four finite numbers" if bbox else "neither bbox nor segmentation"
        problems.add(f"{kind}: annotation skipped", f"{where}: bbox {bbox}" if bbox else where)
        return None
    box = (max(raw[0], 0.0), max(raw[1], 0.0), min(raw[2], float(width)), min(raw[3], float(height)))
    if box[2] <= box[0] or box[3] <= box[1]:
        place = "without area" if raw[2] <= raw[0] or raw[3] <= raw[1] else "outside the image"
        problems.add(f"box {place}: annotation skipped", f"{where}: bbox {bbox or list(raw)} on {width} x {height}")
        return None
    if max(abs(a - b) for a, b in zip(raw, box)) > BORDER:
        problems.add("box reaching over the image's border: clipped", f"{where}: bbox {bbox} on {width} x {height}")
    return box


def _keypoints(
    annotation: dict[str, Any], category: Category, size: tuple[int, int], problems: Problems, where: str
) -> np.ndarray | None:
    """(K, 3) x, y in pixels and visibility; None where the annotation has none that can be used."""
    values = annotation.get("keypoints")
    if not values:
        return None
    count = len(category.keypoints)
    if not isinstance(values, list) or len(values) != 3 * count:
        amount = len(values) if isinstance(values, list) else type(values).__name__
        problems.add(
            "keypoints of the wrong number: the object has none",
            f"{where}: {amount} values, {category.name} has {count}",
        )
        return None
    try:
        points = np.array(values, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError):
        problems.add("keypoints that are no numbers: the object has none", where)
        return None
    height, width = size
    seen = points[:, 2] > 0
    bad = seen & ~np.isfinite(points).all(axis=1)
    inside = (points[:, 0] >= 0) & (points[:, 0] <= width) & (points[:, 1] >= 0) & (points[:, 1] <= height)
    outside = seen & ~bad & ~inside
    if bad.any():
        problems.add("keypoint with NaN: counted as not labelled", where)
    if outside.any():
        problems.add("keypoint outside the image: counted as not labelled", where)
    points[~seen | bad | outside] = 0
    points[:, 2] = points[:, 2].clip(0, 2).round()
    return points


def _positive(value: Any) -> float:
    return float(value) if _is_number(value) and value > 0 else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

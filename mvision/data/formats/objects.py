"""One annotation at a time: checked, and completed to all that training, evaluation and conversion need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mvision.data.formats.problems import Problems
from mvision.data.formats.segmentation import (
    BadSegmentation,
    Outline,
    outline_area,
    outline_box,
    parse_segmentation,
)
from mvision.structures import Category

BORDER = 1.0  # pixels by which a box may reach over the border unmentioned: rounding in COCO's own files


def clean_annotation(
    annotation: dict[str, Any],
    category: Category,
    size: tuple[int, int],
    fields: frozenset[str],
    problems: Problems,
    where: str,
) -> dict[str, Any] | None:
    """Check one annotation; what is wrong with it goes to ``problems``.

    Args:
        size: (height, width) of its image.
        fields: those of ``Targets`` that are wanted.
        where: file and annotation, for ``problems``.

    Returns:
        COCO's keys in the file's own pixels and at its precision: ``bbox`` (xywh, inside the image), ``area`` and
        ``iscrowd``; where wanted ``keypoints`` ((K, 3) float64, zeros where not labelled) and, if it has a usable one,
        ``segmentation`` (an ``Outline``). None where nothing of the annotation can be used.
    """
    outline = _outline(annotation, size, fields, problems, where)
    box = _box(annotation, outline, size, problems, where)
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    area = _positive(annotation.get("area")) or (outline_area(outline, *size) if outline is not None else 0.0)
    entry: dict[str, Any] = {
        "bbox": [box[0], box[1], width, height],
        "area": area or width * height,
        "iscrowd": int(bool(annotation.get("iscrowd"))),
    }
    if outline is not None and "masks" in fields:
        entry["segmentation"] = outline
    if "keypoints" in fields:
        points = _keypoints(annotation, category, size, problems, where)
        entry["keypoints"] = np.zeros((len(category.keypoints), 3)) if points is None else points
    return entry


def to_json(entry: dict[str, Any]) -> dict[str, Any]:
    """The same annotation as a COCO file holds it: lists of numbers, with ``num_keypoints``."""
    plain = dict(entry)
    outline = entry.get("segmentation")
    if isinstance(outline, dict):
        plain["segmentation"] = {**outline, "counts": outline["counts"].decode()}
    elif outline is not None:
        plain["segmentation"] = [part.reshape(-1).tolist() for part in outline]
    if "keypoints" in entry:
        plain["keypoints"] = entry["keypoints"].reshape(-1).tolist()
        plain["num_keypoints"] = int((entry["keypoints"][:, 2] > 0).sum())
    return plain


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
        raw = (float(x), float(y), float(x + w), float(y + h))
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

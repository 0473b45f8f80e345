"""One annotation at a time: checked, and completed to all that training, evaluation and conversion need."""

from __future__ import annotations

from typing import Any

import numpy as np

from mvision.data.formats.numbers import flag, number, numbers
from mvision.data.formats.problems import Problems
from mvision.data.formats.segmentation import (
    BadSegmentation,
    Outline,
    outline_area,
    outline_box,
    parse_segmentation,
)
from mvision.structures import Category

MARGIN, LEAST_MARGIN = 0.1, 0.02  # around points: of their extent, but at least of the image's longer side
NEAR = 0.5  # of a box's sides, by which it is enlarged on each side to hold at least one of its keypoints
LEAST_AREA, MOST_AREA = 0.01, 1.05  # of an object, in that of its box (a pixel wider and higher: it may be rounded)
BORDER = 1.0  # pixels by which a box may reach over the border unmentioned: rounding in COCO's own files


def clean_annotation(
    annotation: dict[str, Any],
    category: Category,
    size: tuple[int, int],
    fields: frozenset[str],
    problems: Problems,
    where: object,
    ignore_iscrowd: bool = False,
) -> dict[str, Any] | None:
    """Check one annotation; what is wrong with it goes to ``problems``.

    An object without a usable box gets that of its segmentation or, with a margin, of its labelled keypoints.

    Args:
        size: (height, width) of its image.
        fields: those of ``Targets`` that are wanted.
        where: file and annotation, for ``problems``; its text is asked for only where there is one.
        ignore_iscrowd: read crowd regions as single objects.

    Returns:
        COCO's keys in the file's own pixels and at its precision: ``bbox`` (xywh, inside the image), ``area`` and
        ``iscrowd``; where wanted ``keypoints`` ((K, 3) float64, zeros where not labelled) and, if it has a usable one,
        ``segmentation`` (an ``Outline``). None where nothing of the annotation can be used.
    """
    bbox = numbers(annotation.get("bbox"), 4)
    has_box = bbox is not None and bbox[2] > 0 and bbox[3] > 0
    outline = _outline(annotation, size, problems, where) if "masks" in fields or not has_box else None
    points = None
    if "keypoints" in fields or not (has_box or outline is not None):
        points = _keypoints(annotation, category, size, problems, where)
    if has_box and bbox is not None:
        raw = (bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3])
        outline = _meeting(outline, raw, problems, where)
        points = _near(points, raw, size, problems, where)
    else:
        found = _other_box(annotation, outline, points, size, problems, where)
        if found is None:
            return None
        raw = found
    is_around_points = not has_box and outline is None
    box = _inside(raw, size, annotation.get("bbox"), problems, where, is_around_points)
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    entry: dict[str, Any] = {
        "bbox": [box[0], box[1], width, height],
        "area": _area(annotation, outline, None if is_around_points else raw, size, problems, where) or width * height,
        "iscrowd": int(flag(annotation.get("iscrowd")) and not ignore_iscrowd),
    }
    if outline is not None and "masks" in fields:
        entry["segmentation"] = outline
    if "keypoints" in fields:
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


def _outline(annotation: dict[str, Any], size: tuple[int, int], problems: Problems, where: object) -> Outline | None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None
    try:
        outline, left_out = parse_segmentation(segmentation, *size)
    except BadSegmentation as error:
        problems.add("segmentation that cannot be used: the object has no mask", f"{where}: {error}", "masks")
        return None
    if left_out:
        kind = "polygon parts with fewer than three points, with NaN or far from the image: left out"
        problems.add(kind, str(where), "masks")
    return outline


def _meeting(
    outline: Outline | None, box: tuple[float, float, float, float], problems: Problems, where: object
) -> Outline | None:
    """The outline if it meets the object's xyxy box; one in fractions or of another picture does not."""
    if outline is None:
        return None
    x0, y0, x1, y1 = box[0] - BORDER, box[1] - BORDER, box[2] + BORDER, box[3] + BORDER
    if isinstance(outline, list):
        x, y = outline[0][0]
        if x0 <= x <= x1 and y0 <= y <= y1:
            return outline  # nearly every one, and no need to go over all its points
    left, top, right, bottom = outline_box(outline)
    if left <= x1 and right >= x0 and top <= y1 and bottom >= y0:
        return outline
    there, wanted = ([float(f"{value:.4g}") for value in corners] for corners in ((left, top, right, bottom), box))
    kind = "segmentation that does not meet its box (in fractions of the picture?): the object has no mask"
    problems.add(kind, f"{where}: from {there[:2]} to {there[2:]}, the box from {wanted[:2]} to {wanted[2:]}", "masks")
    return None


def _near(
    points: np.ndarray | None,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    problems: Problems,
    where: object,
) -> np.ndarray | None:
    """The keypoints if at least one that is labelled lies in or near the object's xyxy box."""
    if points is None:
        return None
    x, y, visible = points.T
    wide, high = (max(NEAR * side, LEAST_MARGIN * max(size)) for side in (box[2] - box[0], box[3] - box[1]))
    near = (x >= box[0] - wide) & (x <= box[2] + wide) & (y >= box[1] - high) & (y <= box[3] + high)
    labelled = visible > 0
    if not labelled.any() or (near & labelled).any():
        return points
    kind = (
        "keypoints none of which lies in or near the object's box (in fractions of the picture?): the object has none"
    )
    place = points[labelled][0, :2].tolist()
    problems.add(kind, f"{where}: {place}, the box from {list(box[:2])} to {list(box[2:])}", "keypoints")
    return None


def _other_box(
    annotation: dict[str, Any],
    outline: Outline | None,
    points: np.ndarray | None,
    size: tuple[int, int],
    problems: Problems,
    where: object,
) -> tuple[float, float, float, float] | None:
    """The xyxy box of an annotation whose ``bbox`` cannot be used, or None; what is done is said in ``problems``."""
    bbox = annotation.get("bbox")
    if not bbox:
        kind = "object without bbox"
    elif numbers(bbox, 4) is None:
        kind = "bbox that is not four finite numbers"
    else:
        kind = "box without area"
    place = f"{where}: bbox {bbox!r:.120}" if bbox else str(where)
    if outline is not None:
        if bbox:
            problems.add(f"{kind}: taken from the segmentation", place)
        return outline_box(outline)
    labelled = points[points[:, 2] > 0, :2] if points is not None else np.zeros((0, 2))
    if len(labelled):
        problems.add(f"{kind}: a box around its labelled keypoints, with a margin, takes its place", place)
        (x0, y0), (x1, y1) = labelled.min(axis=0).tolist(), labelled.max(axis=0).tolist()
        margin = max(MARGIN * max(x1 - x0, y1 - y0), LEAST_MARGIN * max(size))
        return x0 - margin, y0 - margin, x1 + margin, y1 + margin
    problems.add(f"{kind if bbox else 'neither bbox nor segmentation'}: annotation skipped", place)
    return None


def _inside(
    raw: tuple[float, float, float, float],
    size: tuple[int, int],
    bbox: Any,
    problems: Problems,
    where: object,
    is_around_points: bool,
) -> tuple[float, float, float, float] | None:
    """The part of an xyxy box that lies inside the image, or None with the reason in ``problems``."""
    height, width = size
    box = (max(raw[0], 0.0), max(raw[1], 0.0), min(raw[2], float(width)), min(raw[3], float(height)))
    if box[2] <= box[0] or box[3] <= box[1]:
        place = "without area" if raw[2] <= raw[0] or raw[3] <= raw[1] else "outside the image"
        shown = f"{where}: bbox {bbox or list(raw)!r:.120} on {width} x {height}"
        problems.add(f"box {place}: annotation skipped", shown)
        return None
    # The margin around points is nobody's mistake.
    if not is_around_points and max(abs(a - b) for a, b in zip(raw, box)) > BORDER:
        shown = f"{where}: bbox {bbox or list(raw)!r:.120} on {width} x {height}"
        problems.add("box reaching over the image's border: clipped", shown)
    return box


def _area(
    annotation: dict[str, Any],
    outline: Outline | None,
    box: tuple[float, float, float, float] | None,
    size: tuple[int, int],
    problems: Problems,
    where: object,
) -> float:
    """The area in the file if it can be true, else that of the outline; 0 where the box's is to be taken.

    Args:
        annotation: as in the file.
        outline: in pixels, if it was read.
        box: xyxy as in the file; None where it is a guess that the area cannot be compared with.
    """
    area, least, most = number(annotation.get("area")) or 0.0, 0.0, float(size[0] * size[1])
    if box is not None:
        width, height = box[2] - box[0], box[3] - box[1]
        least, most = LEAST_AREA * width * height, min(most, MOST_AREA * (width + 1) * (height + 1))
    if area > 0 and least <= area <= most:
        return area
    if area > 0 and box is not None and outline is None:  # not asked for, but it tells most
        outline = _meeting(_outline(annotation, size, Problems(), where), box, Problems(), where)
    measured = outline_area(outline, *size) if outline is not None else 0.0
    if 0 < area <= size[0] * size[1] and measured / 2 <= area <= measured * 2:
        return area  # a thin object across a large box
    if area > 0:
        kind = "area that the object's box cannot have: measured from its segmentation or, without one, from the box"
        problems.add(kind, f"{where}: area {annotation['area']!r:.40}, bbox {annotation.get('bbox')!r:.120}")
    return measured


def _keypoints(
    annotation: dict[str, Any], category: Category, size: tuple[int, int], problems: Problems, where: object
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
            "keypoints",
        )
        return None
    try:
        points = np.array(values, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError, OverflowError):
        problems.add("keypoints that are no numbers: the object has none", str(where), "keypoints")
        return None
    height, width = size
    x, y, visible = points.T
    seen = visible > 0
    good = seen & (x >= 0) & (x <= width) & (y >= 0) & (y <= height) & (visible < np.inf)
    if not seen.any() and points[:, :2].any():
        kind = "object whose keypoints have places but visibility 0, which means not labelled: nothing is learned"
        problems.add(kind, str(where), "keypoints")
    if (seen != good).any():
        finite = np.isfinite(points[seen & ~good]).all(axis=1)
        if not finite.all():
            problems.add("keypoint with NaN: counted as not labelled", str(where), "keypoints")
        if finite.any():
            problems.add("keypoint outside the image: counted as not labelled", str(where), "keypoints")
    points[:, 2] = np.rint(visible.clip(1, 2))  # some files have a confidence here
    points[~good] = 0
    return points

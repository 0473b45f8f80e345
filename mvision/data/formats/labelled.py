"""What a model found in a picture, as it is handed to a tool for labelling: shapes that people can correct.

Coordinates are in pixels of the upright picture, rounded to hundredths as those tools store them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mvision.structures import Category, Instances
from mvision.structures.masks import RunLengths, decode_mask, mask_polygons

POINT_THRESHOLD = 0.3  # keypoints with a lower score are left out, as they are in pictures
# An outline follows every pixel's edge. With points this far from it at most (in pixels, and as a share of the
# diagonal of the object's box) it has a tenth of the points, and a person can move them.
TOLERANCE, RELATIVE_TOLERANCE = 0.7, 0.003
SPECK = 0.01  # parts of a mask that are smaller than this share of it are no part of its outline
MANY = 4  # vertices from which an outline is simplified

EMPTY_MASK = "objects without a pixel in their mask, written as boxes"
HOLES = "masks with holes, which outlines fill (--masks rle keeps them)"
SPECKS = f"parts of masks smaller than {SPECK:.0%} of their object, left out (--masks rle keeps them)"
POINTS = f"keypoints with a score below {POINT_THRESHOLD}, written as not labelled"
FLAT = "objects less than a hundredth of a pixel wide or high, left out"


@dataclass
class LabelledObject:
    """One object.

    Attributes:
        label: index into the classes.
        score: 0..1.
        box: x0, y0, x1, y1.
        area: of the mask where there is one, else of the box.
        review: a person should look at it, because of its score.
        polygons: the outline, a flat x, y list for each part; None without a mask, or where it is kept as ``mask``.
        mask: run lengths.
        points: (K, 3) x, y and 2, or 0 for a point that is not labelled; None for a class without keypoints.
    """

    label: int
    score: float
    box: list[float]
    area: float
    review: bool = False
    polygons: list[list[float]] | None = None
    mask: RunLengths | None = None
    points: list[list[float]] | None = None


@dataclass
class LabelledPicture:
    """One picture with its objects.

    Attributes:
        name: with forward slashes, below the folder of the pictures.
        height, width: in pixels, upright.
    """

    name: str
    height: int
    width: int
    objects: list[LabelledObject] = field(default_factory=list)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({**vars(self), "objects": [vars(one) for one in self.objects]})

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> LabelledPicture:
        """What ``to_json`` has written, parsed."""
        return cls(**{**tree, "objects": [LabelledObject(**one) for one in tree["objects"]]})


Pictures = Callable[[], Iterator[LabelledPicture]]
"""Gives all pictures, one at a time, as often as it is called."""


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        categories: the classes of the model.
        masks: the form of masks: ``polygon`` or ``rle``; empty: the model has none.
        points: whether the model finds keypoints.
        mirrored: for each keypoint of the first class that has some, the one that it becomes in a mirror.
        model: what the predictions are of, for tools that show it.
        image_url: what the addresses of pictures begin with, for tools that load them by their address.
    """

    categories: Sequence[Category]
    masks: str = ""
    points: bool = False
    mirrored: Sequence[int] = ()
    model: str = "mvision"
    image_url: str = ""

    @property
    def with_points(self) -> list[Category]:
        """The classes that have keypoints, if any are written."""
        return [category for category in self.categories if category.keypoints] if self.points else []


def labelled_picture(
    name: str, found: Instances, doubtful: np.ndarray, rle: bool
) -> tuple[LabelledPicture, Counter[str]]:
    """The instances of a picture as objects.

    Args:
        name: of the picture.
        found: in pixels of the upright picture.
        doubtful: (N,) bool, those to be marked for review.
        rle: keep masks as run lengths, not as polygons.

    Returns:
        The picture, and the number of things by what was left out or replaced.
    """
    notes: Counter[str] = Counter()
    picture = LabelledPicture(name, int(found.size[0]), int(found.size[1]))
    boxes = np.round(found.boxes.astype(np.float64).reshape(-1, 4), 2).tolist()
    areas = None if found.masks is None else found.masks.areas
    for index, (label, box, score) in enumerate(zip(found.labels.tolist(), boxes, found.scores.tolist())):
        if box[2] <= box[0] or box[3] <= box[1]:
            notes[FLAT] += 1
            continue
        area = round((box[2] - box[0]) * (box[3] - box[1]), 2)
        made = LabelledObject(label, round(score, 5), box, area, bool(doubtful[index]))
        if areas is not None and found.masks is not None:
            _add_mask(made, found.masks.rles[index], int(areas[index]), rle, notes)
        category = found.categories[label]
        if found.keypoints is not None and category.keypoints:
            made.points = _points(found.keypoints[index][: len(category.keypoints)], found.size, notes)
        picture.objects.append(made)
    return picture, notes


def _add_mask(made: LabelledObject, mask: RunLengths, area: int, rle: bool, notes: Counter[str]) -> None:
    if not area:
        notes[EMPTY_MASK] += 1
        return
    made.area = float(area)
    if rle:
        made.mask = mask
    else:
        made.polygons = outlines(mask, notes)


def _points(points: np.ndarray, size: tuple[int, int], notes: Counter[str]) -> list[list[float]]:
    x, y, score = points.T
    seen = (score >= POINT_THRESHOLD) & (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])
    notes[POINTS] += int((~seen).sum())
    places = np.round(np.stack((x.clip(0, size[1]), y.clip(0, size[0])), axis=1).astype(np.float64), 2)
    return [[*place, 2 if labelled else 0] for place, labelled in zip(places.tolist(), seen.tolist())]


def outlines(mask: RunLengths, notes: Counter[str]) -> list[list[float]]:
    """The outline of a mask that is not empty, in parts of a few points each, the largest first.

    Args:
        mask: run lengths of the whole picture.
        notes: counts holes and specks.
    """
    x0, y0, w, h = (int(value) for value in coco_mask.toBbox(mask))
    part = decode_mask(mask)[y0 : y0 + h, x0 : x0 + w]
    if _hole(part) > SPECK * part.sum():
        notes[HOLES] += 1
    tolerance = max(TOLERANCE, RELATIVE_TOLERANCE * float(np.hypot(w, h)))
    polygons = sorted(mask_polygons(part), key=_area, reverse=True)
    kept: list[list[float]] = []
    for polygon in polygons:
        if kept and _area(polygon) < SPECK * _area(polygons[0]):
            notes[SPECKS] += 1
            continue
        simple = _simplified(polygon, tolerance) + np.array((x0, y0))
        kept.append(np.round(simple.reshape(-1), 2).tolist())
    return kept


def _simplified(polygon: np.ndarray, tolerance: float) -> np.ndarray:
    if len(polygon) <= MANY:
        return polygon
    # Douglas and Peucker, "Algorithms for the Reduction of the Number of Points", 1973.
    simple = cv2.approxPolyDP(polygon.astype(np.float32)[:, None], tolerance, closed=True)[:, 0].astype(np.float64)
    return simple if len(simple) > 2 else polygon


def _hole(mask: np.ndarray) -> int:
    """The number of pixels that lie in holes."""
    outside = np.pad(~mask, 1, constant_values=True).view(np.uint8)
    count, _, found, _ = cv2.connectedComponentsWithStats(outside, connectivity=4)
    stats = np.asarray(found)
    return int(stats[1:, cv2.CC_STAT_AREA].sum() - stats[1:, cv2.CC_STAT_AREA].max()) if count > 2 else 0


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2

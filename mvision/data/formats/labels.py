"""Labels in flat arrays: of all objects of a split, and of those of one picture on their way to ``Targets``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mvision.data.formats.segmentation import Outlines

WHOLE = (0.0, 0.0, 1.0, 1.0)  # a picture in fractions of itself, xyxy


@dataclass
class Labels:
    """The labelled objects of a split, image by image; everything in fractions of the object's image.

    Attributes:
        boxes: (N, 4) float32 xyxy, inside the image.
        labels: (N,) int64 index into the categories.
        areas: (N,) float32.
        crowd: (N,) bool: a region that holds many objects and is no training target.
        keypoints: (N, K, 3) float32 x, y and visibility 0, 1, 2, or None where they were not asked for. Classes with
            fewer keypoints than K, and objects without any, are filled with zeros.
        outlines: polygons in fractions, run lengths as they are; None where masks were not asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    keypoints: np.ndarray | None
    outlines: Outlines | np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, rows: slice) -> PictureLabels:
        """Those of one image, as it was read."""
        labels = self.labels[rows]
        count = len(labels)
        outlines = None
        if self.outlines is not None:
            outlines = np.empty(count, dtype=object)
            outlines[:] = [self.outlines[row] for row in range(len(self))[rows]]
        return PictureLabels(
            boxes=self.boxes[rows].astype(np.float64),
            labels=labels,
            areas=self.areas[rows].astype(np.float64),
            crowd=self.crowd[rows],
            keypoints=None if self.keypoints is None else self.keypoints[rows].astype(np.float64),
            outlines=outlines,
            cut=np.zeros(count, dtype=bool),
            windows=np.tile(np.array(WHOLE), (count, 1)),
            scale=np.ones((count, 2)),
            offset=np.zeros((count, 2)),
        )


@dataclass
class PictureLabels(Labels):
    """The same for the objects of one picture, which augmentation crops, moves and joins with others.

    Outlines stay as they were read, and are drawn at the end: a point p of an outline lies at ``p * scale + offset``.

    Attributes:
        boxes, areas, keypoints: as in ``Labels``, but float64 and in fractions of the picture.
        outlines: (N,) of objects: an outline each, or None; or None altogether.
        cut: (N,) bool: part of the object lies outside the picture.
        windows: (N, 4) float64 xyxy: the part of the picture in which the object's own image is visible.
        scale, offset: (N, 2) float64 x, y.
    """

    outlines: np.ndarray | None
    cut: np.ndarray
    windows: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    def __getitem__(self, keep: np.ndarray) -> PictureLabels:
        """The objects that ``keep`` (bool mask or indices) selects, in every field together."""
        chosen: dict[str, Any] = {
            f.name: None if (value := getattr(self, f.name)) is None else value[keep] for f in fields(self)
        }
        return PictureLabels(**chosen)


def join_labels(several: Sequence[PictureLabels]) -> PictureLabels:
    """All objects of several pictures that share one canvas."""

    def joined(name: str) -> Any:
        values = [getattr(labels, name) for labels in several]
        return None if values[0] is None else np.concatenate(values)

    return PictureLabels(**{f.name: joined(f.name) for f in fields(PictureLabels)})


def pack_labels(
    entries: Sequence[dict[str, Any]],
    labels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    wanted: frozenset[str],
    num_points: int,
) -> Labels:
    """Cleaned annotations (see ``objects.clean_annotation``) to flat arrays, in the same order.

    Args:
        entries: in pixels.
        labels: the index of each one's category.
        sizes: (height, width) of each one's image.
        wanted: fields of ``Targets``.
        num_points: K, the largest number of keypoints of a class.
    """
    scales = np.array([(width, height) for height, width in sizes], dtype=np.float64).reshape(-1, 2)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    areas = np.array([entry["area"] for entry in entries], dtype=np.float64) / scales.prod(axis=1)
    keypoints = None
    if "keypoints" in wanted:
        keypoints = np.zeros((len(entries), num_points, 3), dtype=np.float32)
        for row, entry in enumerate(entries):
            points = entry["keypoints"]
            keypoints[row, : len(points)] = points / (*scales[row], 1)
    outlines = None
    if "masks" in wanted:
        outlines = Outlines(
            [
                [part / scales[row] for part in outline] if isinstance(outline, list) else outline
                for row, outline in enumerate(entry.get("segmentation") for entry in entries)
            ]
        )
    return Labels(
        boxes=(boxes / np.tile(scales, 2)).astype(np.float32).clip(0, 1),
        labels=np.array(labels, dtype=np.int64),
        areas=areas.astype(np.float32),
        crowd=np.array([entry["iscrowd"] for entry in entries], dtype=bool),
        keypoints=keypoints,
        outlines=outlines,
    )

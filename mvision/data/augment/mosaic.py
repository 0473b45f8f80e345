"""A mosaic of four whole images that are turned, shifted and scaled together: many objects in one picture.

Source: Huang et al., "DEIM: DETR with Improved Matching for Fast Convergence", CVPR 2025, section 3.2 (dense one-to-one
matching), and the strengths of its published recipes. Where those let images of different shapes leave gaps between
them, every image is stretched over its quarter here, as it is over the whole picture without a mosaic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from mvision.data.augment.geometry import FILL, PixelRect, fit, paint, place, stays_labelled
from mvision.data.formats.labels import WHOLE, PictureLabels, join_labels
from mvision.data.formats.segmentation import rasterise
from mvision.structures.masks import encode_mask

SCALES = (0.5, 1.5)  # at 1 the four images fill the picture
ANGLE = math.radians(10)
SHIFT = 0.1  # of the picture's sides
OUTSIDE = 1e-3  # of the image's sides: outlines that reach further over its border are drawn to be turned


@dataclass(frozen=True)
class Turn:
    """How a mosaic lies in the picture.

    Attributes:
        scale: 1 where it is as large as the picture.
        angle: in radians, clockwise.
        shift: x, y in sides of the picture.
    """

    scale: float
    angle: float
    shift: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Turn:
        """A random one."""
        scale, angle = rng.uniform(*SCALES), rng.uniform(-ANGLE, ANGLE)
        x, y = rng.uniform(-SHIFT, SHIFT, size=2)
        return cls(float(scale), float(angle), (float(x), float(y)))

    def quarter(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of each of the four images in a picture of this size."""
        height, width = size
        return max(round(height * self.scale / 2), 1), max(round(width * self.scale / 2), 1)

    def matrix(self, size: tuple[int, int], aspect: float) -> np.ndarray:
        """(2, 3) from pixels of the mosaic of four quarters to pixels of the picture; corners at whole numbers.

        Args:
            size: (height, width) of the picture.
            aspect: width by height of what the picture shows before it is stretched: there an angle is an angle.
        """
        height, width = size
        rows, columns = self.quarter(size)
        stretch = width / (aspect * height)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[cos, -sin * stretch], [sin / stretch, cos]])
        centre = np.array((width * (0.5 + self.shift[0]), height * (0.5 + self.shift[1])))
        return np.column_stack((turn, centre - turn @ (columns, rows)))


def mosaic_of_whole(
    pictures: Sequence[tuple[np.ndarray, PictureLabels]], turn: Turn, size: tuple[int, int], aspect: float
) -> tuple[np.ndarray, PictureLabels]:
    """Four images side by side, top left, top right, bottom left, bottom right, then turned.

    Args:
        pictures: (H, W, 3) uint8 and labels in fractions of it.
        size: (height, width) of the picture.
        aspect: see ``Turn.matrix``.

    Returns:
        (height, width, 3) uint8, grey where the mosaic does not reach, and the labels in fractions of it; those of
        which nearly nothing is left are dropped. Where ``cut`` is set, box and area are for ``tighten`` to measure.
    """
    rows, columns = turn.quarter(size)
    whole = (2 * rows, 2 * columns)
    canvas = np.full((*whole, 3), FILL, dtype=np.uint8)
    quarters: list[PixelRect] = [(x, y, x + columns, y + rows) for y in (0, rows) for x in (0, columns)]
    placed = []
    for (image, labels), window in zip(pictures, quarters, strict=True):
        placement = fit(WHOLE, (image.shape[0], image.shape[1]), window, whole)
        assert placement is not None
        canvas = paint(image, placement, canvas)
        placed.append(place(labels, placement, window))
    matrix = turn.matrix(size, aspect)
    return _warp(canvas, matrix, size, FILL), _turn_labels(join_labels(placed), matrix, whole, size)


def _warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """An image, or the (H, W) of a mask, at its new place."""
    middle = np.full(2, 0.5)  # OpenCV has the middles of pixels at whole numbers
    moved = np.column_stack((matrix[:, :2], matrix[:, :2] @ middle + matrix[:, 2] - middle))
    return cv2.warpAffine(image, moved, size[::-1], flags=cv2.INTER_LINEAR, borderValue=(fill,) * 3)


def _turn_labels(
    labels: PictureLabels, matrix: np.ndarray, whole: tuple[int, int], size: tuple[int, int]
) -> PictureLabels:
    """Labels in fractions of the mosaic (``whole``) as labels in fractions of the picture."""
    sides = np.array(size[::-1])
    turn, shift = matrix[:, :2] * whole[::-1] / sides[:, None], matrix[:, 2] / sides
    outlines, extents = _turn_outlines(labels, turn, shift, matrix, whole, size)
    boxes = np.where(np.isnan(extents), _turn_boxes(labels.boxes, turn, shift), extents)
    clipped = boxes.clip(0, 1)
    visible = _areas(clipped) / np.maximum(_areas(boxes), 1e-12)
    keypoints = labels.keypoints
    if keypoints is not None:
        points = keypoints[..., :2] @ turn.T + shift
        keypoints = np.concatenate((points, keypoints[..., 2:]), axis=-1)
        inside = ((points >= 0) & (points <= 1)).all(axis=-1)
        keypoints[~inside | (keypoints[..., 2] <= 0)] = 0
    count = len(labels)
    drawn = np.zeros(count, dtype=bool)
    if outlines is not None:
        drawn[:] = [isinstance(outline, dict) for outline in outlines]
    moved = replace(
        labels,
        boxes=clipped,
        areas=labels.areas * abs(np.linalg.det(turn)) * visible,
        outlines=outlines,
        keypoints=keypoints,
        cut=drawn | (visible < 1 - 1e-6),
        windows=np.tile(np.array(WHOLE), (count, 1)),
        scale=np.ones((count, 2)),
        offset=np.zeros((count, 2)),
    )
    return moved[stays_labelled(visible, clipped, np.array(WHOLE))]


def _turn_outlines(
    labels: PictureLabels,
    turn: np.ndarray,
    shift: np.ndarray,
    matrix: np.ndarray,
    whole: tuple[int, int],
    size: tuple[int, int],
) -> tuple[np.ndarray | None, np.ndarray]:
    """The outlines in fractions of the picture, and the boxes around them, (N, 4) xyxy, NaN for objects without one.

    Run lengths are drawn and turned as pixels, and so are the polygons that reach over the border of their own image:
    they would lie on the image beside it. Their boxes are those around the turned ones, for ``tighten`` to measure.
    """
    extents = np.full((len(labels), 4), np.nan)
    if labels.outlines is None:
        return None, extents
    outlines = np.empty(len(labels), dtype=object)
    for index, outline in enumerate(labels.outlines):
        if outline is None:
            continue
        scale, offset = labels.scale[index], labels.offset[index]
        if isinstance(outline, dict) or any(part.min() < -OUTSIDE or part.max() > 1 + OUTSIDE for part in outline):
            window = (labels.windows[index] * (*whole[::-1], *whole[::-1])).round().astype(int).tolist()
            mask = rasterise(outline, scale, offset, tuple(window), whole)
            outlines[index] = encode_mask(_warp(mask * np.uint8(255), matrix, size, 0) > 127)
            points = labels.boxes[index][[[0, 1], [2, 1], [0, 3], [2, 3]]] @ turn.T + shift
        else:
            outlines[index] = [(part * scale + offset) @ turn.T + shift for part in outline]
            points = np.concatenate(outlines[index])
        extents[index] = (*points.min(axis=0), *points.max(axis=0))
    return outlines, extents


def _turn_boxes(boxes: np.ndarray, turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy of the ellipses in the boxes after the turn.

    The turned corners of a box lie far outside of most objects; the ellipse in it is nearer to their true extent
    (Kalra et al., "Towards Rotation Invariance in Object Detection", ICCV 2021).
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 @ turn.T + shift
    halves = np.sqrt(((boxes[:, 2:] - boxes[:, :2]) / 2) ** 2 @ (turn**2).T)
    return np.concatenate((centres - halves, centres + halves), axis=1)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)

"""Turned pictures: where pixels and labels of every kind lie after a turn, for mosaics and for single images.

A turn is a (2, 3) matrix from pixels of a raster to pixels of the picture, corners of pixels at whole numbers. Changes
of size come before it, with the image's only other resampling, so that nothing is made smaller without being averaged.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from mvision.data.augment.geometry import PixelRect, Placement, Rect, fit, stays_labelled
from mvision.data.formats.labels import WHOLE, PictureLabels
from mvision.data.formats.segmentation import Outline, RunLengths, rasterise
from mvision.structures.masks import encode_mask

OUTSIDE = 1e-3  # of the image's sides: outlines that reach further over its border are drawn to be turned


def rotation(angle: float, size: tuple[int, int], aspect: float) -> np.ndarray:
    """(2, 2) from pixels to pixels of a picture.

    Args:
        angle: in radians, clockwise.
        size: (height, width) of the picture.
        aspect: width by height of what the picture shows before it is stretched: there an angle is an angle.
    """
    height, width = size
    stretch = width / (aspect * height)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin * stretch], [sin / stretch, cos]])


def turned_view(
    view: Rect, angle: float, aspect: float, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Placement, np.ndarray] | None:
    """How a view of an image is turned about its middle; the corners that this empties show what is beside the view.

    Args:
        view: in fractions of the image.
        angle: in radians, clockwise.
        aspect: width by height of the view.
        image_size, size: (height, width) of the image and of the picture.

    Returns:
        The part of the image that the picture can show on a raster of its own, which it fills, and the turn of that
        raster; None where the picture shows nothing of the image.
    """
    sides = np.array(size[::-1], dtype=np.float64)
    turn = rotation(angle, size, aspect)
    # The picture's corners, turned back: they bound what can be seen.
    reach = np.abs(np.linalg.inv(turn)) @ sides / sides
    low, high = np.array(view[:2]), np.array(view[2:])
    middle, halves = (low + high) / 2, (high - low) / 2 * reach
    begin, end = (middle - halves).clip(0, 1), (middle + halves).clip(0, 1)
    if (end <= begin).any():
        return None
    pixels = sides / (high - low)  # of the picture, for each of the image's sides
    columns, rows = np.maximum(((end - begin) * pixels).round().astype(int), 1).tolist()
    placement = fit((*begin.tolist(), *end.tolist()), image_size, (0, 0, columns, rows), (rows, columns))
    assert placement is not None
    # The middle of the view, in pixels of the raster, comes to the middle of the picture.
    centre = (middle * placement.scale + placement.offset) * (columns, rows)
    return placement, np.column_stack((turn, sides / 2 - turn @ centre))


def warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """An image, or the (H, W) of a mask, at its new place."""
    middle = np.full(2, 0.5)  # OpenCV has the middles of pixels at whole numbers
    moved = np.column_stack((matrix[:, :2], matrix[:, :2] @ middle + matrix[:, 2] - middle))
    return cv2.warpAffine(image, moved, size[::-1], flags=cv2.INTER_LINEAR, borderValue=(fill,) * 3)


def turn_placed(
    labels: PictureLabels, placement: Placement, matrix: np.ndarray, size: tuple[int, int]
) -> PictureLabels:
    """Labels of an image, as they are in a picture that ``turned_view`` describes; boxes reach around keypoints.

    Args:
        labels: in fractions of the image.
        placement, matrix: from ``turned_view``.
        size: (height, width) of the picture.
    """
    raster = np.array(placement.canvas_size[::-1])
    whole = np.maximum((raster * placement.scale).round(), 1).astype(int)  # the image, as large as on the raster
    linear = matrix[:, :2] * (raster * placement.scale / whole)
    shift = matrix[:, :2] @ (raster * placement.offset) + matrix[:, 2]
    return turn_labels(
        labels, np.column_stack((linear, shift)), (int(whole[1]), int(whole[0])), size, around_points=True
    )


def turn_labels(
    labels: PictureLabels,
    matrix: np.ndarray,
    whole: tuple[int, int],
    size: tuple[int, int],
    around_points: bool = False,
) -> PictureLabels:
    """Labels in fractions of a raster as labels in fractions of the picture that the turned raster gives.

    Args:
        labels: of objects that may be cut already.
        matrix: (2, 3) from pixels of the raster to pixels of the picture.
        whole, size: (height, width) of the raster and of the picture.
        around_points: let the box of an object without outline follow its keypoints, see ``turn_boxes``.

    Returns:
        Those of which enough is left. Where ``cut`` is set, box and area are for ``tighten`` to measure.
    """
    sides = np.array(size[::-1])
    turn, shift = matrix[:, :2] * whole[::-1] / sides[:, None], matrix[:, 2] / sides
    keypoints = labels.keypoints
    estimated = turn_boxes(labels.boxes, turn, shift, keypoints if around_points else None)
    moved, extents = _turn_outlines(labels, turn, shift, matrix, whole, size)
    boxes = np.where(np.isnan(extents), estimated, extents)
    clipped = boxes.clip(0, 1)
    visible = _areas(clipped) / np.maximum(_areas(boxes), 1e-12)
    if keypoints is not None:
        points = keypoints[..., :2] @ turn.T + shift
        keypoints = np.concatenate((points, keypoints[..., 2:]), axis=-1)
        inside = ((points >= 0) & (points <= 1)).all(axis=-1)
        keypoints[~inside | (keypoints[..., 2] <= 0)] = 0
    moved = replace(
        moved,
        boxes=clipped,
        areas=labels.areas * abs(np.linalg.det(turn)) * visible,
        keypoints=keypoints,
        cut=moved.cut | (visible < 1 - 1e-6),
        windows=np.tile(np.array(WHOLE), (len(labels), 1)),
    )
    return moved[stays_labelled(visible, clipped, np.array(WHOLE), moved.crowd)]


def turn_boxes(
    boxes: np.ndarray, turn: np.ndarray, shift: np.ndarray, keypoints: np.ndarray | None = None
) -> np.ndarray:
    """(N, 4) xyxy of the objects in the boxes after the turn, as far as boxes and keypoints can tell.

    The turned corners of a box lie far outside of most objects. The ellipse in the box is nearer to their true extent
    (Kalra et al., "Towards Rotation Invariance in Object Detection", ICCV 2021). Where keypoints are labelled, the
    object is taken to reach as far around all of them as the box does: an ellipse around each, with the mean distances
    of the box's sides from the outermost of them as half axes. Without a keypoint, and for one, that is the ellipse in
    the box; for a long object that lies across its box it is nearer the truth. At 0 and 90 degrees it is the box.

    Args:
        boxes: (N, 4) xyxy.
        turn, shift: (2, 2) and (2,) to the new places.
        keypoints: (N, K, 3) x, y and visibility.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    points = ((low + high) / 2)[:, None]
    if keypoints is not None and keypoints.shape[1]:
        labelled = keypoints[..., 2:] > 0
        points = np.where(labelled, keypoints[..., :2].clip(low[:, None], high[:, None]), points)
        # A keypoint that is not labelled must not count as one in the middle, unless none is.
        first = np.take_along_axis(points, labelled.argmax(axis=1)[:, None], axis=1)
        points = np.where(labelled, points, first)
    before, behind = points.min(axis=1) - low, high - points.max(axis=1)
    halves = np.sqrt(((before + behind) / 2) ** 2 @ (turn**2).T)
    moved = points @ turn.T + shift
    aside = (behind - before) / 2 @ turn.T
    low, high = moved.min(axis=1), moved.max(axis=1)
    if keypoints is None:
        return np.concatenate((low + aside - halves, high + aside + halves), axis=1)
    # The keypoints themselves may lie outside of their ellipses, where the box reaches much further on one side.
    return np.concatenate((np.minimum(low, low + aside - halves), np.maximum(high, high + aside + halves)), axis=1)


def _turn_outlines(
    labels: PictureLabels,
    turn: np.ndarray,
    shift: np.ndarray,
    matrix: np.ndarray,
    whole: tuple[int, int],
    size: tuple[int, int],
) -> tuple[PictureLabels, np.ndarray]:
    """Labels with outlines at their new places, and the boxes around them, (N, 4) xyxy, NaN for objects without one.

    Run lengths are drawn and turned as pixels, and so are the polygons that reach over the border of their own image:
    they would lie on the image beside it. Their boxes are those around the turned ones, for ``tighten`` to measure.
    """
    count = len(labels)
    extents = np.full((count, 4), np.nan)
    scales, offsets, cut = np.ones((count, 2)), np.zeros((count, 2)), np.zeros(count, dtype=bool)
    outlines = None if labels.outlines is None else np.empty(count, dtype=object)
    for index, outline in enumerate(labels.outlines if labels.outlines is not None else ()):
        if outline is None:
            continue
        assert outlines is not None
        scale, offset = labels.scale[index], labels.offset[index]
        if isinstance(outline, dict) or any(part.min() < -OUTSIDE or part.max() > 1 + OUTSIDE for part in outline):
            points = labels.boxes[index][[[0, 1], [2, 1], [0, 3], [2, 3]]] @ turn.T + shift
            window = (labels.windows[index] * (*whole[::-1], *whole[::-1])).round().astype(int).tolist()
            outlines[index], scales[index], offsets[index] = _turn_mask(
                outline, scale, offset, tuple(window), matrix, whole, size
            )
            cut[index] = True
        else:
            outlines[index] = [(part * scale + offset) @ turn.T + shift for part in outline]
            points = np.concatenate(outlines[index])
        extents[index] = (*points.min(axis=0), *points.max(axis=0))
    return replace(labels, outlines=outlines, scale=scales, offset=offsets, cut=cut), extents


def _turn_mask(
    outline: Outline,
    scale: np.ndarray,
    offset: np.ndarray,
    window: PixelRect,
    matrix: np.ndarray,
    whole: tuple[int, int],
    size: tuple[int, int],
) -> tuple[RunLengths, np.ndarray, np.ndarray]:
    """One object's mask, turned: run lengths of the part of the picture that can hold it, and that part's place.

    Of both rasters only the parts with the object are touched, so that a hundred small objects cost next to nothing.

    Returns:
        The run lengths, and the scale and offset of their place, see ``PictureLabels``.
    """
    mask = rasterise(outline, scale, offset, window, whole)
    x, y, columns, rows = cv2.boundingRect(mask)
    # One pixel of zeros around it, so that the edge of the part is no edge of the mask.
    left, top = max(x - 1, 0), max(y - 1, 0)
    part = mask[top : y + rows + 1, left : x + columns + 1]
    corners = (
        np.array([(x, y), (x + columns, y), (x, y + rows), (x + columns, y + rows)]) @ matrix[:, :2].T + matrix[:, 2]
    )
    sides = np.array(size[::-1])
    low = np.floor(corners.min(axis=0) - 1).clip(0, sides - 1).astype(int)
    high = np.maximum(np.ceil(corners.max(axis=0) + 1).clip(0, sides).astype(int), low + 1)
    shift = matrix[:, :2] @ (left, top) + matrix[:, 2] - low
    extent = high - low
    moved = warp(part * np.uint8(255), np.column_stack((matrix[:, :2], shift)), (int(extent[1]), int(extent[0])), 0)
    return encode_mask(moved > 127), extent / sides, low / sides


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)

"""From pixels to COCO annotations."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

# A polygon replaces the run-length mask when it keeps this much of it (IoU) after COCO's own rasterisation.
_POLYGON_IOU = 0.93
_TRACE_SCALE = 4  # outlines are traced on an enlarged mask, so that they run along the pixels' edges


def encode_mask(mask: np.ndarray) -> tuple[list[list[float]] | dict[str, Any], list[float], float]:
    """COCO segmentation, bbox (x, y, w, h) and area of a (H, W) bool mask with at least one pixel.

    A single region without holes becomes a polygon where that is faithful, anything else a compressed RLE. Box and area
    are those of the segmentation as `pycocotools` decodes it, so that the three always agree.
    """
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation: list[list[float]] | dict[str, Any]
    polygon = _trace(mask)
    traced = mask_utils.frPyObjects([polygon], *mask.shape)[0] if polygon else None
    if traced is not None and mask_utils.iou([traced], [rle], [0])[0, 0] >= _POLYGON_IOU:
        assert polygon is not None
        rle, segmentation = traced, [polygon]
    else:
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    return segmentation, [float(v) for v in mask_utils.toBbox(rle)], float(mask_utils.area(rle))


def encode_crowd(mask: np.ndarray) -> tuple[dict[str, Any], list[float], float]:
    """The same for a crowd region: COCO writes these as uncompressed run lengths, in column order, zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat[0]:
        counts = [0, *counts]
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation = {"size": list(mask.shape), "counts": counts}
    return segmentation, [float(v) for v in mask_utils.toBbox(rle)], float(mask_utils.area(rle))


def _trace(mask: np.ndarray) -> list[float] | None:
    """Outline of a mask that is one region without holes, as x0, y0, x1, y1, ...; None for any other mask."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    crop = np.zeros((h + 2, w + 2), np.uint8)
    crop[1:-1, 1:-1] = mask[y : y + h, x : x + w]
    contours, _ = cv2.findContours(crop, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:
        return None
    large = cv2.resize(crop * 255, None, fx=_TRACE_SCALE, fy=_TRACE_SCALE, interpolation=cv2.INTER_LINEAR)
    contours, _ = cv2.findContours((large >= 128).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:
        return None
    outline = cv2.approxPolyDP(contours[0], 0.5 * _TRACE_SCALE, True)[:, 0]
    if len(outline) < 3:
        return None
    # Pixel u of the enlarged, padded crop has its centre at (u + 0.5) / scale - 1 of the crop.
    points = (outline + 0.5) / _TRACE_SCALE - 1 + (x, y)
    points = np.clip(points, 0, (mask.shape[1], mask.shape[0]))
    return [float(v) for v in np.round(points, 1).ravel()]


def encode_keypoints(points: np.ndarray, in_sight: np.ndarray, visible_mask: np.ndarray) -> tuple[list[float], int]:
    """COCO's `keypoints` and `num_keypoints`.

    points: (K, 2) image coordinates. in_sight: (K,) bool, not hidden by the figure itself. visible_mask: (H, W) bool,
    the figure's visible pixels. v is 2 for visible points, 1 for points hidden by the figure or by something else,
    and 0 (with x = y = 0) outside of the image.
    """
    height, width = visible_mask.shape
    values: list[float] = []
    labelled = 0
    for (x, y), seen in zip(np.round(points, 1), in_sight):
        if not (0 <= x < width and 0 <= y < height):
            values += [0, 0, 0]
            continue
        col, row = int(x), int(y)
        near = visible_mask[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
        values += [float(x), float(y), 2 if seen and near.any() else 1]
        labelled += 1
    return values, labelled

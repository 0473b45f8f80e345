"""Geometry of augmentation: a rectangle of an image is stretched onto a rectangle of the picture, and flipped.

Because nothing is rotated, crop, zoom-out, mosaic tile and final resize together are one ``Placement`` per image: the
pixels are resampled once, and boxes, keypoints and outlines follow by a scale and an offset per axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mvision.data.formats.labels import WHOLE, PictureLabels
from mvision.data.formats.segmentation import rasterise
from mvision.structures import Category
from mvision.structures.images import resize_image

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1
PixelRect = tuple[int, int, int, int]

FILL = 114  # grey around a zoomed-out image
MIN_VISIBLE = 0.25  # share of an object's area that has to be left after a cut for it to stay labelled ...
MIN_COVER = 0.1  # ... unless the rest still covers this share of the picture: half a face is a face

NAMED_POINTS = 5  # keypoints that a line names
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # the words of L_Eye, LEye, paw_l and pawR


@dataclass(frozen=True)
class Placement:
    """The ``source`` rectangle of an image (in pixels of it) is stretched onto the ``target`` rectangle of a canvas."""

    source: PixelRect
    target: PixelRect
    image_size: tuple[int, int]
    canvas_size: tuple[int, int]

    @property
    def scale(self) -> np.ndarray:
        """(2,) x, y: fractions of the image to fractions of the canvas, before ``offset`` is added."""
        return (self._target[2:] - self._target[:2]) / (self._source[2:] - self._source[:2])

    @property
    def offset(self) -> np.ndarray:
        """(2,) x, y in fractions of the canvas."""
        return self._target[:2] - self._source[:2] * self.scale

    @property
    def _source(self) -> np.ndarray:
        height, width = self.image_size
        return np.array(self.source) / (width, height, width, height)

    @property
    def _target(self) -> np.ndarray:
        height, width = self.canvas_size
        return np.array(self.target) / (width, height, width, height)


def fit(view: Rect, image_size: tuple[int, int], window: PixelRect, canvas_size: tuple[int, int]) -> Placement | None:
    """Show the ``view`` of an image in a ``window`` of a canvas, on whole pixels of both.

    Args:
        view: in fractions of the image; may reach beyond it, then part of the window stays empty.
        image_size, canvas_size: (height, width) in pixels.
        window: in pixels of the canvas.

    Returns:
        The placement, or None where nothing of the image is in view.
    """
    source, target = [0, 0, 0, 0], [0, 0, 0, 0]
    for axis, extent in ((0, image_size[1]), (1, image_size[0])):
        low, high = view[axis], view[axis + 2]
        begin, end = max(low, 0.0), min(high, 1.0)
        if end <= begin:
            return None
        first = min(int(begin * extent + 0.5), extent - 1)
        last = max(int(end * extent + 0.5), first + 1)
        side = window[axis + 2] - window[axis]
        start = min(int((begin - low) / (high - low) * side + 0.5), side - 1)
        stop = max(int((end - low) / (high - low) * side + 0.5), start + 1)
        source[axis], source[axis + 2] = first, last
        target[axis], target[axis + 2] = window[axis] + start, window[axis] + stop
    return Placement((*source,), (*target,), image_size, canvas_size)  # type: ignore[arg-type]


def paint(image: np.ndarray, placement: Placement, canvas: np.ndarray) -> np.ndarray:
    """Draw the placed part of ``image`` (H, W, 3) on ``canvas``.

    Returns:
        ``canvas``, changed in place, or a new picture where the image covers all of it.
    """
    x0, y0, x1, y1 = placement.source
    left, top, right, bottom = placement.target
    resized = resize_image(image[y0:y1, x0:x1], (bottom - top, right - left))
    if resized.shape == canvas.shape:
        # Without a change of size this is the image itself, which the cache may go on using.
        return resized.copy() if np.may_share_memory(resized, image) else resized
    canvas[top:bottom, left:right] = resized
    return canvas


def place(labels: PictureLabels, placement: Placement, window: PixelRect | None = None) -> PictureLabels:
    """Labels of an image as they are on the canvas, without the objects that are cut to nearly nothing.

    Args:
        window: x0, y0, x1, y1 in pixels of the canvas, in which the image is visible; None: all of the canvas.
    """
    height, width = placement.canvas_size
    bounds = np.array(WHOLE) if window is None else np.array(window) / (width, height, width, height)
    scale, offset = placement.scale, placement.offset
    boxes = labels.boxes * np.tile(scale, 2) + np.tile(offset, 2)
    clipped = np.concatenate((boxes[:, :2].clip(bounds[:2], bounds[2:]), boxes[:, 2:].clip(bounds[:2], bounds[2:])), 1)
    visible = _extent(clipped) / np.maximum(_extent(boxes), 1e-12)
    keypoints = labels.keypoints
    if keypoints is not None:
        keypoints = keypoints.copy()
        points = keypoints[..., :2]
        points *= scale
        points += offset
        inside = ((points >= bounds[:2]) & (points <= bounds[2:])).all(axis=-1)
        keypoints[~inside | (keypoints[..., 2] <= 0)] = 0
    moved = replace(
        labels,
        boxes=clipped,
        areas=labels.areas * scale.prod() * visible,
        cut=labels.cut | (visible < 1 - 1e-6),
        windows=np.tile(bounds, (len(labels), 1)),
        scale=labels.scale * scale,
        offset=labels.offset * scale + offset,
        keypoints=keypoints,
    )
    keep = stays_labelled(visible, clipped, bounds, labels.crowd)
    return moved if keep.all() else moved[keep]


def stays_labelled(
    visible: np.ndarray, clipped: np.ndarray, bounds: np.ndarray, crowd: np.ndarray | None = None
) -> np.ndarray:
    """(N,) bool: whether enough of a cut object is left for it to stay labelled.

    Args:
        visible: (N,) the share of its box that is left.
        clipped: (N, 4) what is left of the box, xyxy.
        bounds: (4,) the picture, or the part of it where the object can be.
        crowd: (N,) bool: crowd regions, of which any part stays: what is in it is not to be learned as background.
    """
    keep = (visible >= MIN_VISIBLE) | (_extent(clipped) >= MIN_COVER * (bounds[2:] - bounds[:2]).prod())
    return keep if crowd is None else keep | (crowd & (visible > 0))


def flip(labels: PictureLabels, axis: int, swap: np.ndarray | None = None) -> PictureLabels:
    """Mirror left-right (axis 0) or up-down (axis 1).

    Args:
        swap: (classes, K) for each class the keypoint that each one becomes in a mirror (see ``mirror_keypoints``).
    """
    low, high = axis, axis + 2
    boxes, windows = labels.boxes.copy(), labels.windows.copy()
    boxes[:, [low, high]] = 1 - labels.boxes[:, [high, low]]
    windows[:, [low, high]] = 1 - labels.windows[:, [high, low]]
    scale, offset = labels.scale.copy(), labels.offset.copy()
    scale[:, axis] *= -1
    offset[:, axis] = 1 - offset[:, axis]
    keypoints = labels.keypoints
    if keypoints is not None:
        keypoints = keypoints.copy()
        keypoints[..., axis] = np.where(keypoints[..., 2] > 0, 1 - keypoints[..., axis], 0)
        if swap is not None and len(labels):
            keypoints = swap_keypoints(keypoints, swap[labels.labels])
    return replace(labels, boxes=boxes, windows=windows, scale=scale, offset=offset, keypoints=keypoints)


def swap_keypoints(keypoints: np.ndarray, swap: np.ndarray) -> np.ndarray:
    """Reorder the keypoints (N, K, 3) of each object by its row of ``swap`` (N, K)."""
    return np.take_along_axis(keypoints, swap[..., None], axis=1)


def mirror_keypoints(categories: Sequence[Category]) -> np.ndarray | None:
    """(classes, K) index of the keypoint that each one becomes in a mirror; None where no class has keypoints.

    From ``Category.flip_pairs``, or where the data set gives none by names such as ``left_eye``, ``L_Eye`` or ``pawR``:
    ``left`` and ``right`` may stand anywhere in the name, ``l`` and ``r`` as a word of it, in any case. A name without
    its counterpart stays.
    """
    count = max((len(category.keypoints) for category in categories), default=0)
    if count == 0:
        return None
    swap = np.tile(np.arange(count), (len(categories), 1))
    for row, category in enumerate(categories):
        if category.flip_pairs is not None:
            for a, b in category.flip_pairs:
                swap[row, [a, b]] = b, a
            continue
        names = [name.lower() for name in category.keypoints]
        for index, name in enumerate(category.keypoints):
            for other in _counterparts(name):
                if other in names:
                    swap[row, index] = names.index(other)
    return swap


def describe_unmirrored(category: Category) -> str | None:
    """A line that says that mirrored pictures exchange no keypoints of a class; None if some are or none shall be."""
    names = category.keypoints
    if len(names) < 2 or category.flip_pairs is not None:
        return None
    swap = mirror_keypoints([category])
    if swap is None or (swap[0] != np.arange(len(names))).any():
        return None
    shown = ", ".join(names[:NAMED_POINTS]) + ", ..." * (len(names) > NAMED_POINTS)
    return (
        f"class '{category.name}': no left and right among its keypoints ({shown}), none are exchanged when a picture "
        "is mirrored; if it has some, give flip_pairs in its category (in YOLO's data.yaml flip_idx)"
    )


def _counterparts(name: str) -> list[str]:
    """In lower case what the mirror image of a keypoint may be called; it may be the name itself."""
    plain = name.lower()
    sides = {"l": "r", "r": "l"}
    by_letter = WORD.sub(lambda word: sides.get(word[0].lower(), word[0]), name).lower()
    others = (by_letter, plain.replace("left", "right"), plain.replace("right", "left"))
    return [other for other in others if other != plain]


def draw_masks(labels: PictureLabels, size: tuple[int, int], chosen: np.ndarray | None = None) -> np.ndarray:
    """(N, height, width) uint8 masks of the objects (or the ``chosen`` ones); zeros where an object has no outline."""
    height, width = size
    indices = np.arange(len(labels)) if chosen is None else np.asarray(chosen)
    masks = np.zeros((len(indices), height, width), dtype=np.uint8)
    for row, index in enumerate(indices):
        outline = None if labels.outlines is None else labels.outlines[index]
        if outline is not None:
            x0, y0, x1, y1 = (labels.windows[index] * (width, height, width, height)).round().astype(int).tolist()
            masks[row] = rasterise(outline, labels.scale[index], labels.offset[index], (x0, y0, x1, y1), size)
    return masks


def tighten(labels: PictureLabels, canvas_size: tuple[int, int]) -> PictureLabels:
    """Boxes and areas of objects that were cut, measured on what is left of their masks.

    Where an arm is cut off, the box is smaller than the clipped one. Objects without a pixel left are dropped.
    """
    if labels.outlines is None or not labels.cut.any():
        return labels
    chosen = np.array([i for i in np.flatnonzero(labels.cut) if labels.outlines[i] is not None], dtype=np.int64)
    height, width = canvas_size
    boxes, areas = labels.boxes.copy(), labels.areas.copy()
    keep = np.ones(len(labels), dtype=bool)
    for index, mask in zip(chosen, draw_masks(labels, canvas_size, chosen)):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows) == 0:
            keep[index] = False
            continue
        extent = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)) / (width, height, width, height)
        boxes[index, :2] = np.maximum(boxes[index, :2], extent[:2])
        boxes[index, 2:] = np.minimum(boxes[index, 2:], extent[2:])
        areas[index] = mask.sum() / mask.size
        keep[index] = bool((boxes[index, 2:] > boxes[index, :2]).all())
    return replace(labels, boxes=boxes, areas=areas)[keep]


def _extent(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)

"""Objects of one image pasted into another: more objects, and the same ones before other backgrounds.

Source: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021.
What a pasted object hides is hidden for the labels below it as well. There, whole images are scaled and lie on each
other; here every object has a place and a size of its own. One without an outline takes along what surrounds it, and
the labels of whatever else is seen there, as in the tile of a mosaic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mvision.data.augment.geometry import PixelRect, Rect, fit, flip, place, stays_labelled
from mvision.data.formats.labels import WHOLE, PictureLabels, join_labels
from mvision.data.formats.segmentation import rasterise
from mvision.structures.images import resize_image
from mvision.structures.masks import encode_mask

MOST = 20  # objects that are pasted; and at most half of the other image's
SCALES = (0.5, 1.5)  # at 1 an object is as large as in its own image
LARGEST = 0.6  # of the picture's sides: more would hide most of the picture
MARGIN = 0.1  # of the sides of a box without an outline: taken along on each side, and fading


@dataclass(frozen=True)
class Patch:
    """A part of an image at its new place.

    Attributes:
        pixels: (h, w, 3) uint8.
        opacity: (h, w) float32, 0..1.
        window: x0, y0, x1, y1 in pixels of the picture.
        labels: the pasted object first; then the others that can be seen in the part.
        cut_out: along the first object's outline.
    """

    pixels: np.ndarray
    opacity: np.ndarray
    window: PixelRect
    labels: PictureLabels
    cut_out: bool


def paste_objects(
    image: np.ndarray,
    labels: PictureLabels,
    other: np.ndarray,
    others: PictureLabels,
    flips: tuple[float, float],
    swap: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, PictureLabels]:
    """Paste some objects of another image.

    Args:
        image: (H, W, 3) uint8 RGB; it is painted on.
        labels: in fractions of it.
        other, others: the other image at any size, and its labels as they were read.
        flips: the probabilities of a pasted object to be mirrored left-right and up-down.
        swap: see ``geometry.mirror_keypoints``.
        rng: the only source of chance.

    Returns:
        The picture and the labels of all that is left visible of its objects. Masks lose the pixels that a pasted
        object hides; boxes and areas follow. Of an object without an outline the box shrinks where a whole strip of it
        is hidden. Hidden keypoints are labelled but not visible (1). Objects of which too little is left are dropped,
        as by ``geometry.place``.
    """
    size = (image.shape[0], image.shape[1])
    top = np.zeros(size, dtype=np.uint8)  # number of the patch that is seen at a pixel, 0 for the picture's own
    layers, numbers, beside = [labels], [0], [np.zeros(len(labels), dtype=bool)]
    for number, row in enumerate(_choose(others, rng), start=1):
        patch = cut_patch(other, others, row, size, tuple(rng.random(2) < flips), swap, rng)
        if not patch.opacity.any():
            continue  # an outline so thin that no pixel's centre is in it
        x0, y0, x1, y1 = patch.window
        below = image[y0:y1, x0:x1]
        if patch.cut_out:
            np.copyto(below, patch.pixels, where=patch.opacity[..., None] > 0)
        else:
            difference = patch.pixels.astype(np.float32) - below
            below[:] = (below + difference * patch.opacity[..., None]).round()
        top[y0:y1, x0:x1][patch.opacity > 0.5] = number
        layers.append(patch.labels)
        numbers.append(number)
        beside.append(np.arange(len(patch.labels)) > (0 if patch.cut_out else len(patch.labels)))
    if len(layers) == 1:
        return image, labels
    layer = np.repeat(numbers, [len(one) for one in layers])
    joined = join_labels(layers)
    if joined.keypoints is not None:
        joined.keypoints = _hidden_keypoints(joined.keypoints, layer, np.concatenate(beside), top)
    return image, _what_is_seen(joined, layer, np.concatenate(beside), top)


def most_pasted(objects: int | np.ndarray) -> int | np.ndarray:
    """How many objects at most are pasted of an image with so many."""
    return np.minimum((objects + 1) // 2, MOST)


def _choose(others: PictureLabels, rng: np.random.Generator) -> list[int]:
    """Rows of the objects to paste: from one to half of all."""
    rows = np.flatnonzero(~others.crowd)
    if not len(rows):
        return []
    count = int(rng.integers(1, most_pasted(len(rows)) + 1))
    return rng.permutation(rows)[:count].tolist()


def cut_patch(
    other: np.ndarray,
    others: PictureLabels,
    row: int,
    size: tuple[int, int],
    mirrored: tuple[bool, ...],
    swap: np.ndarray | None,
    rng: np.random.Generator,
) -> Patch:
    """An object of another image at a random place and size.

    Args:
        other, others: the image and its labels.
        row: of the object.
        size: (height, width) of the picture in pixels.
        mirrored: left-right, up-down.
        swap: see ``geometry.mirror_keypoints``.
    """
    image_size = (other.shape[0], other.shape[1])
    outlines = others.outlines
    cut_out = outlines is not None and outlines[row] is not None
    margin = 0.0 if cut_out else MARGIN
    region = _around(others.boxes[row], margin, image_size)
    inside = ((others.boxes[:, :2] < region[2:]) & (others.boxes[:, 2:] > region[:2])).all(axis=1)
    rows = [row, *(i for i in np.flatnonzero(inside).tolist() if i != row)]
    if outlines is not None and cut_out:  # whether it is in the outline cannot be told of an object that has none
        rows = [i for i in rows if outlines[i] is not None]
    part = others[np.array(rows)]
    for axis in (0, 1):
        if mirrored[axis]:
            part, other = flip(part, axis, swap), np.flip(other, 1 - axis)
    region = _around(part.boxes[0], margin, image_size)
    window = _target(region, size, rng)
    placement = fit(region, image_size, window, size)
    assert placement is not None
    x0, y0, x1, y1 = placement.source
    pixels = resize_image(np.ascontiguousarray(other[y0:y1, x0:x1]), (window[3] - window[1], window[2] - window[0]))
    labels = place(part, placement, window)
    if cut_out:
        opacity = _mask(labels, 0, window, size).astype(np.float32)
    else:
        opacity = _fading(pixels.shape[:2], margin)
    return Patch(pixels, opacity, window, labels, cut_out)


def _around(box: np.ndarray, margin: float, size: tuple[int, int]) -> Rect:
    """The whole pixels of an image (of this height and width) with a box and its margins, in fractions."""
    sides = np.array(size[::-1])
    border = margin * (box[2:] - box[:2])
    low = np.floor((box[:2] - border) * sides).clip(0, sides - 1)
    high = np.maximum(np.ceil((box[2:] + border) * sides).clip(0, sides), low + 1)
    return (*(low / sides).tolist(), *(high / sides).tolist())


def _target(region: Rect, size: tuple[int, int], rng: np.random.Generator) -> PixelRect:
    """Where a part of an image comes to lie, in pixels of the picture: all of it inside."""
    sides = np.array((region[2] - region[0], region[3] - region[1]))
    scale = min(rng.uniform(*SCALES), LARGEST / sides.max())
    columns, rows = np.maximum((sides * scale * size[::-1]).round().astype(int), 1).tolist()
    x, y = rng.integers(size[1] - columns + 1), rng.integers(size[0] - rows + 1)
    return int(x), int(y), int(x) + columns, int(y) + rows


def _fading(size: tuple[int, int], margin: float) -> np.ndarray:
    """(h, w) float32: 1 in the middle, falling to nearly 0 over the margins of a box."""
    ramps = []
    for side in size:
        width = max(side * margin / (1 + 2 * margin), 1.0)
        distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
        ramps.append((distance / width).clip(0, 1).astype(np.float32))
    return np.minimum(ramps[0][:, None], ramps[1][None])


def _what_is_seen(labels: PictureLabels, layer: np.ndarray, beside: np.ndarray, top: np.ndarray) -> PictureLabels:
    """Labels without what lies below other layers, or beside what was cut out.

    Args:
        labels: in fractions of the picture.
        layer: (N,) number of the patch that an object belongs to, 0 for the picture's own.
        beside: (N,) bool: not the object that its patch was cut out along.
        top: (H, W) number of the patch that is seen at a pixel.
    """
    size = (top.shape[0], top.shape[1])
    sides = np.array((size[1], size[0]))
    boxes, areas, shares = labels.boxes.copy(), labels.areas.copy(), np.ones(len(labels))
    outlines = None if labels.outlines is None else labels.outlines.copy()
    scale, offset = labels.scale.copy(), labels.offset.copy()
    low = np.floor(boxes[:, :2] * sides).clip(0, sides - 1).astype(int)
    high = np.maximum(np.ceil(boxes[:, 2:] * sides).clip(0, sides).astype(int), low + 1)
    for index, ((x0, y0), (x1, y1)) in enumerate(zip(low.tolist(), high.tolist())):
        part = top[y0:y1, x0:x1]
        own = part == layer[index] if beside[index] else part <= layer[index]
        if own.all():
            continue
        mask = _mask(labels, index, (x0, y0, x1, y1), size).astype(bool)
        seen = mask & own
        before, after = np.count_nonzero(mask), np.count_nonzero(seen)
        if before == after:
            continue
        shares[index] = after / before
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        if after:
            extent = np.array((x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1)) / np.tile(
                sides, 2
            )
            boxes[index, :2] = np.maximum(boxes[index, :2], extent[:2])
            boxes[index, 2:] = np.minimum(boxes[index, 2:], extent[2:])
        else:
            boxes[index, 2:] = boxes[index, :2]
        areas[index] *= after / before
        if outlines is not None and outlines[index] is not None:
            outlines[index] = encode_mask(seen)
            scale[index], offset[index] = (x1 - x0, y1 - y0) / sides, (x0, y0) / sides
    labels = replace(labels, boxes=boxes, areas=areas, outlines=outlines, scale=scale, offset=offset)
    return labels[stays_labelled(shares, boxes, np.array(WHOLE), labels.crowd)]


def _hidden_keypoints(keypoints: np.ndarray, layer: np.ndarray, beside: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Keypoints below other patches are not visible; those of objects ``beside`` the one cut out may not be there.

    Args:
        keypoints: (N, K, 3) in fractions of the picture.
        layer, beside, top: see ``_what_is_seen``.
    """
    height, width = top.shape
    columns = (keypoints[..., 0] * width).astype(int).clip(0, width - 1)
    rows = (keypoints[..., 1] * height).astype(int).clip(0, height - 1)
    seen, own = top[rows, columns], layer[:, None]
    keypoints = keypoints.copy()
    keypoints[..., 2] = np.where(seen > own, np.minimum(keypoints[..., 2], 1), keypoints[..., 2])
    keypoints[(seen < own) & beside[:, None]] = 0
    return keypoints


def _mask(labels: PictureLabels, row: int, part: PixelRect, size: tuple[int, int]) -> np.ndarray:
    """(h, w) uint8: an object's pixels in a part of the picture; the box where it has no outline."""
    x0, y0, x1, y1 = part
    outline = None if labels.outlines is None else labels.outlines[row]
    if outline is None:
        return np.ones((y1 - y0, x1 - x0), dtype=np.uint8)
    height, width = size
    window = (labels.windows[row] * (width, height, width, height)).round().astype(int).tolist()
    return rasterise(outline, labels.scale[row], labels.offset[row], tuple(window), size)[y0:y1, x0:x1]

"""Pictures of results: boxes, masks and labels through ``supervision``, skeletons with ``cv2``.

Both are imported when a picture is drawn: processes that only load data import ``mvision.structures`` and draw nothing.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mvision.drawing.fonts import label_texts
from mvision.errors import UserError

if TYPE_CHECKING:
    import supervision as sv

Colour = tuple[int, int, int]

COLOURS = 240  # classes with a colour of their own; later ones start again from the first
LEFT, RIGHT, MIDDLE = (0, 200, 110), (255, 140, 0), (60, 150, 255)  # keypoints of the body's left and right, and others
MASK_OPACITY = 0.45
MAX_LABELLED = 0.2  # share of the picture that labels may cover
KEPT_TEXTS = 1000  # of one size; a picture of a text has a kilobyte, on the largest images 30
SUBPIXEL = 4  # fractional bits of the coordinates that cv2 draws with
GAP = 4  # pixels between the pictures of a grid


class Drawable(Protocol):
    """The fields that are read of the instances of one image; ``mvision.structures.Instances`` has all of them."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    categories: Any
    masks: Any
    keypoints: np.ndarray | None
    regions: Any
    tracks: Any

    def __len__(self) -> int: ...

    def resized(self, size: tuple[int, int]) -> Any:
        """The same instances on the image at another size (height, width)."""
        ...


def class_colour(index: int) -> Colour:
    """RGB colour of a class, light enough for black text.

    Steps by the golden angle keep the hues of neighbouring indices far apart.
    """
    saturation, value = ((0.75, 1.0), (0.5, 1.0), (0.6, 0.85))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618033988749895 % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    image: np.ndarray, instances: Drawable, *, scores: bool = True, keypoint_threshold: float = 0.3
) -> np.ndarray:
    """A copy of the image with masks, boxes, skeletons and labels on it.

    Every class has the same colour in all pictures; masks of a single class get a colour each, because they touch each
    other. Objects with a track have its number in front of the label, a colour of their own in all frames, and a line
    where they have been. Labels are moved apart where they would overlap. In dense scenes and on tiny images, only as
    many of the best instances get one as fit on a fifth of the picture.

    Args:
        image: (H, W, 3) uint8 RGB of the size that the instances refer to.
        instances: what to draw, sorted by falling score: the best are drawn on top.
        scores: write the score behind the class name.
        keypoint_threshold: keypoints with a lower score (0..1) are left out, with the lines that end there.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: the image is of another kind.
    """
    import cv2
    import supervision as sv

    _check_kind(image)
    # A copy, with the channels in the order in which supervision writes colours.
    canvas: np.ndarray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    height, width = canvas.shape[:2]
    scale = (max(height, width) / 640) ** 0.8  # lines and text grow with the image, a little slower than it does
    line, thin = max(1, round(2.7 * scale)), max(1, round(1.3 * scale))
    by_class = instances.masks is None or len(instances.categories) > 1
    colours = instances.labels.astype(int) if by_class else np.arange(len(instances))
    if instances.tracks is not None:
        colours = np.where(instances.tracks.ids > 0, instances.tracks.ids, instances.labels).astype(int)
    for areas, of_each in _areas(instances, colours):
        _draw_masks(canvas, areas, of_each, max(1, line - 1))
    limits = np.array([width, height] * 2) - 1
    boxes = instances.boxes.reshape(-1, 4).round().clip(0, limits).astype(int)
    plain = instances.masks is None and instances.keypoints is None
    box_annotator = sv.BoxAnnotator(_palette(), thickness=line if plain else thin)
    box_annotator.annotate(canvas, _best_last(boxes, colours))
    if instances.tracks is not None:
        _draw_trails(canvas, instances.tracks.trails, colours, line)
    if instances.keypoints is not None:
        _draw_skeletons(canvas, instances, scale, keypoint_threshold)
    texts, font = _texts(instances, scores)
    if instances.regions is not None:
        corners = instances.regions.boxes.reshape(-1, 4).round().clip(0, limits).astype(int)
        boxes, colours = (
            np.concatenate((boxes, corners)),
            np.concatenate((colours, instances.regions.labels.astype(int))),
        )
    return _with_labels(canvas, boxes, colours, texts, font, max(10, round(13 * scale)))


def side_by_side(image: np.ndarray, gt: Drawable, pred: Drawable, side: int = 640) -> np.ndarray:
    """Ground truth (left) and prediction (right) of one image, with a caption each.

    Args:
        image: (H, W, 3) uint8 RGB of the size that both refer to.
        gt: the labels, as ``Dataset.truth`` gives them; their scores are not shown.
        pred: the prediction.
        side: the longer side of each half in pixels; small images are enlarged to it so that labels can be read.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    import cv2
    import supervision as sv

    ratio = side / max(image.shape[:2])
    small = cv2.resize(image, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_CUBIC)
    height, width = small.shape[:2]
    halves = []
    for title, instances, scores in (("ground truth", gt, False), ("prediction", pred, True)):
        caption = np.full((max(16, side // 20), width, 3), 255, np.uint8)
        middle = sv.Point(width / 2, caption.shape[0] / 2)
        caption = sv.draw_text(caption, f"{title}: {len(instances)}", middle, text_scale=max(0.4, side / 1000))
        halves.append(
            np.concatenate((caption, draw_instances(small, instances.resized((height, width)), scores=scores)))
        )
    return grid(halves, columns=2)


def grid(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures of any sizes in rows and columns on white, in order, each at the top left of its cell.

    Args:
        images: (h, w, 3) uint8 RGB each, at least one.
        columns: pictures in a row; None makes the whole about as wide as high.

    Returns:
        (H, W, 3) uint8 RGB; all cells have the size of the highest and of the widest picture.
    """
    height, width = np.max([image.shape[:2] for image in images], axis=0).tolist()
    columns = columns or max(1, min(len(images), round(math.sqrt(len(images) * height / width))))
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def _check_kind(image: np.ndarray) -> None:
    """Raise a ``UserError`` unless the image is (H, W, 3) uint8."""
    needed = "draw: an array of shape (H, W, 3) and type uint8, RGB, is needed"
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"{needed}, not a {type(image).__name__}; of a PIL image it is numpy.asarray(image.convert('RGB'))"
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UserError(f"{needed}, not one of shape {image.shape} and type {image.dtype}")


def _areas(instances: Drawable, colours: np.ndarray) -> list[tuple[Any, np.ndarray]]:
    """The masks to draw with a colour for each: regions first, the objects in them on top."""
    regions = instances.regions
    areas = [] if regions is None else [(regions.masks, regions.labels.astype(int))]
    return areas if instances.masks is None else [*areas, (instances.masks, colours)]


def _texts(instances: Drawable, scores: bool) -> tuple[list[str], str]:
    """The labels of the instances and then of the regions, and the font for them."""
    parts = [part for part in (instances, instances.regions) if part is not None]
    names = label_texts([category for part in parts for category in part.categories])
    texts, first = [], 0
    for part in parts:
        texts += [names.texts[first + label] for label in part.labels.tolist()]
        first += len(part.categories)
    if instances.tracks is not None:
        numbers = [f"#{number} " if number > 0 else "" for number in instances.tracks.ids.tolist()]
        texts[: len(numbers)] = [number + text for number, text in zip(numbers, texts)]
    if scores:
        values = [score for part in parts for score in part.scores.tolist()]
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, values)]
    return texts, names.font


@lru_cache(maxsize=1)
def _palette() -> sv.ColorPalette:
    import supervision as sv

    return sv.ColorPalette([sv.Color(*class_colour(index)) for index in range(COLOURS)])


def _best_last(boxes: np.ndarray, colours: np.ndarray) -> sv.Detections:
    """Boxes by rising score, for annotators that draw one after another. The class index stands for the colour."""
    import supervision as sv

    return sv.Detections(boxes[::-1], class_id=colours[::-1])


def _draw_masks(canvas: np.ndarray, masks: Any, colours: np.ndarray, line: int) -> None:
    """Transparent areas, small ones on large ones, and outlines.

    ``CompactMask`` holds the run lengths of each mask's box: 300 masks on 4000 x 3000 need megabytes, not 3.6 GB. Its
    ``from_coco_rle`` takes 0.4 ms a mask on 640 x 480, decoding them one by one 0.15; on 4000 x 3000 it is 0.8 and 5.4.
    """
    import supervision as sv
    from pycocotools import mask as coco_mask

    if not len(masks):
        return
    boxes = np.array([coco_mask.toBbox(rle) for rle in masks.rles])
    boxes[:, 2:] += boxes[:, :2] - 1  # xywh to the first and last pixel
    if math.prod(masks.size) > 2**20:
        compact = sv.CompactMask.from_coco_rle(masks.rles, boxes, masks.size)
    else:
        parts = [sv.CompactMask.from_dense(m[None], box[None], masks.size) for m, box in zip(masks, boxes)]
        compact = sv.CompactMask.merge(parts)
    detections = sv.Detections(boxes, mask=compact, class_id=colours)
    sv.MaskAnnotator(_palette(), MASK_OPACITY).annotate(canvas, detections)
    sv.PolygonAnnotator(_palette(), line).annotate(canvas, detections)


def _draw_trails(canvas: np.ndarray, trails: Sequence[np.ndarray], colours: np.ndarray, line: int) -> None:
    """A line through the places of each track, those of the best instances on top.

    supervision's ``TraceAnnotator`` remembers the places itself, so that it has to be called frame by frame in their
    order; frames are drawn by several threads.
    """
    import cv2

    for trail, colour in reversed(list(zip(trails, colours.tolist()))):
        if len(trail) > 1:
            points = np.round(trail * 2**SUBPIXEL).astype(np.int32)
            cv2.polylines(canvas, [points], False, class_colour(colour % COLOURS)[::-1], line, cv2.LINE_AA, SUBPIXEL)


def _draw_skeletons(canvas: np.ndarray, instances: Drawable, scale: float, threshold: float) -> None:
    """Lines and points, left and right in colours of their own.

    supervision's annotators have one colour and one radius for all, and compare every point with zero by
    ``np.allclose``: 0.75 ms a person, 0.1 ms like this.
    """
    import cv2

    assert instances.keypoints is not None
    for index in reversed(range(len(instances))):
        category = instances.categories[int(instances.labels[index])]
        # Rows are as long as the class with the most keypoints needs; this class may have fewer.
        points = instances.keypoints[index][: len(category.keypoints) or None]
        shown = points[:, 2] >= threshold
        places = np.round(points[:, :2] * 2**SUBPIXEL).astype(int).tolist()
        colours = [_side_colour(name) for name in category.keypoints] or [MIDDLE] * len(points)
        # Points are small on a small object, which would otherwise be hidden below them.
        extent = float(np.ptp(instances.boxes[index].reshape(2, 2), axis=0).max())
        radius = max(1.2, min(3.2 * scale, extent / 24))
        for a, b in category.skeleton:
            if max(a, b) < len(points) and shown[a] and shown[b]:
                colour = colours[a] if colours[a] == colours[b] else MIDDLE
                cv2.line(canvas, places[a], places[b], colour[::-1], max(1, round(radius)), cv2.LINE_AA, SUBPIXEL)
        for place, colour in [row for row, visible in zip(zip(places, colours), shown) if visible]:
            for size, fill in ((radius + 0.8, (255, 255, 255)), (radius, colour[::-1])):
                cv2.circle(canvas, place, round(size * 2**SUBPIXEL), fill, -1, cv2.LINE_AA, SUBPIXEL)


def _side_colour(keypoint: str) -> Colour:
    words = set(re.split(r"[_\s-]+", keypoint.lower()))
    return LEFT if words & {"left", "l"} else RIGHT if words & {"right", "r"} else MIDDLE


@lru_cache(maxsize=4)
def _label_annotator(font: str, size: int) -> sv.RichLabelAnnotator:
    """Writes labels in a font at a size in pixels, and keeps the shapes of the latest ``KEPT_TEXTS``.

    It asks for the extent of a text three times and for its pixels once, in 0.1 ms together, during which no other
    thread runs Python; in a folder of pictures the same texts come again and again.
    """
    import supervision as sv

    annotator = sv.RichLabelAnnotator(
        _palette(),
        text_color=sv.Color.BLACK,
        font_path=font,
        font_size=size,
        text_padding=max(2, size // 4),
        smart_position=True,
    )
    for name in ("getlength", "getbbox", "getmask2"):
        setattr(annotator.font, name, lru_cache(KEPT_TEXTS)(getattr(annotator.font, name)))
    return annotator


def _with_labels(
    canvas: np.ndarray, boxes: np.ndarray, colours: np.ndarray, texts: list[str], font: str, size: int
) -> np.ndarray:
    """(H, W, 3) RGB: the BGR canvas with the labels of the first boxes, as many as ``MAX_LABELLED`` allows."""
    import cv2
    from PIL import Image

    if not texts:
        return cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB)
    annotator = _label_annotator(font, size)
    padding = annotator.text_padding
    areas = [(annotator.font.getlength(text) + 2 * padding) * (size + 2 * padding) for text in texts]
    count = int((np.cumsum(areas) <= MAX_LABELLED * canvas.shape[0] * canvas.shape[1]).sum())
    if not count:
        return cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB)
    # Pillow's pictures have four bytes a pixel: of such an array it needs no copy, neither now nor at the end.
    array = cv2.cvtColor(canvas, cv2.COLOR_BGR2RGBA)
    scene = Image.frombuffer("RGBX", array.shape[1::-1], array, "raw", "RGBX", 0, 1)
    scene.readonly = 0
    annotator.annotate(scene, _best_last(boxes[:count], colours[:count]), texts[:count][::-1])
    return cv2.cvtColor(array, cv2.COLOR_RGBA2RGB)

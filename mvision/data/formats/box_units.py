"""Boxes of a COCO file in another unit than COCO's: all of them together show what one alone does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mvision.data.formats.numbers import numbers, whole_number
from mvision.data.formats.objects import BORDER
from mvision.data.formats.problems import Problems
from mvision.data.formats.records import ImageRecord
from mvision.errors import UserError

IN_FRACTIONS = 1.01  # no box in fractions of its picture ends beyond it; rounding may go over 1
FEW_PIXELS = 8  # in a picture of so few, a box of one pixel is no sign of anything
LEAST_BOXES, OVER = 5, 0.2  # from so many boxes on, and with this share over the border, they can be corners


def refuse_fractions(
    entries: Sequence[tuple[int, int, dict[str, Any]]],
    records: Sequence[ImageRecord],
    broken: Collection[int],
    where: str,
) -> None:
    """Refuse a split whose boxes all lie in the first pixel of their pictures: they are fractions of the sides.

    Args:
        entries: the usable annotations: the position of the image, the label, and the cleaned entry.
        records: the images.
        broken: positions of the images whose size may not be known.
        where: the file, for the message.

    Raises:
        UserError: they are.
    """
    first = None
    for position, _, entry in entries:
        record = records[position]
        if position in broken or min(record.height, record.width) <= FEW_PIXELS:
            continue
        x, y, width, height = entry["bbox"]
        if x + width > IN_FRACTIONS or y + height > IN_FRACTIONS:
            return
        first = first or (entry, record)
    if first is not None:
        entry, record = first
        box = ", ".join(f"{value:.4g}" for value in entry["bbox"])
        raise UserError(
            f"{where}: boxes in fractions of the picture (annotation {entry['id']} of {record.file}: [{box}] on "
            f"{record.width} x {record.height}); COCO wants pixels: multiply x and width by the picture's width, "
            "y and height by its height, and the same for segmentation and keypoints"
        )


def name_corners(
    annotations: Sequence[dict[str, Any]],
    positions: Mapping[int, int],
    records: Sequence[ImageRecord],
    broken: Collection[int],
    problems: Problems,
) -> None:
    """Say it where boxes seem to be x0, y0, x1, y1 rather than x, y, width and height.

    As corners all of them are in order and in the picture, as COCO has them a fifth of them reach over its border.

    Args:
        annotations: those of the file.
        positions: image ids -> position in ``records``.
        records: the images.
        broken: positions of the images whose size may not be known.
        problems: gets it.
    """
    count, over, first = 0, 0, ""
    for annotation in annotations:
        box = numbers(annotation.get("bbox"), 4)
        position = positions.get(whole_number(annotation.get("image_id")))  # type: ignore[arg-type]
        if box is None or position is None or position in broken or not any(box):
            continue
        x0, y0, x1, y1 = box
        height, width = records[position].height, records[position].width
        if not (0 <= x0 < x1 <= width + BORDER and 0 <= y0 < y1 <= height + BORDER):
            return  # in nearly every file one of the first boxes
        count += 1
        over += x0 + x1 > width + BORDER or y0 + y1 > height + BORDER
        first = first or f"{records[position].file}: {annotation['bbox']} on {width} x {height}"
    if count >= LEAST_BOXES and over > OVER * count:
        kind = "boxes that look like corners x0 y0 x1 y1, read as COCO's x y width height: convert them"
        problems.add(kind, f"{count} boxes, {over} of them over the border, such as {first}")

"""Boxes of a COCO file in another unit than COCO's: all of them together show what one alone does not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mvision.data.formats.records import ImageRecord
from mvision.errors import UserError

IN_FRACTIONS = 1.01  # no box in fractions of its picture ends beyond it; rounding may go over 1
FEW_PIXELS = 8  # in a picture of so few, a box of one pixel is no sign of anything


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

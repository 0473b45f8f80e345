"""The lines of YOLO label files: numbers, what they stand for, and what is wrong with them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BOX = 4  # cx, cy, w, h in fractions of the picture's sides
LARGEST = 2.0  # a number above it is a pixel: no box or polygon in fractions reaches as far
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
MAX_NUMBERS = 3000  # of a pose
SAME = 0.98  # share of the lines that have equally many numbers where they are poses
HELD = 0.9  # share of the lines whose points lie in their box where these are poses
TOLERANCE = 0.1  # of a box's size, by which its keypoints may lie outside


class BadLine(ValueError):
    """A line that cannot be used: the kind of fault; ``detail`` belongs to this line alone."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


Row = tuple[int, int, tuple[float, ...]]
"""A line: its number in the file, the class, and the numbers after it. Millions of plain tuples cost the least."""


@dataclass(frozen=True)
class Form:
    """What the numbers after the class stand for in a split.

    Attributes:
        points: keypoints of an object; 0: polygons are allowed instead.
        dims: numbers of a keypoint, 2 or 3.
        confidence: a last number more than there should be is a confidence.
    """

    points: int = 0
    dims: int = 0
    confidence: bool = False

    def without_confidence(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The numbers of box, polygon or pose alone."""
        if self.confidence and not self.fits(len(values)) and self.fits(len(values) - 1):
            return values[:-1]
        return values

    def fits(self, count: int) -> bool:
        """Whether so many numbers are a box, a polygon or a pose."""
        if count == BOX:
            return True
        return count == BOX + self.points * self.dims if self.points else count >= 6 and count % 2 == 0

    def __str__(self) -> str:
        other = f"a pose of {BOX + self.points * self.dims}" if self.points else "a polygon of six or more"
        return f"neither a box of 4 numbers nor {other}"


def parse_line(line: str, number: int, names: dict[int, str]) -> Row:
    """The numbers of a line.

    Raises:
        BadLine: they are none, or the class is no whole number or has no name.
    """
    words = line.split()
    if "_" in line:  # Python's numbers may have underscores
        raise BadLine("numbers expected")
    try:
        label, *values = map(float, words)
    except ValueError as error:
        raise BadLine("numbers expected") from error
    if not (math.isfinite(label) and math.isfinite(sum(values))):
        raise BadLine("a number that is not finite")
    if label not in names:  # 1.0 is the same key as 1
        if not label.is_integer():
            raise BadLine("the class is no whole number")
        numbers = f"class {words[0][:20]}, but names has {len(names)} classes from {min(names)} on"
        raise BadLine("class without a name", numbers)
    return number, int(label), tuple(values)


def check_values(values: tuple[float, ...], form: Form) -> None:
    """Whether the numbers after the class make sense in fractions of a picture.

    Raises:
        BadLine: they do not.
    """
    count = len(values)
    if count == BOX and min(values) >= 0 and max(values) <= LARGEST and values[2] > 0 and values[3] > 0:
        return  # nearly every line
    if not form.fits(count):
        raise BadLine(f"{form}", f"{count} numbers after the class")
    has_box = count == BOX or form.points > 0
    shape = values[:BOX] if has_box else values
    if max(map(abs, shape)) > LARGEST:
        raise BadLine("numbers above 1: pixels? Fractions of the picture's width and height are expected")
    if has_box and (min(shape[2:]) < 0 or (count == BOX and min(shape[2:]) == 0)):
        raise BadLine("width or height is not above 0")


def with_blanks(text: str) -> str:
    """Commas and semicolons between numbers as blanks, commas inside of numbers (``0,5``) as points."""
    lines = []
    for line in text.splitlines():
        words = line.replace(";", " ").split()
        has_decimal = "." not in line and len(words) > BOX and any(map(DECIMAL_COMMA.fullmatch, words))
        lines.append(" ".join(words).replace(",", "." if has_decimal else " "))
    return "\n".join(lines)


def recognise(rows: Iterable[Row], points: int = 0, dims: int = 0) -> Form:
    """What the numbers stand for as far as ``kpt_shape`` says it, and whether they end with confidences."""
    plain, rows = Form(points, dims), list(rows)
    counts = {len(row[2]) for row in rows}
    odd = {count for count in counts if not plain.fits(count) and plain.fits(count - 1)}
    confident = bool(odd) and all(0 <= row[2][-1] <= 1 for row in rows if len(row[2]) in odd)
    return Form(points, dims, confident)


def pose_shape(rows: Sequence[Row]) -> tuple[int, int] | None:
    """[number of keypoints, numbers of a keypoint] of lines that look like poses: a box first, and points in it.

    Lines with as many numbers can be polygons as well. Read as a pose, a polygon's first two points would be a box that
    has to lie in the picture and to hold all its other points; read as a polygon, the width and height of a pose would
    be a point of the outline that lies near the others.

    Returns:
        The shape; (0, 0) for polygons or where there are boxes alone; None where both fit.
    """
    long = [row[2] for row in rows if len(row[2]) > BOX + 1]
    if not long:
        return 0, 0
    count, number = Counter(map(len, long)).most_common(1)[0]
    if number < SAME * len(long) or count > MAX_NUMBERS:
        return 0, 0
    fitting = [values for values in long if len(values) == count]
    # Visibilities of 0, 1 and 2 in every third place are no chance; the box may be a bad one then.
    if (count - BOX) % 3 == 0 and _share_of_poses(fitting, 3) >= HELD / 2:
        return (count - BOX) // 3, 3
    if count % 2 or _share_of_poses(fitting, 2) < HELD:
        return 0, 0
    if sum(map(_is_polygon, fitting)) < 0.5 * len(fitting):
        return (count - BOX) // 2, 2
    return None


def _share_of_poses(lines: Sequence[tuple[float, ...]], dims: int) -> float:
    """The share of poses among the lines with at least one point."""
    fits, known = 0, 0
    for values in lines:
        points = [values[at : at + dims] for at in range(BOX, len(values), dims)]
        if dims == 3 and any(point[2] not in (0.0, 1.0, 2.0) for point in points):
            return 0.0
        seen = [point for point in points if (point[2] > 0 if dims == 3 else any(point))]
        if seen:
            known += 1
            fits += _holds(values[:BOX], seen)
    return fits / known if known else 0.0


def _holds(box: Sequence[float], points: Sequence[Sequence[float]]) -> bool:
    cx, cy, w, h = box
    if min(w, h) < 0 or cx - w / 2 < -0.05 or cy - h / 2 < -0.05 or cx + w / 2 > 1.05 or cy + h / 2 > 1.05:
        return False
    wide, high = w / 2 + TOLERANCE * w + 0.005, h / 2 + TOLERANCE * h + 0.005
    return all(abs(point[0] - cx) <= wide and abs(point[1] - cy) <= high for point in points)


def _is_polygon(values: tuple[float, ...]) -> bool:
    """Whether the second of a polygon's points lies not further from the others than they reach."""
    x = [values[0], *values[4::2]]
    y = [values[1], *values[5::2]]
    return all(
        2 * min(others) - max(others) <= value <= 2 * max(others) - min(others)
        for value, others in ((values[2], x), (values[3], y))
    )


def look_like_corners(boxes: Sequence[tuple[float, ...]]) -> bool:
    """Whether boxes seem to be x0, y0, x1, y1 rather than centre and size.

    As corners all of them are in order and in the picture, as centre and size a fifth of them reach over its border.
    """
    if len(boxes) < 5 or not all(0 <= x0 < x1 <= 1.01 and 0 <= y0 < y1 <= 1.01 for x0, y0, x1, y1 in boxes):
        return False
    over = sum(
        cx - w / 2 < -0.01 or cy - h / 2 < -0.01 or cx + w / 2 > 1.01 or cy + h / 2 > 1.01 for cx, cy, w, h in boxes
    )
    return over > 0.2 * len(boxes)

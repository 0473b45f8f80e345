"""YOLO data sets (``data.yaml`` and one text file per image) to COCO dictionaries, in memory."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mvision.data.formats.problems import Problems
from mvision.data.formats.yolo_lines import (
    BOX,
    BadLine,
    Form,
    Row,
    check_values,
    look_like_corners,
    parse_line,
    pose_shape,
    recognise,
    with_blanks,
)
from mvision.data.formats.yolo_pictures import Folders, Found, LabelFiles, find_pictures, shown
from mvision.data.formats.yolo_yaml import YoloSet, mirrored_pairs, point_names
from mvision.errors import UserError
from mvision.storage.text_files import NotText, decode_text, read_limited
from mvision.structures.images import BadImage, image_size

MAX_LABELS = 64 * 2**20  # bytes of one label file
UNLABELLED = ("test",)  # splits that may have no labels at all
SEARCHED = 1000  # folders in which label files are looked for where they are not expected
SAMPLE = 200  # label files of another split from which its form is recognised


@dataclass
class _Labels:
    """The label files of a split.

    Attributes:
        rows: by picture, the lines of its label file; pictures without one are missing.
        files: by picture, its label file.
        faults: the lines that cannot be used: file and number, the fault, and the line.
        unreadable: pictures whose label file is no text.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, int, BadLine, str]] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)

    def all_rows(self) -> Iterator[Row]:
        """Those of every file."""
        return (row for rows in self.rows.values() for row in rows)


def read_yolo_split(yolo: YoloSet, split: str, problems: Problems) -> dict[str, Any]:
    """One split as a COCO dictionary: boxes, polygons or keypoints, whatever its label files hold.

    An image with an empty label file is an image without objects, and so is one without a label file where others have
    one. Lines that cannot be used are left out and named; the others of the file count.

    Args:
        problems: gets what was left out or mended.

    Raises:
        UserError: no images; not one of them has a label file; not one line of the label files can be used; or it
            cannot be told what the numbers stand for.
    """
    for concerned, kind, place in yolo.notes:
        if concerned == split:
            problems.add(kind, place)
    folders = Folders()
    found = find_pictures(yolo.sources[split], yolo.roots, folders, problems)
    if not found.pictures:
        raise UserError(f"{yolo.file}: no images in {', '.join(map(str, yolo.sources[split]))}{_left_out(problems)}")
    finder = LabelFiles(yolo.roots, folders)
    labels = _read_labels(yolo, found, finder, problems)
    if not labels.files and split not in UNLABELLED:
        raise UserError(_no_labels(yolo, split, found, finder))
    _name_pairs(yolo, found, finder, labels, problems)
    names, form = _form(yolo, split, labels, problems)
    return _as_coco(yolo, split, found, labels, names, form, problems)


def _read_labels(yolo: YoloSet, found: Found, finder: LabelFiles, problems: Problems) -> _Labels:
    labels = _Labels()
    for picture in dict.fromkeys(found.pictures):
        file = finder.find(picture)
        if file is None:
            continue
        labels.files[picture] = file
        if finder.used.setdefault(file, picture) != picture:
            both = f"{shown(finder.used[file], yolo.roots)}, {shown(picture, yolo.roots)}"
            problems.add("images that share a label file: it counts for each", both)
        name = shown(file, yolo.roots)
        try:
            text, encoding = decode_text(read_limited(file, MAX_LABELS))
        except (OSError, NotText) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            problems.add("label file that cannot be read: left out with its image", f"{name}: {reason}")
            labels.unreadable.add(picture)
            continue
        if encoding != "UTF-8":
            problems.add(f"label file in {encoding}: read", name)
        if "," in text or ";" in text:
            problems.add("label file with commas or semicolons between its numbers: read", name)
            text = with_blanks(text)
        labels.rows[picture] = _rows(text, file, name, yolo, labels, problems)
    return labels


def _rows(text: str, file: str, name: str, yolo: YoloSet, labels: _Labels, problems: Problems) -> list[Row]:
    rows: list[Row] = []
    seen: set[tuple[int, tuple[float, ...]]] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line.isspace():
            continue
        try:
            row = parse_line(line, number, yolo.names)
        except BadLine as error:
            labels.faults.append((file, number, error, line))
            continue
        if row[1:] in seen:
            problems.add("label line that repeats another one of its file: merged", f"{name}, line {number}")
            continue
        seen.add(row[1:])
        rows.append(row)
    return rows


def _form(yolo: YoloSet, split: str, labels: _Labels, problems: Problems) -> tuple[list[str], Form]:
    """Names of the keypoints, and what the numbers stand for."""
    if not yolo.find_points:
        return yolo.keypoint_names, recognise(labels.all_rows(), len(yolo.keypoint_names), yolo.keypoint_dims)
    decided, rows = split, list(labels.all_rows())
    shape = pose_shape(rows)
    other = "train" if "train" in yolo.sources else next(iter(yolo.sources))
    if split != other and (shape != (0, 0) or not rows):
        # What a class has must not depend on the split: where there are few lines, train tells more.
        sample = _sample(other, yolo)
        if any(len(row[2]) > BOX for row in sample):
            decided, shape, rows = other, pose_shape(sample), sample
    if shape is None:
        count = next(len(row[2]) for row in rows if len(row[2]) > BOX + 1)
        raise UserError(
            f"{yolo.file}: the {count} numbers after the class in the label files of '{decided}' can be a box and "
            f"{(count - BOX) // 2} points, or a polygon: add kpt_shape: [{(count - BOX) // 2}, 2] for poses, or "
            f"kpt_shape: null for polygons"
        )
    points, dims = shape
    if points:
        kind = f"kpt_shape is missing in data.yaml: taken as [{points}, {dims}] from the label files"
        problems.add(kind, str(yolo.file), "keypoints")
    names = point_names(yolo.described, points, yolo.file) if points else []
    return names, recognise(labels.all_rows(), points, dims)


def _sample(split: str, yolo: YoloSet) -> list[Row]:
    """Lines of some label files of a split."""
    unsaid, folders = Problems(), Folders()
    try:
        pictures = find_pictures(yolo.sources[split], yolo.roots, folders, unsaid).pictures
    except UserError:
        return []  # reported where that split is read
    step = max(len(pictures) // SAMPLE, 1)
    return list(_read_labels(yolo, Found(pictures[::step]), LabelFiles(yolo.roots, folders), unsaid).all_rows())


def _as_coco(
    yolo: YoloSet, split: str, found: Found, labels: _Labels, points: list[str], form: Form, problems: Problems
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    folder = os.path.join(yolo.folders[split], "")  # noqa: PTH118 - texts are several times faster than Path objects
    checked = _checked(labels, form)
    _refuse_or_name(yolo, split, labels, checked, problems)
    boxes = [row[2] for rows in checked.values() for row in rows if len(row[2]) == BOX]
    if look_like_corners(boxes):
        kind = "boxes that look like corners (x0 y0 x1 y1), which are read as centre and size: convert them"
        problems.add(kind, f"{len(boxes)} boxes, such as {' '.join(map(str, boxes[0]))}")
    if form.confidence:
        confident = sum(row[2] != form.without_confidence(row[2]) for row in labels.all_rows())
        example = shown(next(iter(labels.files.values())), yolo.roots)
        problems.add("a number after the last one, taken as a confidence: left out", f"{confident} lines: {example}")
    for picture in found.pictures:
        if picture in labels.unreadable:
            continue
        name = picture[len(folder) :].replace(os.sep, "/")
        record: dict[str, Any] = {"id": len(images) + 1, "file_name": name}
        images.append(record)
        try:
            record["height"], record["width"], _ = image_size(picture)
        except BadImage:
            continue  # kept without a size, so that it is named like those of any other data set
        for row in checked.get(picture, ()):
            annotation = _annotation(row, record, form)
            annotations.append({"id": len(annotations) + 1, "image_id": record["id"], "iscrowd": 0, **annotation})
    extra: dict[str, Any] = {"keypoints": points} if points else {}
    if (pairs := mirrored_pairs(yolo.described, points, yolo.file)) is not None:
        extra["flip_pairs"] = pairs
    categories = [{"id": label, "name": name, **extra} for label, name in yolo.names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _checked(labels: _Labels, form: Form) -> dict[str, list[Row]]:
    """The usable rows by picture, without confidences; the others join the faults."""
    checked: dict[str, list[Row]] = {}
    for picture, rows in labels.rows.items():
        good = checked[picture] = []
        for row in rows:
            line, label, values = row
            if form.confidence:
                values = form.without_confidence(values)
            try:
                check_values(values, form)
            except BadLine as error:
                text = " ".join(map("{:g}".format, (label, *row[2])))
                labels.faults.append((labels.files[picture], line, error, text))
                continue
            good.append((line, label, values))
    return checked


def _refuse_or_name(
    yolo: YoloSet, split: str, labels: _Labels, checked: dict[str, list[Row]], problems: Problems
) -> None:
    """Name the lines that cannot be used; refuse a split in which there are no others."""
    faults = sorted(labels.faults, key=lambda fault: fault[:2])
    used = {row[1] for rows in checked.values() for row in rows}
    _refuse_counting_from_one(yolo, split, faults, used)
    if faults and not used:
        file, number, error, line = faults[0]
        reason = f"{error.detail}: {error.kind}" if error.detail else error.kind
        raise UserError(
            f"{yolo.file}: none of the {len(faults)} lines in the label files of '{split}' can be used; the first: "
            f"{file}, line {number}: {reason} ('{_short(line)}'){_other_shape(yolo, labels)}"
        )
    for file, number, error, line in faults:
        detail = f"{error.detail}: " if error.detail else ""
        place = f"{shown(file, yolo.roots)}, line {number}: {detail}'{_short(line)}'"
        problems.add(f"label line left out: {error.kind}", place)


def _refuse_counting_from_one(yolo: YoloSet, split: str, faults: Sequence[Any], used: set[int]) -> None:
    """Files that number the classes from 1 on would teach every class under the name of the next one."""
    beyond = [fault for fault in faults if fault[2].kind == "class without a name"]
    top = len(yolo.names)
    if not beyond or 0 in used or list(yolo.names) != list(range(top)):
        return
    if all(line.split()[0].split(".")[0] == str(top) for _, _, _, line in beyond):
        file, number, _, _ = beyond[0]
        raise UserError(
            f"{yolo.file}: the label files of '{split}' have classes from {min(used, default=top)} to {top} ({file}, "
            f"line {number}), names counts from 0 to {top - 1}: write names as a mapping from 1 on (1: "
            f"{yolo.names[0]}, ...)"
        )


def _other_shape(yolo: YoloSet, labels: _Labels) -> str:
    """A hint where ``kpt_shape`` contradicts the label files."""
    if not yolo.keypoint_names:
        return ""
    count = len(yolo.keypoint_names)
    numbers = Counter(len(row[2]) for row in labels.all_rows()).most_common(1)
    for dims in (2, 3):
        if numbers and numbers[0][0] == BOX + count * dims:
            return f"; the files fit kpt_shape: [{count}, {dims}]"
    shape = pose_shape(list(labels.all_rows()))
    return f"; the files fit kpt_shape: [{shape[0]}, {shape[1]}]" if shape is not None and shape[0] else ""


def _name_pairs(yolo: YoloSet, found: Found, finder: LabelFiles, labels: _Labels, problems: Problems) -> None:
    """Images without label files, and label files without images."""
    for picture in dict.fromkeys(found.pictures):
        if picture not in labels.files:
            looked = " and ".join(shown(place, yolo.roots) for place in finder.looked_for(picture))
            problems.add(
                "image without a label file: it counts as one without objects",
                f"{shown(picture, yolo.roots)}: looked for {looked}",
            )
    for file in sorted(finder.orphans(found)):
        problems.add("label file without an image: left out", shown(file, yolo.roots))


def _no_labels(yolo: YoloSet, split: str, found: Found, finder: LabelFiles) -> str:
    pictures = list(dict.fromkeys(found.pictures))
    looked = " and ".join(finder.looked_for(pictures[0]))
    name = f"{os.path.splitext(os.path.basename(pictures[0]))[0]}.txt"  # noqa: PTH119, PTH122
    below = itertools.islice(os.walk(yolo.roots[0]), SEARCHED)
    elsewhere = next((os.path.join(place, name) for place, _, files in below if name in files), None)  # noqa: PTH118
    hint = f"; there is {elsewhere}: call its folder labels, where the images have images" if elsewhere else ""
    more = ", ..." if len(pictures) > 1 else ""
    return (
        f"{yolo.file}: 0 of {len(pictures)} images of '{split}' have a label file; looked for {looked}{more}{hint} "
        f"(an image without objects has an empty one)"
    )


def _left_out(problems: Problems) -> str:
    text = str(problems)
    return f" ({text})" if text else ""


def _annotation(row: Row, record: dict[str, Any], form: Form) -> dict[str, Any]:
    _, label, values = row
    width, height = record["width"], record["height"]
    annotation: dict[str, Any] = {"category_id": label}
    if len(values) == BOX or form.points:
        cx, cy, w, h = values[:BOX]
        annotation["bbox"] = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        if len(values) > BOX:
            annotation["keypoints"] = _pixel_keypoints(values[BOX:], form.dims, width, height)
    else:
        annotation["segmentation"] = [[v * (height if i % 2 else width) for i, v in enumerate(values)]]
    return annotation


def _pixel_keypoints(values: Sequence[float], dims: int, width: int, height: int) -> list[float]:
    keypoints: list[float] = []
    for start in range(0, len(values), dims):
        x, y = values[start], values[start + 1]
        # Without a third number, a point at the origin stands for "not labelled".
        visible = values[start + 2] if dims == 3 else (0.0 if x == 0 and y == 0 else 2.0)
        keypoints += [x * width, y * height, visible] if visible > 0 else [0.0, 0.0, 0.0]
    return keypoints


def _short(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= 60 else f"{line[:57]}..."

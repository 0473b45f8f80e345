"""Predictions as a YOLO data set: ``data.yaml``, and a text file of fractions for every picture.

A YOLO data set holds one kind of label: boxes, outlines or poses. Its lines have no room for a score, so what is to be
reviewed is a list of its own.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mvision.data.formats.labelled import LabelledObject, LabelledPicture, Pictures, Request
from mvision.errors import UserError

PICTURES, LABELS = "images", "labels"
SPLIT = "train"
LIST = "review.csv"
DIGITS = 6  # of fractions: a hundredth of a pixel in pictures of 10,000 pixels

NO_MASKS = "masks left out, because a line of YOLO holds a pose or an outline (--task instance-seg writes the masks)"
JOINED = "masks of several parts, which a line of YOLO holds as one outline: joined by lines without width"
NO_POINTS = "objects of classes without keypoints, written with all points not labelled, as poses of YOLO need"


def check_yolo(request: Request) -> None:
    """Raise a ``UserError`` for what a YOLO data set cannot hold."""
    if request.masks == "rle":
        raise UserError("--masks rle: YOLO holds outlines only; leave the option out, or choose another --format")
    lists = {tuple(category.keypoints): category.name for category in request.with_points}
    if len(lists) > 1:
        names = ", ".join(f"'{name}'" for name in lists.values())
        raise UserError(
            f"--format yolo: a YOLO data set has one list of keypoints for all classes, and those of {names} differ; "
            "choose another --format"
        )


def write_yolo(folder: Path, request: Request, pictures: Pictures, notes: Counter[str]) -> None:
    """``data.yaml``, ``labels/``, and ``review.csv``: file, line and score of every object to be reviewed.

    The pictures lie in ``images/train/`` already.
    """
    (folder / "data.yaml").write_text(_description(request), encoding="utf-8")
    made: set[Path] = set()
    with (folder / LIST).open("w", encoding="utf-8", newline="") as file:
        review = csv.writer(file)
        review.writerow(["image", "label_file", "line", "class", "score"])
        for picture in pictures():
            image = f"{PICTURES}/{SPLIT}/{picture.name}"
            path = label_file(image)
            if (parent := (folder / path).parent) not in made:
                parent.mkdir(parents=True, exist_ok=True)
                made.add(parent)
            lines = [_line(one, picture, request, notes) for one in picture.objects]
            (folder / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            for number, one in enumerate(picture.objects, start=1):
                if one.review:
                    review.writerow([image, path, number, request.categories[one.label].name, one.score])


def label_file(image: str) -> str:
    """The label file of a picture: ``labels`` for the last folder called ``images``, as YOLO's tools look for it."""
    head, tail = f"/{image}".rsplit(f"/{PICTURES}/", 1)
    return os.path.splitext(f"{head}/{LABELS}/{tail}")[0].removeprefix("/") + ".txt"  # noqa: PTH122


def _description(request: Request) -> str:
    names = {number: category.name for number, category in enumerate(request.categories)}
    tree: dict[str, Any] = {"train": f"{PICTURES}/{SPLIT}", "names": names}
    if request.with_points:
        category = request.with_points[0]
        tree["kpt_shape"] = [len(category.keypoints), 3]
        tree["flip_idx"] = list(request.mirrored)
        tree["kpt_names"] = list(category.keypoints)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _line(one: LabelledObject, picture: LabelledPicture, request: Request, notes: Counter[str]) -> str:
    x0, y0, x1, y1 = one.box
    values: list[float]
    if request.with_points:
        notes[NO_MASKS] += bool(one.polygons)
        notes[NO_POINTS] += one.points is None
        points = one.points or [[0, 0, 0]] * len(request.with_points[0].keypoints)
        values = _fractions([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], picture)
        for x, y, v in points:
            values += [*_fractions([x, y], picture), int(v)] if v else [0, 0, 0]
    elif request.masks:
        notes[JOINED] += bool(one.polygons and len(one.polygons) > 1)
        values = _fractions(joined(one.polygons) if one.polygons else [x0, y0, x1, y0, x1, y1, x0, y1], picture)
    else:
        values = _fractions([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], picture)
    return " ".join(f"{value:.{DIGITS}g}" for value in (one.label, *values))


def _fractions(values: Sequence[float], picture: LabelledPicture) -> list[float]:
    return [
        min(max(value / (picture.height if index % 2 else picture.width), 0.0), 1.0)
        for index, value in enumerate(values)
    ]


def joined(parts: Sequence[Sequence[float]]) -> list[float]:
    """The parts of an outline as one, by lines that go to and fro between the points that are nearest to each other."""
    whole = np.array(parts[0], dtype=np.float64).reshape(-1, 2)
    for part in parts[1:]:
        other = np.array(part, dtype=np.float64).reshape(-1, 2)
        distances = np.square(whole[:, None] - other[None]).sum(axis=2)
        i, j = divmod(int(distances.argmin()), len(other))
        whole = np.concatenate((whole[: i + 1], other[j:], other[: j + 1], whole[i:]))
    return whole.reshape(-1).tolist()

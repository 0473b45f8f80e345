"""Predictions as COCO files, for CVAT, Label Studio's converter, FiftyOne and others that import COCO.

Beyond COCO an annotation has a ``score``, which FiftyOne takes for the confidence, and ``attributes`` with a mark for
review, which CVAT and FiftyOne read.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvision.data.formats.labelled import LabelledObject, Pictures, Request
from mvision.data.formats.points import describe_keypoints

REVIEW = "review"


def write_coco(folder: Path, request: Request, pictures: Pictures, notes: Counter[str]) -> None:
    """``annotations/instances_train.json`` and, of a model with keypoints, ``person_keypoints_train.json``.

    These are COCO's own names. The second file has the objects of classes with keypoints once more, under the same
    numbers. CVAT and others read keypoints from a file of this name, and want every object in it to have some.
    """
    (folder / "annotations").mkdir()
    _write(folder / "annotations" / "instances_train.json", replace(request, points=False), pictures)
    if request.with_points:
        _write(folder / "annotations" / "person_keypoints_train.json", request, pictures, posed_only=True)


def write_fiftyone(folder: Path, request: Request, pictures: Pictures, notes: Counter[str]) -> None:
    """``labels.json`` beside ``data/``: the COCO form of FiftyOne, which reads ``score`` as the confidence."""
    _write(folder / "labels.json", request, pictures)


def _write(path: Path, request: Request, pictures: Pictures, posed_only: bool = False) -> None:
    """Twice through the pictures, so that memory does not grow with their number.

    Args:
        posed_only: without the classes that have no keypoints, and their objects.
    """
    with_points = {category.name for category in request.with_points}
    categories = [
        {
            "id": category.id,
            "name": category.name,
            "supercategory": "",
            **(describe_keypoints(category) if category.name in with_points else {}),
        }
        for category in request.categories
        if category.name in with_points or not posed_only
    ]
    ids = [category.id for category in request.categories]
    with path.open("w", encoding="utf-8") as file:
        info = {"description": f"predictions of {request.model}", "version": "1.0"}
        file.write(
            f'{{"info": {json.dumps(info)}, "licenses": [], "categories": {json.dumps(categories)},\n"images": ['
        )
        separator = "\n"
        for number, picture in enumerate(pictures(), start=1):
            entry = {"id": number, "file_name": picture.name, "width": picture.width, "height": picture.height}
            file.write(separator + json.dumps(entry))
            separator = ",\n"
        file.write('\n],\n"annotations": [')
        separator, identity = "\n", 0
        for number, picture in enumerate(pictures(), start=1):
            for one in picture.objects:
                identity += 1
                if posed_only and one.points is None:
                    continue
                annotation = {
                    "id": identity,
                    "image_id": number,
                    "category_id": ids[one.label],
                    **_entry(one, request.points),
                }
                file.write(separator + json.dumps(annotation))
                separator = ",\n"
        file.write("\n]}\n")


def _entry(one: LabelledObject, with_points: bool) -> dict[str, Any]:
    x0, y0, x1, y1 = one.box
    entry: dict[str, Any] = {"bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)], "area": one.area, "iscrowd": 0}
    if one.polygons or one.mask:
        entry["segmentation"] = one.polygons or one.mask
    if with_points and one.points is not None:
        # A point that is not labelled has no place in COCO.
        entry["keypoints"] = [value for x, y, v in one.points for value in ((x, y, v) if v else (0, 0, 0))]
        entry["num_keypoints"] = sum(v > 0 for _, _, v in one.points)
    return {**entry, "score": one.score, "attributes": {REVIEW: one.review}}

"""Predictions as tasks of Label Studio, and the labelling interface of a project that takes them.

Parts of one object are nested: the other parts of an outline, and its keypoints, have the first region as their parent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from mvision.data.formats.brush import encode_brush
from mvision.data.formats.cvat_writer import NOT_IN_XML
from mvision.data.formats.labelled import LabelledObject, LabelledPicture, Pictures, Request
from mvision.errors import UserError
from mvision.structures.masks import decode_mask

LOCAL = "/data/local-files/?d=images/"
"""The address of a picture that Label Studio serves itself, where its document root is the folder with ``images``."""
MAX_BYTES = 200 * 10**6  # of one file; Label Studio refuses an upload of more than 250 MB
IMAGE, BOX, POLYGON, BRUSH, POINT = "image", "box", "polygon", "brush", "point"  # names of its tags
KINDS = {BOX: "RectangleLabels", POLYGON: "PolygonLabels", BRUSH: "BrushLabels", POINT: "KeyPointLabels"}
POINT_SIZE = 0.5  # of a keypoint, in per cent of the picture's width


def check_label_studio(request: Request) -> None:
    """Raise a ``UserError`` for names that the labelling interface, which is XML, cannot hold."""
    for name in (*(c.name for c in request.categories), *(p for c in request.with_points for p in c.keypoints)):
        if NOT_IN_XML.search(name):
            raise UserError(f"--format label-studio: {name!r} has a character that XML cannot hold; rename it")


def write_label_studio(folder: Path, request: Request, pictures: Pictures, notes: Counter[str]) -> None:
    """``tasks.json`` (with ``tasks-2.json``, ... where that would be too large), and ``label_config.xml``."""
    (folder / "label_config.xml").write_text(_interface(request), encoding="utf-8")
    tasks = (json.dumps(_task(picture, request)) for picture in pictures())
    task, number = next(tasks, None), 1
    while task is not None:
        name = "tasks.json" if number == 1 else f"tasks-{number}.json"
        with (folder / name).open("w", encoding="ascii") as file:
            separator, written = "[\n", 0
            while task is not None and (not written or written + len(task) < MAX_BYTES):
                written += file.write(separator + task)
                separator, task = ",\n", next(tasks, None)
            file.write("\n]\n")
        number += 1


def point_tags(request: Request) -> dict[str, str]:
    """The name of the tag with the keypoints of each class that has some."""
    return {c.name: f"{POINT}{number or ''}" for number, c in enumerate(request.with_points)}


def _interface(request: Request) -> str:
    lines = ["<View>", f'  <Image name="{IMAGE}" value="$image" zoom="true" zoomControl="true"/>']
    for name in [BOX, *{"polygon": [POLYGON], "rle": [BRUSH]}.get(request.masks, [])]:
        lines.append(f'  <{KINDS[name]} name="{name}" toName="{IMAGE}">')
        lines += [f"    <Label value={quoteattr(category.name)}/>" for category in request.categories]
        lines.append(f"  </{KINDS[name]}>")
    for category, name in zip(request.with_points, point_tags(request).values()):
        lines.append(f'  <{KINDS[POINT]} name="{name}" toName="{IMAGE}">')
        # Label Studio's exports put the points in the order of model_index.
        lines += [
            f'    <Label value={quoteattr(point)} model_index="{number}"/>'
            for number, point in enumerate(category.keypoints)
        ]
        lines.append(f"  </{KINDS[POINT]}>")
    return "\n".join([*lines, "</View>", ""])


def _task(picture: LabelledPicture, request: Request) -> dict[str, Any]:
    regions = [
        region for number, one in enumerate(picture.objects) for region in _regions(number, one, picture, request)
    ]
    prediction: dict[str, Any] = {"model_version": request.model, "result": regions}
    if picture.objects:  # the least certain object decides which pictures come first when they are sorted by it
        prediction["score"] = min(one.score for one in picture.objects)
    address = (request.image_url or LOCAL) + quote(picture.name)
    doubtful = sum(one.review for one in picture.objects)
    return {"data": {"image": address, "review": doubtful}, "predictions": [prediction]}


def _regions(number: int, one: LabelledObject, picture: LabelledPicture, request: Request) -> Iterator[dict[str, Any]]:
    category, first = request.categories[one.label], f"o{number}"
    if one.mask is not None:
        value: dict[str, Any] = {"format": "rle", "rle": encode_brush(decode_mask(one.mask))}
        yield _region(first, BRUSH, BRUSH, value, [category.name], one, picture)
    for part, polygon in enumerate(one.polygons or ()):
        points = [_percent(place, picture) for place in zip(polygon[::2], polygon[1::2])]
        region = _region(first, POLYGON, POLYGON, {"points": points, "closed": True}, [category.name], one, picture)
        yield region if part == 0 else {**region, "id": f"{first}-{part}", "parentID": first}
    if one.mask is None and not one.polygons:
        (x0, y0), (x1, y1) = _percent(one.box[:2], picture), _percent(one.box[2:], picture)
        value = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "rotation": 0}
        yield _region(first, BOX, BOX, value, [category.name], one, picture)
    tag = point_tags(request).get(category.name)
    for index, (x, y, visible) in enumerate(one.points or ()):
        if visible and tag is not None:
            place = dict(zip("xy", _percent((x, y), picture)))
            value = {**place, "width": POINT_SIZE}
            region = _region(f"{first}.{index}", tag, POINT, value, [category.keypoints[index]], one, picture)
            yield {**region, "parentID": first}


def _percent(place: Sequence[float], picture: LabelledPicture) -> list[float]:
    return [min(max(100 * place[0] / picture.width, 0.0), 100.0), min(max(100 * place[1] / picture.height, 0.0), 100.0)]


def _region(
    identity: str,
    tag: str,
    kind: str,
    value: dict[str, Any],
    labels: list[str],
    one: LabelledObject,
    picture: LabelledPicture,
) -> dict[str, Any]:
    labelled = KINDS[kind].lower()
    region: dict[str, Any] = {
        "id": identity,
        "type": labelled,
        "from_name": tag,
        "to_name": IMAGE,
        "original_width": picture.width,
        "original_height": picture.height,
        "image_rotation": 0,
        "score": one.score,
        "value": {**value, labelled: labels},
    }
    return {**region, "meta": {"text": ["review"]}} if one.review else region

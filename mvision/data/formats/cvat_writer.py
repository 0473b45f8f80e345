"""Predictions as "CVAT for images 1.1", and the labels that a CVAT project needs to take them.

The parts of one object have a common group: the parts of its outline, its box and its skeleton. CVAT's own exports join
what has one group and one label.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOBase
from pathlib import Path
from typing import Any
from xml.sax.saxutils import XMLGenerator
from xml.sax.xmlreader import AttributesImpl

import numpy as np

from mvision.data.formats.labelled import LabelledObject, Pictures, Request
from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.masks import RunLengths, decode_mask

POSE = " pose"
"""What a label for skeletons is called after its class: one label of CVAT cannot have boxes and skeletons."""
LONGEST_NAME = 64  # characters; CVAT cuts the rest of a label's name off
REVIEW, SCORE = "review", "score"
NOT_IN_XML = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def check_cvat(request: Request) -> None:
    """Raise a ``UserError`` for names that a label of CVAT cannot have."""
    names = [name for name, _ in _labels(request)]
    points = [point for category in request.with_points for point in category.keypoints]
    for name in (*names, *points):
        if NOT_IN_XML.search(name):
            raise UserError(f"--format cvat: {name!r} has a character that XML cannot hold; rename it")
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"--format cvat: {name!r} has {len(name)} characters, a label of CVAT has {LONGEST_NAME} at most; "
                "rename it"
            )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(
            f"--format cvat: two labels would be called {twice[0]!r}, a class and the skeletons of another; rename it"
        )


def write_cvat(folder: Path, request: Request, pictures: Pictures, notes: Counter[str]) -> None:
    """``annotations.xml``, to be uploaded as annotations, and ``labels.json``, to be pasted as a project's labels."""
    (folder / "labels.json").write_text(json.dumps(_specification(request), indent=1), encoding="utf-8")
    with (folder / "annotations.xml").open("w", encoding="utf-8") as file:
        _Xml(file).write(request, pictures)


def _labels(request: Request) -> list[tuple[str, Category | None]]:
    """The name of every label; of one for skeletons with its class."""
    labels: list[tuple[str, Category | None]] = []
    for category in request.categories:
        labels.append((category.name, None))
        if category in request.with_points:
            labels.append((category.name + POSE, category))
    return labels


def _attributes() -> list[dict[str, Any]]:
    return [
        {"name": REVIEW, "mutable": False, "input_type": "checkbox", "default_value": "false", "values": ["false"]},
        {"name": SCORE, "mutable": False, "input_type": "text", "default_value": "", "values": [""]},
    ]


def _specification(request: Request) -> list[dict[str, Any]]:
    """The labels as CVAT's editor for raw labels takes them."""
    entries: list[dict[str, Any]] = []
    for name, category in _labels(request):
        if category is None:
            entries.append({"name": name, "type": "any", "attributes": _attributes()})
            continue
        parts = [{"name": point, "type": "points", "attributes": []} for point in category.keypoints]
        entries.append(
            {
                "name": name,
                "type": "skeleton",
                "attributes": _attributes(),
                "sublabels": parts,
                "svg": _drawing(category),
            }
        )
    return entries


def _drawing(category: Category) -> str:
    """A skeleton as CVAT's editor draws it: points in a circle, in per cent, and the lines between them."""
    count = len(category.keypoints)
    angles = 2 * np.pi * np.arange(count) / count
    places = np.round(np.stack((50 + 40 * np.sin(angles), 50 - 40 * np.cos(angles)), axis=1), 2).tolist()
    lines = [
        f'<line x1="{places[a][0]}" y1="{places[a][1]}" x2="{places[b][0]}" y2="{places[b][1]}" data-type="edge" '
        f'data-node-from="{a + 1}" data-node-to="{b + 1}"></line>'
        for a, b in category.skeleton
    ]
    # A project is made with the names of the parts; CVAT's exports have them too.
    return "".join(
        [
            *lines,
            *(
                f'<circle r="0.75" cx="{x}" cy="{y}" data-type="element node" data-element-id="{number}" '
                f'data-node-id="{number}" data-label-name="{_escaped(point)}"></circle>'
                for number, ((x, y), point) in enumerate(zip(places, category.keypoints), start=1)
            ),
        ]
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


class _Xml:
    """Writes the elements; of the pictures one is in memory at a time."""

    def __init__(self, file: TextIOBase) -> None:
        self.xml = XMLGenerator(file, "utf-8", short_empty_elements=True)
        self.depth = 0

    @contextmanager
    def element(self, name: str, attributes: dict[str, Any] | None = None, text: str | None = None) -> Iterator[None]:
        self.xml.ignorableWhitespace("\n" + "  " * self.depth)
        self.xml.startElement(name, AttributesImpl({key: str(value) for key, value in (attributes or {}).items()}))
        self.depth += 1
        yield
        self.depth -= 1
        if text is None:
            self.xml.ignorableWhitespace("\n" + "  " * self.depth)
        else:
            self.xml.characters(text)
        self.xml.endElement(name)

    def leaf(self, name: str, text: str, attributes: dict[str, Any] | None = None) -> None:
        with self.element(name, attributes, text):
            pass

    def write(self, request: Request, pictures: Pictures) -> None:
        self.xml.startDocument()
        with self.element("annotations"):
            self.leaf("version", "1.1")
            with self.element("meta"), self.element("task"):
                self.leaf("name", f"predictions of {request.model}")
                with self.element("labels"):
                    self._labels(request)
            for number, picture in enumerate(pictures()):
                attributes = {"id": number, "name": picture.name, "width": picture.width, "height": picture.height}
                with self.element("image", attributes):
                    for group, one in enumerate(picture.objects, start=1):
                        self._object(one, request.categories[one.label], request, group)
        self.xml.endDocument()

    def _labels(self, request: Request) -> None:
        for name, category in _labels(request):
            with self.element("label"):
                self.leaf("name", name)
                self.leaf("type", "any" if category is None else "skeleton")
                with self.element("attributes"):
                    for attribute in _attributes():
                        with self.element("attribute"):
                            self.leaf("name", attribute["name"])
                            self.leaf("mutable", "False")
                            self.leaf("input_type", attribute["input_type"])
                            self.leaf("default_value", attribute["default_value"])
                            self.leaf("values", attribute["default_value"])
                if category is not None:
                    self.leaf("svg", _drawing(category))
            for point in () if category is None else category.keypoints:
                with self.element("label"):
                    self.leaf("name", point)
                    self.leaf("type", "points")
                    self.leaf("attributes", "")
                    self.leaf("parent", name)

    def _object(self, one: LabelledObject, category: Category, request: Request, group: int) -> None:
        has_points = one.points is not None and category in request.with_points
        common: dict[str, Any] = {"label": category.name, "source": "auto", "occluded": 0, "z_order": 0}
        if has_points or (one.polygons and len(one.polygons) > 1):
            common["group_id"] = group
        if one.mask is not None:
            self._shape("mask", {**common, **_mask(one.mask)}, one)
        for polygon in one.polygons or ():
            self._shape("polygon", {**common, "points": _places(polygon)}, one)
        if one.mask is None and not one.polygons:
            x0, y0, x1, y1 = (f"{value:.2f}" for value in one.box)
            self._shape("box", {**common, "xtl": x0, "ytl": y0, "xbr": x1, "ybr": y1}, one)
        if has_points and one.points is not None:
            skeleton = {"label": category.name + POSE, "source": "auto", "z_order": 0, "group_id": group}
            with self.element("skeleton", skeleton):
                for point, (x, y, visible) in zip(category.keypoints, one.points):
                    part = {"label": point, "source": "auto", "occluded": 0, "outside": int(not visible)}
                    self.leaf("points", "", {**part, "points": _places((x, y))})
                self._marks(one)

    def _shape(self, name: str, attributes: dict[str, Any], one: LabelledObject) -> None:
        with self.element(name, attributes):
            self._marks(one)

    def _marks(self, one: LabelledObject) -> None:
        self.leaf("attribute", "true" if one.review else "false", {"name": REVIEW})
        self.leaf("attribute", f"{one.score:.3f}", {"name": SCORE})


def _places(values: Sequence[float]) -> str:
    return ";".join(f"{x:.2f},{y:.2f}" for x, y in zip(values[::2], values[1::2]))


def _mask(mask: RunLengths) -> dict[str, Any]:
    """The pixels of the mask's box, as runs along its rows of outside and inside by turns."""
    pixels = decode_mask(mask)
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    part = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    changes = np.flatnonzero(np.diff(part.ravel(), prepend=False))
    runs = np.diff(np.concatenate(([0], changes, [part.size])))
    height, width = part.shape
    place = {"left": int(columns[0]), "top": int(rows[0]), "width": width, "height": height}
    return {"rle": ", ".join(map(str, runs.tolist())), **place}

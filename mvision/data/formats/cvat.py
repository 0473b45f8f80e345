"""Reading "CVAT for images 1.1": an XML file with the shapes of every picture, as CVAT exports it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError, XMLParser

import numpy as np

from mvision.data.formats.cvat_writer import POSE, REVIEW
from mvision.data.formats.numbers import number, whole_number
from mvision.data.formats.problems import Problems
from mvision.data.formats.split import Split
from mvision.data.formats.split_names import split_of
from mvision.data.formats.tool_shapes import (
    Shape,
    annotation,
    ellipse,
    give_points,
    merge,
    run_lengths,
    too_large,
    turned,
)
from mvision.errors import UserError

READ_AT_ONCE = 2**20  # bytes
SHAPES = frozenset({"box", "polygon", "mask", "skeleton", "ellipse"})
OTHERS = frozenset({"polyline", "points", "cuboid", "tag"})
SUBSET = re.compile(rb"<image\b[^>]*?\bsubset=(?:\"([^\"]*)\"|'([^']*)')")
START = re.compile(rb"\A\s*(?:<\?xml[^>]*>)?\s*(?:<!--.*?-->\s*)*<annotations\b", re.DOTALL)
LINES = re.compile(r"data-node-from=\W*(\d+)\W+data-node-to=\W*(\d+)")


def is_cvat(file: Path) -> bool:
    """Whether an XML file is of this format, by its beginning."""
    try:
        with file.open("rb") as opened:
            return START.match(opened.read(READ_AT_ONCE).removeprefix(b"\xef\xbb\xbf")) is not None
    except OSError:
        return False


def cvat_subsets(file: Path) -> list[str]:
    """The subsets of a project's export, in their order; none in that of a task without one."""
    found: dict[str, None] = {}
    with file.open("rb") as opened:
        rest = b""
        while block := opened.read(READ_AT_ONCE):
            text = rest + block
            for match in SUBSET.finditer(text):
                found.setdefault((match[1] or match[2] or b"").decode("utf-8", "replace"))
            rest = text[text.rfind(b"<") :]
    return [name for name in found if name]


def read_cvat(split: Split, problems: Problems) -> dict[str, Any]:
    """A file as a COCO dictionary; of a project's export with several subsets, those pictures that are the split's.

    Shapes with one group and one label are one object. What has no place in COCO is counted.

    Raises:
        UserError: the file cannot be read, is damaged, or is an export of a video.
    """
    subsets = cvat_subsets(split.annotations) if split.annotations.is_file() else []
    own = {name for name in subsets if (split_of(name) or name) == split.name}
    target = _Target(split, own if len(subsets) > 1 else set(), problems)
    parser = XMLParser(target=target)
    try:
        with split.annotations.open("rb") as file:
            while block := file.read(READ_AT_ONCE):
                parser.feed(block)
        parser.close()
    except OSError as error:
        raise UserError(f"{split.annotations}: cannot be read ({error.strerror})") from error
    except (ParseError, LookupError, ValueError) as error:
        raise UserError(f"{split.annotations}: not valid XML: {error}") from error
    return target.as_coco()


@dataclass
class _Label:
    name: str = ""
    kind: str = ""
    parent: str = ""
    drawing: str = ""


@dataclass
class _Picture:
    entry: dict[str, Any]
    shapes: list[tuple[int, str, Shape]] = field(default_factory=list)  # group, kind, shape


class _Target:
    """Takes the elements one after another; no tree is kept."""

    def __init__(self, split: Split, subsets: set[str], problems: Problems) -> None:
        self.where, self.subsets, self.problems = str(split.annotations), subsets, problems
        self.path: list[str] = []
        self.text: list[str] = []
        self.labels: list[_Label] = []
        self.images: list[dict[str, Any]] = []
        self.found: list[tuple[int, Shape]] = []
        self.picture: _Picture | None = None
        self.shape: dict[str, str] | None = None
        self.points: list[dict[str, str]] = []
        self.in_review = False
        self.review = 0
        self.tracks = 0
        self.points_of: dict[str, dict[str, None]] = {}

    def doctype(self, name: str, identifier: str | None, system: str | None) -> None:
        """Called by the parser."""
        raise UserError(
            f"{self.where}: has a document type, which CVAT never writes and which can hide a lot: remove it"
        )

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Called by the parser."""
        self.text.clear()
        parent = self.path[-1] if self.path else ""
        if not self.path and tag != "annotations":
            raise UserError(f"{self.where}: not CVAT for images: it begins with <{tag}>, not with <annotations>")
        self.path.append(tag)
        if tag == "label" and parent == "labels":
            self.labels.append(_Label())
        elif tag == "image" and parent == "annotations":
            self.picture = self._picture(attributes)
        elif tag == "track" and parent == "annotations":
            self.tracks += 1
        elif self.picture is not None and parent == "image" and tag in SHAPES | OTHERS:
            self.shape, self.points = dict(attributes), []
        elif self.shape is not None and parent == "skeleton" and tag == "points":
            self.points.append(dict(attributes))
        elif tag == "attribute":
            self.in_review = attributes.get("name") == REVIEW

    def data(self, text: str) -> None:
        """Called by the parser."""
        self.text.append(text)

    def end(self, tag: str) -> None:
        """Called by the parser."""
        self.path.pop()
        parent = self.path[-1] if self.path else ""
        text = "".join(self.text).strip()
        self.text.clear()
        if parent == "label" and self.labels:
            key = {"name": "name", "type": "kind", "parent": "parent", "svg": "drawing"}.get(tag)
            if key:
                setattr(self.labels[-1], key, text)
        elif tag == "attribute" and self.in_review and parent in SHAPES:
            self.review += text == "true"
        elif tag == "image" and self.picture is not None and parent == "annotations":
            self._finish(self.picture)
            self.picture = None
        elif self.picture is not None and self.shape is not None and parent == "image":
            self._shape(tag, self.shape, self.picture)
            self.shape = None

    def close(self) -> None:
        """Called by the parser."""

    def _picture(self, attributes: dict[str, str]) -> _Picture | None:
        if self.subsets and attributes.get("subset") not in self.subsets:
            return None
        entry: dict[str, Any] = {"id": len(self.images) + 1, "file_name": attributes.get("name", "")}
        for side in ("width", "height"):
            if (length := whole_number(attributes.get(side))) is not None:
                entry[side] = length
        self.images.append(entry)
        return _Picture(entry)

    def _shape(self, tag: str, attributes: dict[str, str], picture: _Picture) -> None:
        place = f"{picture.entry['file_name']}, {tag} of {attributes.get('label', 'no label')}"
        if tag in OTHERS:
            self.problems.add(f"{tag} of CVAT, which is no box, mask or pose: left out", place)
            return
        shape = Shape(attributes.get("label", ""), place)
        try:
            self._fill(shape, tag, attributes, picture.entry)
        except ValueError as error:
            self.problems.add(f"{tag} that cannot be used: left out", f"{place}: {error}")
            return
        group = whole_number(attributes.get("group_id")) or 0
        shape.alone = not group
        picture.shapes.append((group, tag, shape))

    def _fill(self, shape: Shape, tag: str, attributes: dict[str, str], entry: dict[str, Any]) -> None:
        if tag == "box":
            x0, y0, x1, y1 = (_number(attributes, key) for key in ("xtl", "ytl", "xbr", "ybr"))
            degrees = number(attributes.get("rotation")) or 0.0
            shape.box = [x0, y0, x1, y1]
            if degrees:
                self.problems.add("turned box: the upright box around it is read", shape.place)
                shape.box = turned(x0, y0, x1 - x0, y1 - y0, ((x0 + x1) / 2, (y0 + y1) / 2), degrees)
        elif tag == "polygon":
            shape.polygons = [_places(attributes.get("points", ""))]
        elif tag == "ellipse":
            cx, cy, rx, ry = (_number(attributes, key) for key in ("cx", "cy", "rx", "ry"))
            shape.polygons = [ellipse(cx, cy, rx, ry, number(attributes.get("rotation")) or 0.0)]
        elif tag == "mask":
            shape.mask = run_lengths(_mask(attributes, entry))
        else:
            shape.points = {}
            for point in self.points:
                x, y = _places(point.get("points", ""))[:2]
                visible = 0 if point.get("outside") == "1" else 1 if point.get("occluded") == "1" else 2
                shape.points[point.get("label", "")] = (x, y, visible)

    def _finish(self, picture: _Picture) -> None:
        shapes: list[Shape] = []
        grouped: dict[tuple[int, str], list[tuple[str, Shape]]] = {}
        for group, kind, shape in picture.shapes:
            if kind == "skeleton":
                shape.name = self._class_of(shape.name)
                self.points_of.setdefault(shape.name, {}).update(dict.fromkeys(shape.points or {}))
            if group:
                grouped.setdefault((group, shape.name), []).append((kind, shape))
            else:
                shapes.append(shape)
        for parts in grouped.values():
            kinds = [kind for kind, _ in parts]
            members = [shape for _, shape in parts]
            # Several boxes or poses of a group are several objects that somebody has put together.
            one = all(kinds.count(kind) < 2 for kind in ("box", "skeleton", "mask"))
            shapes += [merge(members)] if one else members
        kind = "skeleton without a group: it belongs to the smallest object of its class around it"
        shapes = give_points(shapes, self.problems, kind)
        self.found += [(picture.entry["id"], shape) for shape in shapes]

    def _class_of(self, label: str) -> str:
        """The class whose skeletons have this label."""
        name = label.removesuffix(POSE)
        return name if name != label and any(other.name == name for other in self.labels) else label

    def _classes(self) -> Iterator[str]:
        """Names of classes: labels of the file, and others that shapes have."""
        for label in self.labels:
            if not label.parent:
                yield self._class_of(label.name) if label.kind == "skeleton" else label.name
        for _, shape in self.found:
            yield shape.name

    def as_coco(self) -> dict[str, Any]:
        """What was read."""
        if self.tracks and not self.images:
            raise UserError(
                f"{self.where}: {self.tracks} tracks of a video, no pictures: export as 'CVAT for images 1.1' instead"
            )
        for _ in range(self.tracks):
            self.problems.add("track of a video: left out", self.where)
        for _ in range(self.review):
            self.problems.add("shape that is still marked for review: read as it is", self.where)
        categories, ids, names = [], {}, {}
        for number_, name in enumerate(dict.fromkeys(self._classes()), start=1):
            ids[name] = number_
            names[name], lines = self._keypoints(name)
            extra = {"keypoints": names[name], "skeleton": lines} if names[name] else {}
            categories.append({"id": number_, "name": name, **extra})
        annotations = [
            {"id": index, **annotation(shape, image, ids[shape.name], names[shape.name])}
            for index, (image, shape) in enumerate(self.found, start=1)
        ]
        return {"images": self.images, "annotations": annotations, "categories": categories}

    def _keypoints(self, name: str) -> tuple[list[str], list[list[int]]]:
        """The keypoints of a class in the order of its skeleton, and the lines between them, counted from 1."""
        for label in self.labels:
            if label.kind == "skeleton" and self._class_of(label.name) == name:
                points = [part.name for part in self.labels if part.parent == label.name]
                lines = [[int(a), int(b)] for a, b in LINES.findall(label.drawing)]
                return points, [pair for pair in lines if max(pair) <= len(points)]
        return list(self.points_of.get(name, {})), []


def _number(attributes: dict[str, str], key: str) -> float:
    found = number(attributes.get(key))
    if found is None:
        raise ValueError(f"{key} is {attributes.get(key)!r:.40}")
    return found


def _places(text: str) -> list[float]:
    """``x,y;x,y`` as a flat list."""
    values = [number(value) for pair in text.split(";") for value in pair.split(",")]
    if not values or len(values) % 2 or None in values:
        raise ValueError(f"points {text!r:.60}")
    return [value for value in values if value is not None]


def _mask(attributes: dict[str, str], entry: dict[str, Any]) -> np.ndarray:
    """(H, W) bool of the whole picture."""
    left, top, width, height = (int(_number(attributes, key)) for key in ("left", "top", "width", "height"))
    sides = entry.get("height"), entry.get("width")
    if None in sides:
        raise ValueError("a mask in a picture without width and height")
    rows, columns = int(sides[0] or 0), int(sides[1] or 0)
    if reason := too_large(entry["file_name"], rows, columns):
        raise ValueError(reason)
    if min(left, top) < 0 or min(width, height) < 1 or left + width > columns or top + height > rows:
        raise ValueError(f"a mask of {width} x {height} at {left}, {top} in a picture of {columns} x {rows}")
    runs = np.fromstring(attributes.get("rle", ""), dtype=np.int64, sep=",")
    if not len(runs) or runs.min() < 0 or runs.max() > width * height or runs.sum() != width * height:
        raise ValueError(f"run lengths that do not add up to {width} x {height} pixels")
    pixels = np.zeros((rows, columns), dtype=bool)
    values = np.arange(len(runs)) % 2 == 1
    pixels[top : top + height, left : left + width] = np.repeat(values, runs).reshape(height, width)
    return pixels

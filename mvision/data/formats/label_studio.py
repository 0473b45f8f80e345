"""Reading Label Studio's JSON: a list of tasks with their annotations, as it exports them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import ParseError, XMLParser

from mvision.data.formats.brush import BadBrush, decode_brush
from mvision.data.formats.numbers import number, whole_number
from mvision.data.formats.problems import Problems
from mvision.data.formats.split import Split
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
from mvision.storage.text_files import NotText, decode_text
from mvision.structures.images import IMAGE_SUFFIXES, BadImage, image_size

SNIFFED = 2**20  # bytes
LIST = re.compile(rb"\A\s*\[\s*\{")
TASK = re.compile(rb'"(annotations|predictions)"\s*:\s*\[')
LISTED = re.compile(rb'"(result|data)"\s*:')
MINIMAL = re.compile(rb'"(rectangle|polygon|brush|keypoint)labels"\s*:')
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts in front of the name of an upload
POINT_TAG = "keypointlabels"


def is_label_studio(file: Path) -> bool:
    """Whether a JSON file is a list of tasks, by its beginning."""
    try:
        with file.open("rb") as opened:
            text = opened.read(SNIFFED).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return False
    if LIST.match(text) is None:
        return False
    return (TASK.search(text) is not None and LISTED.search(text) is not None) or MINIMAL.search(text) is not None


def read_label_studio(split: Split, problems: Problems) -> dict[str, Any]:
    """A file as a COCO dictionary.

    Of several annotations of a task, the last one that was not cancelled is read; tasks without one are not labelled
    and are left out. Where no task has an annotation, the predictions are read. The classes, and the order of their
    keypoints, are those of the labelling interface where its XML lies beside the file.

    Raises:
        UserError: the file is no JSON, or no list of tasks.
    """
    tasks = [task for file in _files(split.annotations) for task in _tasks(file)]
    results = [(task, _result(task, "annotations", problems)) for task in tasks]
    if tasks and not any(result is not None for _, result in results):
        results = [(task, _result(task, "predictions", problems)) for task in tasks]
        problems.add("file without annotations: the predictions in it are read", str(split.annotations))
    reader = _Reader(split, problems)
    for task, result in results:
        if result is None:
            problems.add("task without an annotation, so not labelled: left out", reader.address(task))
        else:
            reader.add(task, result)
    return reader.as_coco()


def _files(file: Path) -> list[Path]:
    """The file, and the further ones that the tasks were too many for: ``tasks-2.json``, ..."""
    more, number_ = [file], 2
    while (further := file.with_name(f"{file.stem}-{number_}.json")).is_file():
        more.append(further)
        number_ += 1
    return more


def _tasks(file: Path) -> list[dict[str, Any]]:
    try:
        tasks = json.loads(decode_text(file.read_bytes())[0])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (NotText, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise UserError(f"{file}: not Label Studio's JSON: a list of tasks is expected")
    for index, task in enumerate(tasks):
        if not isinstance(task.get("data"), dict):
            hint = "; export as JSON, not as JSON-MIN" if any(key.endswith("label") for key in task) else ""
            raise UserError(f"{file}: task no. {index + 1} has no 'data', so it is not Label Studio's JSON{hint}")
    return tasks


def _result(task: dict[str, Any], key: str, problems: Problems) -> list[dict[str, Any]] | None:
    """The regions of a task; None where it has no annotation that counts."""
    entries = task.get(key)
    valid = [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and not entry.get("was_cancelled") and isinstance(entry.get("result"), list)
    ]
    if not valid:
        return None
    if len(valid) > 1:
        problems.add("task with several annotations: the last one is read", f"task {task.get('id')}")
    last = max(
        valid, key=lambda entry: (str(entry.get("updated_at") or entry.get("created_at") or ""), valid.index(entry))
    )
    return [region for region in last["result"] if isinstance(region, dict)]


class _Reader:
    """Collects pictures and objects."""

    def __init__(self, split: Split, problems: Problems) -> None:
        self.split, self.problems = split, problems
        self.files = _Files(split)
        self.classes, self.points_of_tags = _interface(split.annotations.parent)
        self.images: list[dict[str, Any]] = []
        self.found: list[tuple[int, Shape]] = []
        self.points: dict[str, dict[str, None]] = {}

    def address(self, task: dict[str, Any]) -> str:
        """Where the picture of a task is."""
        data = task["data"]
        texts = [value for value in data.values() if isinstance(value, str)]
        pictures = [text for text in texts if Path(_path(text)).suffix.lower() in IMAGE_SUFFIXES]
        given = data.get("image")
        return given if isinstance(given, str) else next(iter([*pictures, *texts]), "")

    def add(self, task: dict[str, Any], result: list[dict[str, Any]]) -> None:
        """Read one task."""
        address = self.address(task)
        if not address:
            self.problems.add("task without a picture: left out", f"task {task.get('id')}")
            return
        name = self.files.find(address)
        entry: dict[str, Any] = {"id": len(self.images) + 1, "file_name": name}
        size = next((size for region in result if (size := _size(region)) is not None), None) or self.files.size(name)
        if size is not None:
            entry["height"], entry["width"] = size
        self.images.append(entry)
        labelled = {region.get("id") for region in result if _labels(region)}
        shapes: dict[str, list[Shape]] = {}
        parents: dict[str, str] = {}
        loose: list[Shape] = []
        for index, region in enumerate(result):
            identity = str(region.get("id", f"no. {index}"))
            if not _labels(region) and region.get("id") in labelled:
                continue  # the shape of a region whose labels are an entry of their own
            shape = self._shape(region, name)
            if shape is None:
                continue
            if region.get("parentID"):
                parents[identity] = str(region["parentID"])
            shapes.setdefault(identity, []).append(shape)
        for identity, parts in shapes.items():
            root, seen = identity, {identity}
            while parents.get(root) in shapes and parents[root] not in seen:
                root = parents[root]
                seen.add(root)
            self._attach(shapes[root][0], parts, loose, root != identity)
        self._finish(entry["id"], loose)

    def _attach(self, root: Shape, parts: list[Shape], loose: list[Shape], nested: bool) -> None:
        """A nested region is a part of its parent if it is a keypoint, or an outline of the same class."""
        for part in parts:
            is_point = part.points is not None
            if not nested or not (is_point or (part.name == root.name and part.box is None)):
                loose.append(part)
                continue
            if is_point:
                part.name = root.name
            whole = merge([root, part])
            root.polygons, root.mask, root.points = whole.polygons, whole.mask, whole.points

    def _finish(self, image: int, shapes: list[Shape]) -> None:
        for shape in shapes:
            if shape.name and shape.points is not None:
                self.points.setdefault(shape.name, {}).update(dict.fromkeys(shape.points))
        free = [shape for shape in shapes if not shape.name]
        owned = [shape for shape in shapes if shape.name]
        for point in free:  # a keypoint that is nested in no region
            for owner in dict.fromkeys(shape.name for shape in owned):
                known = {**self.points.get(owner, {}), **self._tag_points(owner)}
                if point.points is not None and point.points.keys() <= known.keys():
                    point.name = owner
                    kind = "keypoint in no region: it belongs to the smallest object of its class around it"
                    left = give_points([*owned, point], self.problems, kind)
                    if point not in left:
                        break
                    point.name = ""
            else:
                self.problems.add("keypoint in no region, and none of its class around it: left out", point.place)
        self.found += [(image, shape) for shape in owned]

    def _tag_points(self, name: str) -> dict[str, None]:
        """The keypoints of the labelling interface, where a class has some and they are those of one tag."""
        tags = list(self.points_of_tags.values())
        if len(tags) == 1:
            return dict.fromkeys(tags[0])
        own = self.points.get(name, {})
        return next((dict.fromkeys(tag) for tag in tags if own and own.keys() <= set(tag)), {})

    def _shape(self, region: dict[str, Any], name: str) -> Shape | None:
        labels, value, kind = _labels(region), region.get("value"), str(region.get("type", ""))
        place = f"{name}, region {region.get('id')}"
        if not isinstance(value, dict) or not any(key in value for key in ("x", "points", "rle", "radiusX")):
            self.problems.add(f"result of the kind '{kind}', which is no box, mask or keypoint: left out", place)
            return None
        if not labels:
            self.problems.add("region without a label: left out", place)
            return None
        if len(labels) > 1:
            self.problems.add("region with several labels: the first one is read", f"{place}: {', '.join(labels)}")
        size = _size(region)
        try:
            if size is None:
                raise ValueError("without original_width and original_height")
            if number(region.get("image_rotation")):
                raise ValueError("drawn on a picture that was turned in Label Studio")
            return self._filled(Shape(labels[0], place), value, size, kind)
        except (ValueError, TypeError) as error:
            self.problems.add("region that cannot be used: left out", f"{place}: {error}")
            return None

    def _filled(self, shape: Shape, value: dict[str, Any], size: tuple[int, int], kind: str) -> Shape:
        height, width = size
        if "rle" in value:
            if reason := too_large(shape.place, height, width):
                raise ValueError(reason)
            try:
                shape.mask = run_lengths(decode_brush(value["rle"], height, width))
            except BadBrush as error:
                raise ValueError(str(error)) from error
            return shape
        if "points" in value:
            places = [(_number(x) * width / 100, _number(y) * height / 100) for x, y in value["points"]]
            shape.polygons = [[part for place in places for part in place]]
            return shape
        x, y = _number(value.get("x")) * width / 100, _number(value.get("y")) * height / 100
        degrees = number(value.get("rotation")) or 0.0
        if "radiusX" in value:
            rx, ry = _number(value["radiusX"]) * width / 100, _number(value.get("radiusY")) * height / 100
            shape.polygons = [ellipse(x, y, rx, ry, degrees)]
        elif kind == POINT_TAG or "height" not in value:
            shape.points = {shape.name: (x, y, 2)}
            shape.name = ""  # the class is that of the region around it
        else:
            w, h = _number(value.get("width")) * width / 100, _number(value["height"]) * height / 100
            shape.box = [x, y, x + w, y + h]
            if degrees:
                self.problems.add("turned box: the upright box around it is read", shape.place)
                shape.box = turned(x, y, w, h, (x, y), degrees)
        return shape

    def as_coco(self) -> dict[str, Any]:
        """What was read."""
        names = list(dict.fromkeys([*self.classes, *(shape.name for _, shape in self.found)]))
        ids = {name: index for index, name in enumerate(names, start=1)}
        points = {name: self._order(name) for name in names}
        categories = [
            {"id": ids[name], "name": name, **({"keypoints": points[name]} if points[name] else {})} for name in names
        ]
        annotations = [
            {"id": index, **annotation(shape, image, ids[shape.name], points[shape.name])}
            for index, (image, shape) in enumerate(self.found, start=1)
        ]
        return {"images": self.images, "annotations": annotations, "categories": categories}

    def _order(self, name: str) -> list[str]:
        """The keypoints of a class, as the labelling interface orders them, and others behind them."""
        own = self.points.get(name, {})
        listed = self._tag_points(name) if own else {}
        return list({**listed, **own})


class _Files:
    """Finds the pictures of addresses below the folder of the data set."""

    def __init__(self, split: Split) -> None:
        self.root = split.images
        self.names: set[str] = set()
        self.by_base: dict[str, list[str]] = {}
        for folder, below, files in os.walk(self.root):
            below[:] = [name for name in below if not name.startswith(".")]
            for file in files:
                if Path(file).suffix.lower() in IMAGE_SUFFIXES:
                    name = os.path.relpath(Path(folder) / file, self.root).replace(os.sep, "/")
                    self.names.add(name)
                    self.by_base.setdefault(file, []).append(name)

    def find(self, address: str) -> str:
        """The name of a file; the last part of the address where there is none."""
        parts = [part for part in _path(address).replace("\\", "/").split("/") if part not in ("", ".", "..")]
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            if tail in self.names:
                return tail
            if f"images/{tail}" in self.names:
                return f"images/{tail}"
        base = parts[-1] if parts else address
        for name in (base, UPLOADED.sub("", base)):
            if len(found := self.by_base.get(name, [])) == 1:
                return found[0]
        return base

    def size(self, name: str) -> tuple[int, int] | None:
        """Height and width of a picture that is there."""
        try:
            height, width, _ = image_size(self.root / name)
        except BadImage:
            return None
        return height, width


def _path(address: str) -> str:
    """The path in an address: of a file, of a server, or of a folder that Label Studio serves (``?d=``)."""
    parts = urlsplit(address)
    if parts.path.endswith("/local-files/") and (found := parse_qs(parts.query).get("d")):
        return found[0]
    return unquote(parts.path) if parts.scheme or parts.query or "%" in address else address


def _labels(region: dict[str, Any]) -> list[str]:
    value = region.get("value")
    found: Any = next((value[key] for key in value if key.endswith("labels")), []) if isinstance(value, dict) else []
    return [str(label) for label in found] if isinstance(found, list) else []


def _size(region: dict[str, Any]) -> tuple[int, int] | None:
    height, width = whole_number(region.get("original_height")), whole_number(region.get("original_width"))
    return None if height is None or width is None or min(height, width) < 1 else (height, width)


def _number(value: Any) -> float:
    found = number(value)
    if found is None:
        raise ValueError(f"a coordinate is {value!r:.40}")
    return found


class _Tags:
    """Takes the tags of a labelling interface."""

    def __init__(self) -> None:
        self.classes: dict[str, None] = {}
        self.points: dict[str, list[tuple[float, str]]] = {}
        self._tag = self._name = ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Called by the parser."""
        if tag.lower().endswith("labels"):
            self._tag, self._name = tag.lower(), attributes.get("name", "")
        elif tag == "Label" and self._tag == POINT_TAG:
            tags = self.points.setdefault(self._name, [])
            place = number(attributes.get("model_index"))
            tags.append((len(tags) if place is None else place, attributes.get("value", "")))
        elif tag == "Label":
            self.classes.setdefault(attributes.get("value", ""))

    def close(self) -> None:
        """Called by the parser."""


def _interface(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Classes, and the keypoints of every tag in their order, of an XML file in the folder; nothing without one."""
    for file in sorted(folder.glob("*.xml")):
        tags = _Tags()
        parser = XMLParser(target=tags)
        try:
            text = file.read_bytes()
            if not re.match(rb"\s*(<\?xml[^>]*>)?\s*<View\b", text):
                continue
            parser.feed(text)
            parser.close()
        except (OSError, ParseError, ValueError):
            continue
        return list(tags.classes), {
            name: [point for _, point in sorted(points)] for name, points in tags.points.items()
        }
    return [], {}

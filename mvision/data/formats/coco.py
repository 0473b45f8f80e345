"""Reading COCO annotation files: structural mistakes are refused in one line, damaged entries are named and skipped.

Refused (``UserError``): no file, no JSON, no images / annotations / categories, categories without name or id, ids that
occur twice, keypoint sigmas or flip pairs that fit no keypoints, annotations of an unknown image or category, image
files outside the data folder, none of the images found.
Named, counted and skipped (``problems``): boxes without area, outside the image or NaN, unusable segmentations and
keypoints. Image files that do not decode show up when they are read: training replaces and names them, evaluation
leaves them out and names them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvision.data.formats.objects import CleanObject, Objects, clean_object, pack_objects
from mvision.data.formats.points import add_sigmas_and_pairs, describe_keypoints, skeleton
from mvision.data.formats.problems import Problems
from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.images import BadImage, image_size

if TYPE_CHECKING:
    from mvision.data.formats.layouts import Split

FIELDS = frozenset({"boxes", "masks", "keypoints"})
PROBED = 50  # image files that are looked for before a folder is called wrong


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split: the data set's id, the file, and height and width in pixels as the annotations assume."""

    id: int
    file: str
    height: int
    width: int


class CocoSplit:
    """One annotation file, checked.

    Attributes:
        split: where it lies.
        folder: the folder that the records' ``file`` are relative to.
        fields: what was asked for: a subset of ``boxes``, ``masks``, ``keypoints``.
        available: what the annotations offer, whether asked for or not.
        categories: by rising id, gaps or not, or those given; labels are the positions in this list.
        own: those of the file, by rising id.
        records: the images, in the file's order.
        objects: the labelled objects, image by image.
        problems: what was left out or mended.
    """

    def __init__(
        self, split: Split, fields: Iterable[str] = ("boxes",), categories: list[Category] | None = None
    ) -> None:
        """Read and check the file.

        Args:
            split: from ``find_layout(root).split(name)``.
            fields: names of ``Targets`` fields that are needed; masks and keypoints cost time and memory.
            categories: of several data sets, those of this one among them by their names; None: its own.

        Raises:
            UserError: see the module's first lines.
        """
        self.split = split
        self.fields = (frozenset(fields) | {"boxes"}) & FIELDS
        self.problems = Problems()
        where = str(split.annotations)
        raw = split.load()
        self.own = _categories(raw, where)
        self.categories = self.own if categories is None else categories
        self.folder, self.records = _images(raw, split, self.problems)
        kept = self._clean(raw, where)
        self.available = _available(raw, self.categories)
        if {"masks"} <= self.fields & self.available:
            _name_maskless(kept, self.records, self.problems)
        objects: list[list[CleanObject]] = [[] for _ in self.records]
        for position, _, item in kept:
            objects[position].append(item)
        self.objects: Objects = pack_objects(
            objects,
            [(record.height, record.width) for record in self.records],
            self.fields,
            max((len(category.keypoints) for category in self.categories), default=0),
        )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def coco_dict(self) -> dict[str, Any]:
        """The usable part as a COCO dictionary, for evaluation: pixels and ids as in the file, read anew.

        Crowd regions are in it, skipped annotations are not; ``area``, ``iscrowd`` and, with keypoints,
        ``num_keypoints`` are always there.
        """
        raw = self.split.load()
        annotations = []
        used: set[int] = set()
        for position, annotation, item in self._clean(raw, str(self.split.annotations), Problems()):
            annotations.append(self._coco_annotation(position, annotation, item, used))
        return {
            "images": [
                {"id": record.id, "file_name": record.file, "height": record.height, "width": record.width}
                for record in self.records
            ],
            "annotations": annotations,
            "categories": [_coco_category(category) for category in self.categories if self._is_own(category)],
        }

    @property
    def labelled_classes(self) -> np.ndarray | None:
        """(C,) bool: which of the categories this data set has; None where it has all."""
        known = np.array([self._is_own(category) for category in self.categories])
        return None if known.all() else known

    def _is_own(self, category: Category) -> bool:
        return any(category.name == own.name for own in self.own)

    def _clean(
        self, raw: dict[str, Any], where: str, problems: Problems | None = None
    ) -> list[tuple[int, dict[str, Any], CleanObject]]:
        """Usable annotations with the position of their image."""
        problems = self.problems if problems is None else problems
        position_of = {record.id: position for position, record in enumerate(self.records)}
        by_name = {category.name: label for label, category in enumerate(self.categories)}
        label_of = {category.id: by_name[category.name] for category in self.own}
        kept = []
        for number, annotation in enumerate(raw["annotations"]):
            if not isinstance(annotation, dict):
                raise UserError(f"{where}: annotations[{number}] is no object with bbox, image_id and category_id")
            name = f"annotation {annotation.get('id', f'no. {number}')}"
            image_id, category_id = _whole(annotation.get("image_id")), _whole(annotation.get("category_id"))
            position = None if image_id is None else position_of.get(image_id)
            if position is None:
                raise UserError(f"{where}: {name} has image_id {annotation.get('image_id')!r}, which no image has")
            label = None if category_id is None else label_of.get(category_id)
            if label is None:
                known = ", ".join(str(category.id) for category in self.own[:20])
                raise UserError(
                    f"{where}: {name} has category_id {annotation.get('category_id')!r}; the categories are {known}"
                )
            record = self.records[position]
            item = clean_object(
                annotation,
                label,
                self.categories[label],
                (record.height, record.width),
                self.fields,
                problems,
                f"{record.file}, {name}",
            )
            if item is not None:
                kept.append((position, annotation, item))
        return kept

    def _coco_annotation(
        self, position: int, annotation: dict[str, Any], item: CleanObject, used: set[int]
    ) -> dict[str, Any]:
        """One entry for the evaluator. Its id is the file's where that is a number of its own, else a new one."""
        identity = _whole(annotation.get("id"))
        if identity is None or identity in used or identity == 0:  # 0 means "unmatched" inside pycocotools
            identity = max(used, default=0) + 1
        used.add(identity)
        x0, y0, x1, y1 = (float(value) for value in item.box)
        entry: dict[str, Any] = {
            "id": identity,
            "image_id": self.records[position].id,
            "category_id": self.categories[item.label].id,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": item.area,
            "iscrowd": int(item.crowd),
        }
        if item.outline is not None and "masks" in self.fields:
            entry["segmentation"] = (
                {**item.outline, "counts": item.outline["counts"].decode()}
                if isinstance(item.outline, dict)
                else [part.reshape(-1).tolist() for part in item.outline]
            )
        if "keypoints" in self.fields:
            count = len(self.categories[item.label].keypoints)
            points = [0.0] * (3 * count) if item.keypoints is None else item.keypoints.reshape(-1).tolist()
            entry["keypoints"] = points
            entry["num_keypoints"] = sum(1 for visible in points[2::3] if visible > 0)
        return entry


def read_json(path: Path) -> dict[str, Any]:
    """A COCO file as it is, with its three lists there.

    Raises:
        UserError: the file is missing, is no JSON (with line and column) or is no COCO dictionary.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a COCO file: the top level is a {type(raw).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list):
            found = ", ".join(map(str, list(raw)[:10])) or "nothing"
            raise UserError(f"{path}: not a COCO file: no list '{key}' in it (found: {found})")
    return raw


def same_categories(train: CocoSplit, val: CocoSplit) -> None:
    """Labels of both splits have to mean the same.

    Raises:
        UserError: ids or names differ.
    """
    if [(c.id, c.name) for c in train.own] == [(c.id, c.name) for c in val.own]:
        return
    raise UserError(
        f"{val.split.annotations}: its categories differ from those of {train.split.annotations}: "
        f"{_difference(val.own, train.own)}"
    )


def _difference(found: list[Category], expected: list[Category]) -> str:
    left, right = {(c.id, c.name) for c in found}, {(c.id, c.name) for c in expected}
    parts = [
        f"{word} {', '.join(f'{id}:{name}' for id, name in sorted(entries)[:5])}"
        for word, entries in (("only here", left - right), ("only there", right - left))
        if entries
    ]
    return "; ".join(parts)


def _categories(raw: dict[str, Any], where: str) -> list[Category]:
    categories: dict[int, Category] = {}
    for number, entry in enumerate(raw["categories"]):
        identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if identity is None:
            raise UserError(f"{where}: categories[{number}] has no whole number as id: {entry!r}")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: category {identity} has no name")
        if identity in categories:
            raise UserError(f"{where}: category id {identity} occurs twice ('{categories[identity].name}', '{name}')")
        twin = next((known.id for known in categories.values() if known.name == name), None)
        if twin is not None:
            raise UserError(f"{where}: categories {twin} and {identity} are both named '{name}'; rename or merge them")
        keypoints = [str(point) for point in entry.get("keypoints") or []]
        categories[identity] = Category(
            id=identity, name=name, keypoints=keypoints, skeleton=skeleton(entry.get("skeleton"), len(keypoints))
        )
    if not categories:
        raise UserError(f"{where}: no categories: every class needs an entry with id and name")
    _name_unnamed_keypoints(raw, categories)
    add_sigmas_and_pairs(raw, categories, where)
    _drop_roboflow_parent(raw, categories)
    return [categories[identity] for identity in sorted(categories)]


def _name_unnamed_keypoints(raw: dict[str, Any], categories: dict[int, Category]) -> None:
    """Some exporters write keypoints without naming them in the category: they get numbers."""
    unnamed = {identity for identity, category in categories.items() if not category.keypoints}
    for annotation in raw["annotations"]:
        if not unnamed:
            return
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        identity = _whole(annotation.get("category_id")) if points else None
        if identity in unnamed and isinstance(points, list) and len(points) % 3 == 0:
            category = categories[identity]
            names = [f"point_{index}" for index in range(len(points) // 3)]
            categories[identity] = category.model_copy(update={"keypoints": names})
            unnamed.discard(identity)


def _drop_roboflow_parent(raw: dict[str, Any], categories: dict[int, Category]) -> None:
    """Roboflow's exports begin with an unused category 0 that is the parent of all the others; it is no class."""
    parents = {_whole(entry.get("id")): entry.get("supercategory") for entry in raw["categories"]}
    others = [identity for identity in categories if identity != 0]
    if 0 not in categories or parents[0] != "none" or not others:
        return
    if any(parents[identity] != categories[0].name for identity in others):
        return
    if any(isinstance(entry, dict) and _whole(entry.get("category_id")) == 0 for entry in raw["annotations"]):
        return
    del categories[0]


def _images(raw: dict[str, Any], split: Split, problems: Problems) -> tuple[Path, list[ImageRecord]]:
    where = str(split.annotations)
    names: dict[int, str] = {}
    for number, entry in enumerate(raw["images"]):
        identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None:
            raise UserError(f"{where}: images[{number}] has no whole number as id: {entry!r}")
        if identity in names:
            raise UserError(f"{where}: image id {identity} occurs twice ({names[identity]}, {entry.get('file_name')})")
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: image {identity} has no file_name")
        names[identity] = _inside(name.replace("\\", "/"), split, where)
    if not names:
        raise UserError(f"{where}: no images in it")
    folder = _image_folder(split, list(names.values()))
    records = []
    for entry in raw["images"]:
        identity = int(entry["id"])
        height, width = _whole(entry.get("height")), _whole(entry.get("width"))
        if not height or not width or min(height, width) < 1:
            problems.add("image without height and width in the annotations: taken from the file", names[identity])
            try:
                height, width, _ = image_size(folder / names[identity])
            except BadImage as error:
                problems.add("image that cannot be read", f"{names[identity]}: {error.reason}")
                height = width = 1
        records.append(ImageRecord(identity, names[identity], height, width))
    return folder, records


def _inside(name: str, split: Split, where: str) -> str:
    """``name`` relative to the images' folder; nothing outside of it is ever opened."""
    root = os.path.normpath(split.images)
    path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118 - an absolute name has to win here to be refused
    if not path.startswith(root + os.sep):
        raise UserError(f"{where}: file_name '{name}' leaves the folder of the images ({split.images})")
    return os.path.relpath(path, root).replace(os.sep, "/")


def _image_folder(split: Split, names: list[str]) -> Path:
    """``images/`` or, where the files lie one level deeper, ``images/train/``."""
    step = max(len(names) // PROBED, 1)
    for folder in (split.images, split.images / split.name):
        if any((folder / name).is_file() for name in names[::step]):
            return folder
    raise UserError(
        f"{split.annotations}: none of its images is there: looked for {names[0]} and others in {split.images} "
        f"(file_name is relative to that folder)"
    )


def _available(raw: dict[str, Any], categories: list[Category]) -> frozenset[str]:
    available = {"boxes"}
    for annotation in raw["annotations"]:
        if annotation.get("segmentation") and not annotation.get("iscrowd"):
            available.add("masks")
        points = annotation.get("keypoints")
        if isinstance(points, list) and any(points[2::3]) and any(category.keypoints for category in categories):
            available.add("keypoints")
        if len(available) == len(FIELDS):
            break
    return frozenset(available)


def _name_maskless(
    kept: list[tuple[int, dict[str, Any], CleanObject]], records: list[ImageRecord], problems: Problems
) -> None:
    """Objects without an outline in a data set that has outlines: boxes are learned from them, masks are not."""
    for position, annotation, item in kept:
        if item.outline is None and not item.crowd and not annotation.get("segmentation"):
            name = f"{records[position].file}, annotation {annotation.get('id')}"
            problems.add("object without segmentation: no mask is learned from it", name)


def _coco_category(category: Category) -> dict[str, Any]:
    return {"id": category.id, "name": category.name, **describe_keypoints(category)}


def _whole(value: Any) -> int | None:
    """Ids as whole numbers; some files write them as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return None

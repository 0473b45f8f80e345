"""Reading COCO annotation files: structural mistakes are refused in one line, damaged entries are named and skipped.

Refused (``UserError``): no file, no JSON, no images / annotations / categories, categories without name or id, ids that
occur twice, keypoint sigmas or flip pairs that fit no keypoints, annotations of an unknown image or category, image
files outside the data folder, none of the images found.
Named, counted and skipped (``problems``): boxes without area, outside the image or NaN, unusable segmentations and
keypoints. Image files that do not decode show up when they are read: training replaces and names them, evaluation
leaves them out and names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvision.data.formats.categories import category_difference, read_categories, whole_number
from mvision.data.formats.labels import Labels, pack_labels
from mvision.data.formats.objects import clean_annotation, to_json
from mvision.data.formats.points import describe_keypoints
from mvision.data.formats.problems import Problems
from mvision.data.formats.split import FIELDS, Split
from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.images import BadImage, image_size

PROBED = 50  # image files that are looked for before a folder is called wrong


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split: the data set's id, the file, and height and width in pixels as the annotations assume."""

    id: int
    file: str
    height: int
    width: int


class CocoSplit:
    """One annotation file, read and checked once.

    Attributes:
        split: the files.
        folder: the folder that the records' ``file`` are relative to.
        fields: what was asked for: a subset of ``boxes``, ``masks``, ``keypoints``.
        available: what the annotations offer, whether asked for or not.
        categories: by rising id, gaps or not, or those given; labels are the positions in this list.
        own: those of the file, by rising id.
        records: the images, in the file's order.
        labels: the labelled objects, image by image.
        start: (images + 1,) int64: the objects of image i are the rows ``start[i]:start[i + 1]`` of ``labels``.
        problems: what was left out or mended.
    """

    def __init__(
        self,
        split: Split,
        fields: Iterable[str] = ("boxes",),
        categories: list[Category] | None = None,
        keep_annotations: bool = True,
    ) -> None:
        """Read and check the file.

        Args:
            split: from ``find_layout(root).split(name)``.
            fields: names of ``Targets`` fields that are needed; masks and keypoints cost time and memory.
            categories: of several data sets, those of this one among them by their names; None: its own.
            keep_annotations: keep what ``coco_dict`` needs. Training does not, and saves the memory: a second copy of
                every outline and keypoint.

        Raises:
            UserError: see the module's first lines.
        """
        self.split = split
        self.fields = (frozenset(fields) | {"boxes"}) & FIELDS
        self.problems = Problems()
        where = str(split.annotations)
        raw = split.load(self.problems)
        self.own = read_categories(raw, where)
        self.categories = self.own if categories is None else categories
        self.folder, self.records = _images(raw, split, self.problems)
        self.available = _available(raw, self.categories)
        cleaned = list(self._clean(raw, where))
        self._annotations = [entry for _, _, entry in cleaned] if keep_annotations else None
        cleaned.sort(key=lambda item: item[0])  # stable: the objects of an image keep the file's order
        images = [position for position, _, _ in cleaned]
        self.start = np.searchsorted(images, np.arange(len(self.records) + 1)).astype(np.int64)
        self.labels: Labels = pack_labels(
            [entry for _, _, entry in cleaned],
            [label for _, label, _ in cleaned],
            [(self.records[position].height, self.records[position].width) for position in images],
            self.fields,
            max((len(category.keypoints) for category in self.categories), default=0),
        )

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, image: int) -> slice:
        """The rows of ``labels`` that belong to an image, given by its position in ``records``."""
        return slice(int(self.start[image]), int(self.start[image + 1]))

    @property
    def coco_dict(self) -> dict[str, Any]:
        """The usable part as a COCO dictionary, for evaluation and conversion: pixels and ids as in the file.

        Crowd regions are in it, skipped annotations are not; ``bbox``, ``area``, ``iscrowd`` and, with keypoints,
        ``keypoints`` and ``num_keypoints`` are always there.

        Raises:
            ValueError: the split was read with ``keep_annotations=False``.
        """
        if self._annotations is None:
            raise ValueError(f"{self.split.annotations} was read without keeping its annotations")
        return {
            "images": [
                {"id": record.id, "file_name": record.file, "height": record.height, "width": record.width}
                for record in self.records
            ],
            "annotations": [to_json(entry) for entry in self._annotations],
            "categories": [
                {"id": category.id, "name": category.name, **describe_keypoints(category)}
                for category in self.categories
                if self._is_own(category)
            ],
        }

    @property
    def labelled_classes(self) -> np.ndarray | None:
        """(C,) bool: which of the categories this data set has; None where it has all."""
        labelled = np.array([self._is_own(category) for category in self.categories])
        return None if labelled.all() else labelled

    def _is_own(self, category: Category) -> bool:
        return any(category.name == own.name for own in self.own)

    def _clean(self, raw: dict[str, Any], where: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Usable annotations in the file's order: the position of the image, the label, and the cleaned entry."""
        position_of: dict[int | None, int] = {record.id: position for position, record in enumerate(self.records)}
        by_name = {category.name: label for label, category in enumerate(self.categories)}
        label_of: dict[int | None, int] = {category.id: by_name[category.name] for category in self.own}
        has_masks = "masks" in self.fields & self.available
        identities = _Identities()
        for number, annotation in enumerate(raw["annotations"]):
            if not isinstance(annotation, dict):
                raise UserError(f"{where}: annotations[{number}] is no object with bbox, image_id and category_id")
            name = f"annotation {annotation.get('id', f'no. {number}')}"
            position = position_of.get(whole_number(annotation.get("image_id")))
            if position is None:
                raise UserError(f"{where}: {name} has image_id {annotation.get('image_id')!r}, which no image has")
            label = label_of.get(whole_number(annotation.get("category_id")))
            if label is None:
                ids = ", ".join(str(category.id) for category in self.own[:20])
                raise UserError(
                    f"{where}: {name} has category_id {annotation.get('category_id')!r}; the categories are {ids}"
                )
            record, category = self.records[position], self.categories[label]
            size, place = (record.height, record.width), f"{record.file}, {name}"
            entry = clean_annotation(annotation, category, size, self.fields, self.problems, place)
            if entry is None:
                continue
            if has_masks and not annotation.get("segmentation") and not entry["iscrowd"]:
                # The box is learned from, a mask is not.
                self.problems.add("object without segmentation: no mask is learned from it", place)
            ids_of_it = {"id": identities.unique(annotation), "image_id": record.id, "category_id": category.id}
            yield position, label, {**ids_of_it, **entry}


class _Identities:
    """Annotation ids as whole numbers that occur once."""

    def __init__(self) -> None:
        self.used: set[int] = set()
        self.largest = 0

    def unique(self, annotation: dict[str, Any]) -> int:
        """The id in the file, else (none, used before, or 0, which pycocotools reads as "not matched") a new one."""
        identity = whole_number(annotation.get("id"))
        if identity is None or identity in self.used or identity == 0:
            identity = self.largest + 1
        self.used.add(identity)
        self.largest = max(self.largest, identity)
        return identity


def same_categories(train: CocoSplit, val: CocoSplit) -> None:
    """Labels of both splits have to mean the same.

    Raises:
        UserError: ids or names differ.
    """
    if difference := category_difference(val.own, train.own):
        raise UserError(
            f"{val.split.annotations}: its categories differ from those of {train.split.annotations}: {difference}"
        )


def _images(raw: dict[str, Any], split: Split, problems: Problems) -> tuple[Path, list[ImageRecord]]:
    where = str(split.annotations)
    names: dict[int, str] = {}
    for number, entry in enumerate(raw["images"]):
        identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
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
        height, width = whole_number(entry.get("height")), whole_number(entry.get("width"))
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
    """The fields of ``Targets`` for which at least one annotation has something."""
    available = {"boxes"}
    for annotation in raw["annotations"]:
        if not isinstance(annotation, dict):
            continue  # refused when it is cleaned
        if annotation.get("segmentation") and not annotation.get("iscrowd"):
            available.add("masks")
        points = annotation.get("keypoints")
        if isinstance(points, list) and any(points[2::3]) and any(category.keypoints for category in categories):
            available.add("keypoints")
        if len(available) == len(FIELDS):
            break
    return frozenset(available)

"""Reading COCO annotation files: structural mistakes are refused in one line, damaged entries are named and skipped.

Refused (``UserError``): no file, no JSON, no images / categories, categories without name or id, ids that occur twice,
keypoint sigmas or flip pairs that fit no keypoints, annotations of an unknown category, boxes in fractions, image files
outside the data folder, none of the images found.
Named, counted and skipped (``problems``): annotations of an image that is not listed, boxes without area, outside the
image or NaN, segmentations and keypoints that are unusable or lie elsewhere than their box, objects that are there
twice, images that are not there. Image files that do not decode show up when they are read: training replaces and names
them, evaluation leaves them out and names them. Whether what is left can serve a task is decided by ``usable.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mvision.data.formats.box_units import name_corners, refuse_fractions
from mvision.data.formats.categories import extend_categories, read_categories
from mvision.data.formats.folds import Content, one_fold
from mvision.data.formats.labels import Labels, pack_labels
from mvision.data.formats.numbers import flag, whole_number
from mvision.data.formats.objects import clean_annotation, to_json
from mvision.data.formats.points import describe_keypoints, match_points
from mvision.data.formats.problems import Problems
from mvision.data.formats.records import ImageRecord, read_images
from mvision.data.formats.split import FIELDS, Split
from mvision.errors import UserError
from mvision.structures import Category

__all__ = ["FIELDS", "CocoSplit", "ImageRecord", "same_categories"]


class CocoSplit:
    """One annotation file, read and checked once.

    Attributes:
        split: the files.
        folder: the folder that the records' ``file`` are relative to.
        fields: what was asked for: a subset of ``boxes``, ``masks``, ``keypoints``.
        available: what the annotations offer, whether asked for or not.
        categories: by rising id, gaps or not, or those given; labels are the positions in this list.
        own: those of the file, by rising id.
        records: the images, in the file's order; each picture once.
        broken: positions of the images whose files are not there or no pictures, as far as is known without reading.
        real_files: of every image the path of its file, links followed.
        unlisted: further pictures beside them, which the file does not list.
        annotated: how many annotations the file has, usable or not.
        labels: the labelled objects, image by image.
        start: (images + 1,) int64: the objects of image i are the rows ``start[i]:start[i + 1]`` of ``labels``.
        problems: what was left out or mended.
    """

    def __init__(
        self,
        split: Split,
        fields: Iterable[str] = ("boxes",),
        categories: Sequence[Category] | None = None,
        keep_annotations: bool = True,
    ) -> None:
        """Read and check the file.

        Args:
            split: from ``find_layout(root).split(name)``.
            fields: names of ``Targets`` fields that are needed; masks and keypoints cost time and memory.
            categories: see ``use_categories``; None: its own.
            keep_annotations: keep what ``coco_dict`` needs. Training does not, and saves the memory: a second copy of
                every outline and keypoint.

        Raises:
            UserError: see the module's first lines.
        """
        self.split = split
        self.fields = (frozenset(fields) | {"boxes"}) & FIELDS
        self.problems = Problems()
        contents = [self._read(part, split.fold is not None) for part in split.parts]
        content = contents[0] if split.fold is None else one_fold(contents, split, self.problems)
        self.own = self.categories = content.categories
        images = content.images
        self.folder, self.records, self.broken = images.folder, images.records, images.broken
        self.real_files, self.unlisted = images.real_files, images.unlisted
        self.available, self.annotated = content.available, content.annotated
        cleaned = content.entries
        self._annotations = [(label, entry) for _, label, entry in cleaned] if keep_annotations else None
        cleaned.sort(key=lambda item: item[0])  # stable: the objects of an image keep the file's order
        of_image = [position for position, _, _ in cleaned]
        self.start = np.searchsorted(of_image, np.arange(len(self.records) + 1)).astype(np.int64)
        self.labels: Labels = pack_labels(
            [entry for _, _, entry in cleaned],
            [label for _, label, _ in cleaned],
            [(self.records[position].height, self.records[position].width) for position in of_image],
            self.fields,
            max((len(category.keypoints) for category in self.own), default=0),
        )
        self._orders: list[np.ndarray | None] = [None] * len(self.own)
        self._place = list(range(len(self.own)))
        self._never_labelled_points()
        if categories is not None:
            self.use_categories(categories)

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, image: int) -> slice:
        """The rows of ``labels`` that belong to an image, given by its position in ``records``."""
        return slice(int(self.start[image]), int(self.start[image + 1]))

    def use_categories(self, categories: Sequence[Category]) -> None:
        """Change to another list of classes: that of several data sets, or of the training set. Once.

        Classes and keypoints are matched by their names, ids do not matter. Classes that the list lacks are put at its
        end. Points that a class of the list has and this data set has not count as not labelled.

        Args:
            categories: labels become positions in this list.
        """
        self.categories = extend_categories(categories, self.own)
        by_name = {category.name: label for label, category in enumerate(self.categories)}
        self._place = [by_name[category.name] for category in self.own]
        places = np.array(self._place, dtype=np.int64)
        old, points = self.labels.labels, self.labels.keypoints
        count = max((len(category.keypoints) for category in self.categories), default=0)
        moved = None if points is None else np.zeros((len(old), count, 3), dtype=points.dtype)
        for label, category in enumerate(self.own):
            given = self.categories[self._place[label]].keypoints
            order, said = match_points(category.keypoints, given)
            self._orders[label] = order
            if said:
                kind = "class whose keypoints have other names than in the training set"
                self.problems.add(kind, f"{category.name}: {said}", "keypoints")
            if moved is not None and points is not None:
                rows, known = np.flatnonzero(old == label), np.flatnonzero(order >= 0)
                moved[rows[:, None], known[None]] = points[rows[:, None], order[known][None]]
        self.labels.labels, self.labels.keypoints = places[old], moved

    def leave_out(self, fields: frozenset[str]) -> None:
        """Forget what was read for these fields of ``Targets``."""
        self.fields -= fields
        if "masks" in fields:
            self.labels.outlines = None
        if "keypoints" in fields:
            self.labels.keypoints = None

    @property
    def summary(self) -> str:
        """Numbers of images and objects in a few words."""
        objects = np.bincount(
            np.repeat(np.arange(len(self)), np.diff(self.start))[~self.labels.crowd], minlength=len(self)
        )
        empty = np.flatnonzero(objects == 0)
        of_them = f" ({len(empty)} without objects, such as {self.records[empty[0]].file})" if len(empty) else ""
        return f"{len(self)} images{of_them}, {int(objects.sum())} objects of {len(self.own)} classes"

    @property
    def coco_dict(self) -> dict[str, Any]:
        """The usable part as a COCO dictionary, for evaluation and conversion: pixels and image ids as in the file.

        Crowd regions are in it, skipped annotations are not; ``bbox``, ``area``, ``iscrowd`` and, with keypoints,
        ``keypoints`` and ``num_keypoints`` are always there.

        Raises:
            ValueError: the split was read with ``keep_annotations=False``.
        """
        if self._annotations is None:
            raise ValueError(f"{self.split.annotations} was read without keeping its annotations")
        own = {category.name for category in self.own}
        return {
            "images": [
                {"id": record.id, "file_name": record.file, "height": record.height, "width": record.width}
                for record in self.records
            ],
            "annotations": [self._entry(label, entry) for label, entry in self._annotations],
            "categories": [
                {"id": category.id, "name": category.name, **describe_keypoints(category)}
                for category in self.categories
                if category.name in own
            ],
        }

    def _entry(self, label: int, entry: dict[str, Any]) -> dict[str, Any]:
        """An annotation in COCO's format. ``label``: the position of its class in ``own``."""
        order = self._orders[label]
        if order is not None and "keypoints" in entry:
            padded = np.concatenate((entry["keypoints"], np.zeros((1, 3))))  # -1, the padding: not labelled
            entry = {**entry, "keypoints": padded[order]}
        return to_json({**entry, "category_id": self.categories[self._place[label]].id})

    @property
    def labelled_classes(self) -> np.ndarray | None:
        """(C,) bool: which of the categories this data set has; None where it has all."""
        own = {category.name for category in self.own}
        labelled = np.array([category.name in own for category in self.categories])
        return None if labelled.all() else labelled

    def _read(self, split: Split, count: bool) -> Content:
        """The files of a split, or of a part of it; ``count``: count the objects of every image."""
        raw, where = split.load(self.problems), str(split.annotations)
        categories = read_categories(raw, where)
        images = read_images(raw, split, self.problems)
        objects = np.zeros((len(images.records), len(categories)), dtype=np.int64) if count else None
        available = _available(raw, categories, split.ignore_iscrowd)
        content = Content(categories, images, available, len(raw["annotations"]), [], objects)
        content.entries += self._clean(raw, split, content)
        if split.yolo is None and split.reader is None:  # formats with a reader of their own say what a box is
            name_corners(raw["annotations"], images.positions, images.records, images.broken, self.problems)
        refuse_fractions(content.entries, images.records, images.broken, where)
        return content

    def _clean(self, raw: dict[str, Any], split: Split, content: Content) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Usable annotations in the file's order: the position of the image, the label, and the cleaned entry."""
        where, positions, records = str(split.annotations), content.images.positions, content.images.records
        label_of = {category.id: label for label, category in enumerate(content.categories)}
        has_masks = "masks" in self.fields & content.available
        identities, unknown, twins = _Identities(), Counter[str](), _Twins(raw["annotations"])
        for number, annotation in enumerate(raw["annotations"]):
            if not isinstance(annotation, dict):
                raise UserError(f"{where}: annotations[{number}] is no object with bbox, image_id and category_id")
            image = whole_number(annotation.get("image_id"))
            position = positions.get(image)  # type: ignore[arg-type]
            if position is None and image in content.images.left_out:
                continue
            if position is None:
                shown = f"{_name(annotation, number)}: image_id {annotation.get('image_id')!r:.60}"
                self.problems.add("annotation of an image that 'images' does not list: left out", shown)
                continue
            label = label_of.get(whole_number(annotation.get("category_id")))  # type: ignore[arg-type]
            if label is None:
                unknown[f"{_name(annotation, number)} has category_id {annotation.get('category_id')!r:.60}"] += 1
                continue
            if content.objects is not None:
                content.objects[position, label] += 1
            record = records[position]
            place = _Place(record.file, annotation, number)
            entry = clean_annotation(
                annotation,
                content.categories[label],
                (record.height, record.width),
                self.fields,
                self.problems,
                place,
                split.ignore_iscrowd,
            )
            if entry is None:
                continue
            if twins.has(number, position, label, entry["bbox"]):
                self.problems.add("object that is there twice, alike in everything: read once", str(place))
                continue
            if entry["iscrowd"]:
                kind = "crowd region (iscrowd 1), no object: -o data.ignore_iscrowd=true reads them as single objects"
                self.problems.add(kind, str(place))
            elif has_masks and not annotation.get("segmentation"):
                # The box is learned from, a mask is not.
                self.problems.add("object without segmentation: no mask is learned from it", str(place), "masks")
            yield position, label, {"id": identities.unique(annotation), "image_id": record.id, **entry}
        if unknown:
            more = f" (and {len(unknown) - 1} other annotations)" if len(unknown) > 1 else ""
            ids = ", ".join(str(category.id) for category in content.categories[:20])
            raise UserError(f"{where}: {next(iter(unknown))}{more}; the categories are {ids}")

    def _never_labelled_points(self) -> None:
        """Points that no object has: nothing is learned about them."""
        points = self.labels.keypoints
        if points is None:
            return
        for label, category in enumerate(self.own):
            seen = (points[self.labels.labels == label, : len(category.keypoints), 2] > 0).any(axis=0)
            if np.any(seen):
                for name in (category.keypoints[point] for point in np.flatnonzero(~seen)):
                    kind = "keypoint that no object has labelled: nothing is learned about it"
                    self.problems.add(kind, f"{category.name}: {name}", "keypoints")


def _name(annotation: dict[str, Any], number: int) -> str:
    identity = annotation.get("id", f"no. {number}")
    return f"annotation {identity!s:.40}"


class _Place:
    """File and annotation, for problems: most annotations have none, so the text is made when it is asked for."""

    __slots__ = ("annotation", "file", "number")

    def __init__(self, file: str, annotation: dict[str, Any], number: int) -> None:
        self.file, self.annotation, self.number = file, annotation, number

    def __str__(self) -> str:
        return f"{self.file}, {_name(self.annotation, self.number)}"


class _Twins:
    """Recognises annotations that say the same of the same image."""

    def __init__(self, annotations: Sequence[dict[str, Any]]) -> None:
        self.annotations = annotations
        self.first: dict[int, int] = {}  # hash -> number of the annotation
        self.others: dict[int, list[int]] = {}  # the few that have the box of another

    def has(self, number: int, position: int, label: int, bbox: Sequence[float]) -> bool:
        """Whether an earlier annotation has the same class, box, outline, points and flag. Remembers this one."""
        key = hash((position, label, *bbox))
        first = self.first.setdefault(key, number)
        if first == number:
            return False
        alike = self.others.setdefault(key, [first])
        if any(self._same(self.annotations[other], self.annotations[number]) for other in alike):
            return True
        alike.append(number)
        return False

    @staticmethod
    def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return flag(one.get("iscrowd")) == flag(other.get("iscrowd")) and all(
            (one.get(key) or None) == (other.get(key) or None) for key in ("bbox", "segmentation", "keypoints")
        )


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
    """Labels of both splits have to mean the same: classes are matched by name, and some have to be in both.

    Raises:
        UserError: no class of ``val`` has a name of ``train``, or none of those that its objects belong to.
    """
    known = {category.name for category in train.categories}
    if known.isdisjoint(category.name for category in val.own):
        ours, theirs = (", ".join(category.name for category in split.own[:5]) for split in (val, train))
        raise UserError(
            f"{val.split.annotations}: none of its classes ({ours}) is in {train.split.annotations} ({theirs}); "
            "classes are matched by name"
        )
    objects = val.labels.labels[~val.labels.crowd]
    labelled = {val.categories[label].name for label in np.unique(objects)}
    if labelled and known.isdisjoint(labelled):
        raise UserError(
            f"{val.split.annotations}: all of its {len(objects)} objects are of classes that "
            f"{train.split.annotations} does not have ({', '.join(sorted(labelled)[:5])}); classes are matched by name"
        )


def _available(raw: dict[str, Any], categories: list[Category], ignore_iscrowd: bool) -> frozenset[str]:
    """The fields of ``Targets`` for which at least one annotation has something."""
    available = {"boxes"}
    has_points = any(category.keypoints for category in categories)
    for annotation in raw["annotations"]:
        if not isinstance(annotation, dict):
            continue  # refused when it is cleaned
        if annotation.get("segmentation") and (ignore_iscrowd or not flag(annotation.get("iscrowd"))):
            available.add("masks")
        points = annotation.get("keypoints")
        if has_points and isinstance(points, list) and any(points[2::3]):
            available.add("keypoints")
        if len(available) == len(FIELDS):
            break
    return frozenset(available)

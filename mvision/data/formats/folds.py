"""K-fold: the images of a data set in K parts of about the same size, each with its share of every class.

What was read of the files is joined and divided, so every layout can be used, and no file is written or copied.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvision.data.formats.categories import extend_categories, free_id
from mvision.data.formats.points import match_points
from mvision.data.formats.problems import Problems
from mvision.data.formats.records import ImageRecord, Images
from mvision.data.formats.split import Split
from mvision.errors import UserError
from mvision.structures import Category

FOLD_STREAM = 2  # of random numbers: other shares of the images draw from the seed alone and from stream 1


@dataclass
class Content:
    """What was read of an annotation file, or of several.

    Attributes:
        categories: labels are positions in this list.
        images: the images; ``positions`` are those of the file's own ids.
        available: fields of ``Targets`` that the annotations offer.
        annotated: how many annotations there are, usable or not.
        entries: the usable annotations, see ``objects.clean_annotation``: position of the image, label, entry.
        objects: (images, classes) int64: how many annotations there are, usable or not. It does not depend on what the
            annotations are read for, so neither do the folds. Only counted where it is needed.
    """

    categories: list[Category]
    images: Images
    available: frozenset[str]
    annotated: int
    entries: list[tuple[int, int, dict[str, Any]]]
    objects: np.ndarray | None = None


def one_fold(contents: Sequence[Content], split: Split, problems: Problems) -> Content:
    """The images of a fold, where ``split.held_out`` is set, or all the others.

    Images that are one file stay together.

    Args:
        contents: of all files that are divided.
        split: with ``fold``; its seed decides which images are in which fold.
        problems: gets keypoints with other names in one file than in another and, for the images of a fold, the classes
            that some folds do not have.

    Raises:
        UserError: fewer pictures than folds.
    """
    assert split.fold is not None
    whole = contents[0]
    for other in contents[1:]:
        whole = _joined(whole, other, problems)
    assert whole.objects is not None
    files = {file: number for number, file in enumerate(dict.fromkeys(whole.images.real_files))}
    if len(files) < split.fold.of:
        raise UserError(
            f"{split.annotations}: there are {len(files)} pictures, too few for {split.fold.of} folds; choose fewer "
            "(--folds)"
        )
    picture = np.array([files[file] for file in whole.images.real_files])
    objects = np.zeros((len(files), len(whole.categories)), dtype=np.int64)
    np.add.at(objects, picture, whole.objects)
    folds = draw_folds(objects, split.fold.of, split.seed)
    if split.held_out:
        _name_missing(objects, folds, split.fold.of, whole.categories, problems)
    chosen = (folds[picture] == split.fold.number - 1) == split.held_out
    return _only(whole, np.flatnonzero(chosen).tolist())


def draw_folds(objects: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Divide pictures into folds, class by class, the rarest first.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-label Data", ECML PKDD
    2011, algorithm 1), with numbers of objects in place of labels, and with folds of equal size: they differ by one
    picture at most.

    Args:
        objects: (pictures, classes) int64: how many there are in each picture.
        folds: at most as many as there are pictures.
        seed: which pictures are taken first, and which fold where several are as good.

    Returns:
        (pictures,) int64: the fold of each, from 0.
    """
    count = len(objects)
    rng = np.random.default_rng((seed, FOLD_STREAM))
    order, ties = rng.permutation(count), rng.permutation(folds)
    # Pictures without objects are divided like a class of their own.
    objects = np.concatenate((objects, objects.sum(axis=1, keepdims=True) == 0), axis=1)
    size, larger = divmod(count, folds)
    wanted = np.tile(objects.sum(axis=0) / folds, (folds, 1))
    sizes = np.zeros(folds, dtype=np.int64)
    result = np.full(count, -1, dtype=np.int64)
    while len(left := order[result[order] < 0]):
        pictures = (objects[left] > 0).sum(axis=0)
        rarest = int(np.where(pictures > 0, pictures, count + 1).argmin())
        for index in left[objects[left, rarest] > 0].tolist():
            free = (sizes < size) | ((sizes == size) & ((sizes > size).sum() < larger))
            need = wanted[:, rarest]
            fold = min(np.flatnonzero(free).tolist(), key=lambda fold: (-need[fold], sizes[fold], ties[fold]))
            result[index] = fold
            sizes[fold] += 1
            wanted[fold] -= objects[index]
    return result


def _name_missing(
    objects: np.ndarray, folds: np.ndarray, count: int, categories: Sequence[Category], problems: Problems
) -> None:
    """Name the classes that some folds do not have."""
    for label, category in enumerate(categories):
        pictures = objects[:, label] > 0
        empty = sorted(set(range(count)) - set(folds[pictures].tolist()))
        if pictures.any() and empty:
            problems.add(
                "class that some folds do not have: nothing is measured for it there",
                f"{category.name}: {objects[:, label].sum()} objects in {pictures.sum()} of {len(objects)} pictures, "
                f"none in fold {', '.join(str(fold + 1) for fold in empty)}",
            )


def _joined(one: Content, other: Content, problems: Problems) -> Content:
    """The images of both, with one list of classes; ids of the second that the first has too are replaced."""
    given = [_with_points(category, other.categories) for category in one.categories]
    categories = extend_categories(given, other.categories)
    ids = {record.id for record in one.images.records}
    records = []
    for record in other.images.records:
        records.append(replace(record, id=free_id(record.id, ids)))
        ids.add(records[-1].id)
    entries = _relabelled(one, categories, problems)
    largest = max((entry["id"] for _, _, entry in entries), default=0)
    for number, (position, label, entry) in enumerate(_relabelled(other, categories, problems), start=1):
        entry = {**entry, "id": largest + number, "image_id": records[position].id}
        entries.append((len(one.images.records) + position, label, entry))
    assert one.objects is not None
    assert other.objects is not None
    objects = np.zeros((len(one.objects) + len(other.objects), len(categories)), dtype=np.int64)
    objects[: len(one.objects), : len(one.categories)] = one.objects
    objects[len(one.objects) :, _places(other, categories)] = other.objects
    images = _joined_images(one.images, replace(other.images, records=records))
    annotated = one.annotated + other.annotated
    return Content(categories, images, one.available | other.available, annotated, entries, objects)


def _with_points(category: Category, others: Sequence[Category]) -> Category:
    """The class, with the keypoints of its namesake where it has none itself."""
    same = next((other for other in others if other.name == category.name and other.keypoints), None)
    return category if category.keypoints or same is None else same.model_copy(update={"id": category.id})


def _places(content: Content, categories: Sequence[Category]) -> list[int]:
    names = [category.name for category in categories]
    return [names.index(category.name) for category in content.categories]


def _relabelled(
    content: Content, categories: Sequence[Category], problems: Problems
) -> list[tuple[int, int, dict[str, Any]]]:
    """The entries with labels and keypoints of another list of classes."""
    places, orders = _places(content, categories), {}
    for label, category in enumerate(content.categories):
        given = categories[places[label]].keypoints
        if category.keypoints != given:
            orders[label], said = match_points(category.keypoints, given)
            if said:
                kind = "class whose keypoints have other names in one split than in another"
                problems.add(kind, f"{category.name}: {said}", "keypoints")
    entries = []
    for position, label, entry in content.entries:
        if label in orders and "keypoints" in entry:
            padded = np.concatenate((entry["keypoints"], np.zeros((1, 3))))  # -1, the padding: not labelled
            entry = {**entry, "keypoints": padded[orders[label]]}
        entries.append((position, places[label], entry))
    return entries


def _joined_images(one: Images, other: Images) -> Images:
    folder = Path(os.path.commonpath([os.path.abspath(images.folder) for images in (one, other)]))  # noqa: PTH100
    count = len(one.records)
    listed = [*one.real_files, *other.real_files]
    return Images(
        folder=folder,
        records=[*_below(folder, one), *_below(folder, other)],
        positions={},
        broken=one.broken | {count + position for position in other.broken},
        real_files=listed,
        unlisted=sorted({*one.unlisted, *other.unlisted} - set(listed)),
    )


def _below(folder: Path, images: Images) -> list[ImageRecord]:
    """The records with files relative to this folder."""
    prefix = os.path.relpath(images.folder, folder).replace(os.sep, "/")
    if prefix == ".":
        return images.records
    return [replace(record, file=posixpath.join(prefix, record.file)) for record in images.records]


def _only(content: Content, positions: Sequence[int]) -> Content:
    """The images at these positions, with their annotations."""
    place = {position: number for number, position in enumerate(positions)}
    entries = [(place[position], label, entry) for position, label, entry in content.entries if position in place]
    images = content.images
    chosen = Images(
        folder=images.folder,
        records=[images.records[position] for position in positions],
        positions={},
        broken={place[position] for position in images.broken if position in place},
        real_files=[images.real_files[position] for position in positions],
        unlisted=images.unlisted,
    )
    return Content(content.categories, chosen, content.available, len(entries), entries)

"""One part of a data set, such as ``train``: where its files lie, and its annotations as a COCO dictionary."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvision.data.formats.numbers import whole_number
from mvision.data.formats.problems import Problems
from mvision.data.formats.yolo import read_yolo_split
from mvision.data.formats.yolo_yaml import YoloSet
from mvision.errors import UserError
from mvision.storage.text_files import NotText, decode_text

FIELDS = frozenset({"boxes", "masks", "keypoints"})
"""The fields of ``Targets`` that annotations can fill."""
HOLD_OUT_STREAM = 1  # of random numbers: ``fraction`` draws from the seed alone


@dataclass(frozen=True)
class Fold:
    """One fold of several.

    Attributes:
        number: counted from 1.
        of: how many there are.
        parts: the splits whose images are divided together.
    """

    number: int
    of: int
    parts: tuple[Split, ...]


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        name: such as ``train`` or ``val``.
        images: the folder that the images' file names are relative to.
        annotations: the COCO file, or the YOLO ``data.yaml``.
        keypoints: a second COCO file whose keypoints belong to the same annotation ids (COCO's own layout has two).
        yolo: set where the annotations are YOLO's; they are converted when they are read.
        folders: further folders of the data set that file names are looked up in, in this order, where they are not in
            ``images``.
        fraction, seed: only this share of the images, drawn with this seed; a smaller share is part of a larger one.
        val_fraction, held_out: this share of the images, drawn with the same seed, is held out for validation: the
            split is without them or, where ``held_out`` is set, these alone.
        fold: the split is, drawn with the same seed, a fold of the images of several splits (where ``held_out`` is set)
            or all their other images. The files named above are those of the first of them.
        ignore_iscrowd: read regions that are marked as crowds as single objects.
        reader: reads the annotations where they are the export of a tool with a format of its own.
    """

    name: str
    images: Path
    annotations: Path
    keypoints: Path | None = None
    yolo: YoloSet | None = None
    folders: tuple[Path, ...] = ()
    fraction: float = 1.0
    seed: int = 0
    val_fraction: float = 0.0
    held_out: bool = False
    fold: Fold | None = None
    ignore_iscrowd: bool = False
    reader: Callable[[Split, Problems], dict[str, Any]] | None = None

    @property
    def parts(self) -> tuple[Split, ...]:
        """The splits that have files of their own: this one, or those whose images are divided into folds."""
        return (self,) if self.fold is None else self.fold.parts

    def load(self, problems: Problems | None = None) -> dict[str, Any]:
        """The annotations as a COCO dictionary, read from the files at every call; not of a fold, but of its parts.

        Args:
            problems: gets what was left out or mended while the files were read; None where nobody will look at it.

        Raises:
            UserError: a file that is missing, malformed or no COCO (or YOLO) file.
        """
        assert self.fold is None
        raw = self._load(Problems() if problems is None else problems)
        if self.val_fraction > 0:
            raw = _hold_out(raw, self.val_fraction, self.seed, self.held_out, str(self.annotations))
        return raw if self.fraction >= 1 else _some_images(raw, self.fraction, self.seed)

    def _load(self, problems: Problems) -> dict[str, Any]:
        if self.yolo is not None:
            return read_yolo_split(self.yolo, self.name, problems)
        if self.reader is not None:
            return self.reader(self, problems)
        raw = read_json(self.annotations)
        if "annotations" not in raw:
            raw["annotations"] = []
            problems.add("file without a list 'annotations': its images count as not labelled", str(self.annotations))
        if self.keypoints is not None:
            _join_keypoints(raw, read_json(self.keypoints), problems)
        return raw


def read_json(path: Path) -> dict[str, Any]:
    """A COCO file as it is; its lists ``images`` and ``categories`` are there, ``annotations`` may be missing.

    Raises:
        UserError: the file is missing, is no JSON (with line and column) or is no COCO dictionary.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file")
        raw = json.loads(decode_text(path.read_bytes())[0])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except NotText as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:  # Python's limit of digits
        raise UserError(f"{path}: not a COCO file: a number in it has thousands of digits") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a COCO file: lists in lists, more than a thousand deep") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a COCO file: the top level is a {type(raw).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list) and (key != "annotations" or key in raw):
            found = ", ".join(map(repr, list(raw)[:10])) or "nothing"
            raise UserError(f"{path}: not a COCO file: no list '{key}' in it (found: {found:.200})")
    return raw


def _objects(entries: Any) -> list[dict[str, Any]]:
    """Those entries of a list that are JSON objects; others are reported when the list is read."""
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _join_keypoints(instances: dict[str, Any], persons: dict[str, Any], problems: Problems) -> None:
    """Give the objects of ``instances`` the keypoints that ``persons`` has under the same ids, in place."""
    points = {whole_number(entry.get("id")): entry.get("keypoints") for entry in _objects(persons.get("annotations"))}
    points = {identity: values for identity, values in points.items() if identity is not None and values}
    for annotation in _objects(instances["annotations"]):
        found = points.pop(whole_number(annotation.get("id")), None)
        if found:
            annotation["keypoints"] = found
    for identity in points:
        problems.add("keypoints of an annotation that the other file lacks: left out", f"id {identity}", "keypoints")
    instances["info"] = {
        **_object(instances.get("info")),
        **{k: v for k, v in _object(persons.get("info")).items() if k in ("keypoint_sigmas", "flip_pairs")},
    }
    described = {whole_number(category.get("id")): category for category in _objects(persons["categories"])}
    for category in _objects(instances["categories"]):
        for key in ("keypoints", "skeleton", "keypoint_sigmas", "sigmas", "flip_pairs"):
            value = described.get(whole_number(category.get("id")), {}).get(key)
            if value is not None:
                category[key] = value


def _some_images(raw: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """The annotations of a share of the images, at least one of them, in their order."""
    count = len(raw["images"])
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, round(count * fraction))]
    return _only(raw, set(chosen.tolist()))


def _hold_out(raw: dict[str, Any], share: float, seed: int, held_out: bool, where: str) -> dict[str, Any]:
    """The images that are held out, or all the others; entries of one picture stay together."""
    names = [_file_key(entry) for entry in raw["images"]]
    pictures = list(dict.fromkeys(names))
    if len(pictures) < 2:
        raise UserError(f"{where}: data.val_fraction needs two pictures or more, there are {len(pictures)}")
    order = np.random.default_rng((seed, HOLD_OUT_STREAM)).permutation(len(pictures))
    count = min(max(round(len(pictures) * share), 1), len(pictures) - 1)
    chosen = {pictures[index] for index in order[:count].tolist()}
    return _only(raw, {index for index, name in enumerate(names) if (name in chosen) == held_out})


def _file_key(entry: Any) -> str:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    return posixpath.normpath(name.replace("\\", "/")) if isinstance(name, str) else repr(entry)


def _only(raw: dict[str, Any], positions: set[int]) -> dict[str, Any]:
    """The images at these positions, and their annotations.

    Only annotations of images that were left out go: broken ones stay, for ``CocoSplit`` to report.
    """
    left_out: set[int | None] = set()
    kept: set[int | None] = {None}
    for index, entry in enumerate(raw["images"]):
        if isinstance(entry, dict):
            (kept if index in positions else left_out).add(whole_number(entry.get("id")))
    left_out -= kept
    return {
        **raw,
        "images": [entry for index, entry in enumerate(raw["images"]) if index in positions],
        "annotations": [
            entry
            for entry in raw["annotations"]
            if not isinstance(entry, dict) or whole_number(entry.get("image_id")) not in left_out
        ],
    }

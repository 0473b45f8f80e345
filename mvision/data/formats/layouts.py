"""Recognises the layout of a data folder: COCO's, Roboflow's, YOLO's and others. All are read as COCO dictionaries."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvision.data.formats.coco_layouts import (
    ROBOFLOW_FILE,
    Recognised,
    annotations_folder,
    files_beside_images,
    folders_with_files,
)
from mvision.data.formats.split import Split
from mvision.data.formats.tool_layouts import tool_file, tool_files
from mvision.data.formats.yolo_plain import is_plain_yolo, plain_yolo
from mvision.data.formats.yolo_yaml import YoloSet, is_yolo_file, yolo_splits
from mvision.errors import UserError, did_you_mean

USUAL_SPLITS = ("train", "val", "test")
YAML_SUFFIXES = (".yaml", ".yml")
BUILTIN = re.compile(r"builtin:(\d+)")
MOST_BUILTIN = 100_000  # images, 2.5 GB
MAX_DESCENT = 3  # folders in folders with nothing else in them, as archives are unpacked


@dataclass(frozen=True)
class Layout:
    """A data folder that was recognised.

    Attributes:
        root: the folder.
        description: one line for the user: the kind of layout, the folder, its splits, and what was guessed or left
            out.
        splits: by name; ``train`` and ``val`` where the layout has them, and every other annotation file by its stem.
        missing: by name, why a split that the data set speaks of cannot be used.
    """

    root: Path
    description: str
    splits: dict[str, Split] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def split(self, name: str = "val", fields: Collection[str] = (), poses_only: bool = False) -> Split:
        """One split by name.

        COCO's own layout has two annotation files for the same images: ``instances_*.json`` with all objects, and
        ``person_keypoints_*.json``. Where ``fields`` contains ``keypoints``, the second file's keypoints are joined to
        the objects of the first.

        Args:
            name: as in ``splits``.
            fields: those of ``Targets`` that are needed: ``boxes``, ``masks``, ``keypoints``.
            poses_only: only poses are asked for, no other objects: then the file of persons is taken alone.

        Raises:
            UserError: there is no such split; the message names the ones there are.
        """
        if name not in self.splits:
            why = f" ({self.missing[name]})" if name in self.missing else ""
            raise UserError(f"{self.root}: no split '{name}'{why}: {did_you_mean(name, self.splits)}")
        split = self.splits[name]
        persons = self.splits.get(f"person_keypoints_{split.annotations.stem.removeprefix('instances_')}")
        if persons is None or "keypoints" not in fields or persons.annotations == split.annotations:
            return split
        return replace(persons, name=name) if poses_only else replace(split, keypoints=persons.annotations)


def usual_splits(layout: Layout) -> list[str]:
    """train, val and test where they exist, else every split."""
    return [name for name in USUAL_SPLITS if name in layout.splits] or list(layout.splits)


def find_layout(root: str | Path | None = None) -> Layout:
    """Recognise the data set at ``root``; None is the built-in one, generated on first use.

    ``builtin:N`` is the built-in one with N training images instead of its usual number; the first of them and the
    images for validation are the same.

    Recognised: ``images/`` + ``annotations/{train,val}.json``; COCO's own (``annotations/instances_train2017.json``,
    ``train2017/``) and CVAT's, in any case; a folder for each split with one COCO file in it (Roboflow's
    ``train/_annotations.coco.json``, ``valid/``); COCO files beside the images or beside folders of them; a YOLO
    ``data.yaml``, or YOLO's label files with a ``classes.txt`` or ``obj.names``; CVAT's XML and Label Studio's JSON. A
    folder that holds one folder and nothing else stands for that one.

    Raises:
        UserError: there is no such folder, or nothing in it is recognised.
    """
    if root is None or is_builtin(root):
        return find_layout(_builtin(root))
    root = Path(root).expanduser()
    if not root.exists():
        raise UserError(f"--data {root}: no such folder")
    if root.is_file():
        if root.suffix.lower() in YAML_SUFFIXES:
            return _yolo(root.parent, yolo_splits(root))
        if (found := tool_file(root)).splits:
            return _coco(root.parent, found)
        ways = {".json": "give the folder that it lies in", ".zip": "unpack it and give the folder"}
        way = ways.get(root.suffix.lower(), "")
        raise UserError(
            f"--data {root}: a folder or a YOLO data.yaml is expected, not this file{f': {way}' if way else ''}"
        )
    folder = root
    for _ in range(MAX_DESCENT + 1):
        layout = _recognise(folder)
        if layout is not None:
            return layout
        below = [entry for entry in _entries(folder) if not entry.name.startswith((".", "__MACOSX"))]
        if len(below) != 1 or not below[0].is_dir() or below[0].name.casefold() == "annotations":
            break
        folder = below[0]
    raise UserError(_not_recognised(folder, root))


def is_builtin(root: str | Path) -> bool:
    """Whether ``find_layout`` takes this for the built-in data set."""
    return BUILTIN.fullmatch(str(root)) is not None


def is_at_hand(root: str | Path | None) -> bool:
    """Whether ``find_layout`` finds the data set without generating the built-in one first."""
    from mvision.builtin import has_builtin

    if root is None:
        return has_builtin()
    found = BUILTIN.fullmatch(str(root))
    return has_builtin(int(found[1])) if found else True


def _builtin(root: str | Path | None) -> Path:
    """The built-in data set's folder."""
    from mvision.builtin import ensure_builtin

    ensure = ensure_builtin
    if found := BUILTIN.fullmatch(str(root)):
        if not 1 <= int(found[1]) <= MOST_BUILTIN:
            raise UserError(f"--data {root}: give a number of training images from 1 to {MOST_BUILTIN}")
        ensure = partial(ensure, train=int(found[1]))
    with tqdm(desc="generating the built-in data set", unit="img", leave=False, delay=0.5) as bar:
        return ensure(progress=partial(_show, bar), log=partial(bar.write, file=sys.stderr))


def _show(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _recognise(root: Path) -> Layout | None:
    for recognise in (annotations_folder, tool_files, folders_with_files):
        if (found := recognise(root)).splits:
            return _coco(root, found)
    files = [entry for entry in _entries(root) if entry.suffix in YAML_SUFFIXES and not entry.name.startswith(".")]
    files = [file for file in sorted(files, key=lambda file: (file.stem != "data", file.name)) if is_yolo_file(file)]
    if files:
        others = f"; not read: {', '.join(file.name for file in files[1:4])}" if files[1:] else ""
        return _yolo(root, yolo_splits(files[0]), others)
    if (found := files_beside_images(root)).splits:
        return _coco(root, found)
    return _yolo(root, plain_yolo(root)) if is_plain_yolo(root) else None


def _coco(root: Path, found: Recognised) -> Layout:
    splits = {name: found.splits[name] for name in sorted(found.splits, key=lambda n: (n != "train", n != "val", n))}
    missing = [f"without {name}: {reason}" for name, reason in found.missing.items()]
    guessed = "".join(f"; {note}" for note in [*found.notes, *missing])
    return Layout(root, f"{found.kind} in {root}: {', '.join(splits)}{guessed}", splits, found.missing)


def _yolo(root: Path, yolo: YoloSet, more: str = "") -> Layout:
    splits = {name: Split(name, yolo.folders[name], yolo.file, yolo=yolo) for name in yolo.sources}
    missing = "".join(f"; without {name}: {reason}" for name, reason in yolo.missing.items())
    return Layout(root, f"YOLO data set in {yolo.file}: {', '.join(splits)}{missing}{more}", splits, yolo.missing)


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"--data {root}: cannot be read ({error.strerror})") from error


def _not_recognised(root: Path, given: Path) -> str:
    entries = [entry.name + ("/" if entry.is_dir() else "") for entry in _entries(root)]
    found = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") or "nothing"
    hint = ""
    if any((root / folder).is_dir() for folder in ("Annotations", "JPEGImages")) or any(root.glob("*.xml")):
        hint = "; Pascal VOC's XML files are not read: convert them to COCO first"
    found_there = annotations_folder(root)
    hint += "".join(f"; {reason}" for reason in [*found_there.missing.values(), *found_there.notes])
    place = "" if root == given else f" in {root}"
    return (
        f"--data {given}: no data set recognised{place} (found: {found}); expected images/ + "
        f"annotations/{{train,val}}.json, COCO's own layout, Roboflow's train/{ROBOFLOW_FILE}, "
        f"a COCO file beside its images, a YOLO data.yaml, CVAT's XML or Label Studio's JSON{hint}"
    )

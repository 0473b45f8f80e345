"""Recognises the layout of a data folder: COCO's, Roboflow's or YOLO's. All are read as COCO dictionaries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvision.data.formats.split import Split
from mvision.data.formats.yolo_yaml import is_yolo_file, yolo_splits
from mvision.errors import UserError, did_you_mean

USUAL_SPLITS = ("train", "val", "test")
ROBOFLOW_FILE = "_annotations.coco.json"
ROBOFLOW_NAMES = {"train": "train", "valid": "val", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Layout:
    """A data folder that was recognised.

    Attributes:
        root: the folder.
        description: one line for the user: the kind of layout, the folder, and its splits.
        splits: by name; ``train`` and ``val`` where the layout has them, and every other annotation file by its stem.
    """

    root: Path
    description: str
    splits: dict[str, Split] = field(default_factory=dict)

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
            raise UserError(f"{self.root}: no split '{name}': {did_you_mean(name, self.splits)}")
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

    Recognised: ``images/`` + ``annotations/{train,val}.json``; COCO's own (``annotations/instances_train2017.json``,
    ``train2017/``); Roboflow's COCO export (``train/_annotations.coco.json``, ``valid/``); a YOLO ``data.yaml``.

    Raises:
        UserError: there is no such folder, or nothing in it is recognised.
    """
    if root is None:
        from mvision.builtin import ensure_builtin

        with tqdm(desc="generating the built-in data set", unit="img", leave=False, delay=0.5) as bar:
            folder = ensure_builtin(progress=partial(_show, bar))
        return find_layout(folder)
    root = Path(root).expanduser()
    if not root.exists():
        raise UserError(f"--data {root}: no such folder")
    if root.is_file():
        if is_yolo_file(root):
            return _yolo(root.parent, root)
        raise UserError(f"--data {root}: a folder or a YOLO data.yaml is expected, not this file")
    for recognise in (_coco_original, _images_and_annotations, _roboflow, _yolo_folder):
        layout = recognise(root)
        if layout is not None:
            return layout
    raise UserError(_not_recognised(root))


def _show(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _images_and_annotations(root: Path) -> Layout | None:
    images, annotations = root / "images", root / "annotations"
    files = sorted(annotations.glob("*.json")) if images.is_dir() else []
    if not files:
        return None
    aliases = {"valid": "val", "validation": "val"}
    splits = {}
    for file in files:
        name = aliases.get(file.stem, file.stem)
        splits[name] = Split(name, images, file)
    return Layout(root, f"COCO annotations in {root}: {_listing(splits)}", _ordered(splits))


def _coco_original(root: Path) -> Layout | None:
    splits = {}
    for file in sorted((root / "annotations").glob("*.json")):
        for prefix in ("instances_", "person_keypoints_"):
            part = file.stem.removeprefix(prefix)
            if part == file.stem:
                continue
            folder = next((f for f in (root / part, root / "images" / part) if f.is_dir()), None)
            if folder is None:
                continue
            splits[file.stem] = Split(file.stem, folder, file)
            alias = part.rstrip("0123456789")
            if prefix == "instances_" or alias not in splits:
                splits[alias] = Split(alias, folder, file)
    if not splits:
        return None
    return Layout(root, f"COCO's own layout in {root}: {_listing(splits)}", _ordered(splits))


def _roboflow(root: Path) -> Layout | None:
    splits = {}
    for folder, name in ROBOFLOW_NAMES.items():
        file = root / folder / ROBOFLOW_FILE
        if file.is_file() and name not in splits:
            splits[name] = Split(name, root / folder, file)
    if not splits:
        return None
    return Layout(root, f"Roboflow's COCO export in {root}: {_listing(splits)}", splits)


def _yolo_folder(root: Path) -> Layout | None:
    files = sorted([*root.glob("*.yaml"), *root.glob("*.yml")], key=lambda file: (file.stem != "data", file.name))
    file = next((file for file in files if is_yolo_file(file)), None)
    return None if file is None else _yolo(root, file)


def _yolo(root: Path, file: Path) -> Layout:
    yolo = yolo_splits(file)
    splits = {name: Split(name, yolo.folders[name], file, yolo=yolo) for name in yolo.sources}
    return Layout(root, f"YOLO data set in {file}: {_listing(splits)}", splits)


def _ordered(splits: dict[str, Split]) -> dict[str, Split]:
    """``train`` and ``val`` first."""
    return {name: splits[name] for name in sorted(splits, key=lambda n: (n != "train", n != "val", n))}


def _listing(splits: dict[str, Split]) -> str:
    return ", ".join(_ordered(splits))


def _not_recognised(root: Path) -> str:
    entries = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in root.iterdir())
    found = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") or "nothing"
    hint = ""
    if any((root / folder).is_dir() for folder in ("Annotations", "JPEGImages")) or any(root.glob("*.xml")):
        hint = "; Pascal VOC's XML files are not read: convert them to COCO first"
    return (
        f"--data {root}: no data set recognised (found: {found}); expected images/ + annotations/{{train,val}}.json, "
        f"COCO's own layout, Roboflow's train/{ROBOFLOW_FILE}, or a YOLO data.yaml{hint}"
    )

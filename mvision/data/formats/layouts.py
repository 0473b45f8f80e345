"""What a data folder is: a layout of COCO's, Roboflow's or YOLO's; all of them become COCO dictionaries."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mvision.data.formats.coco import read_json
from mvision.data.formats.yolo import YoloSet, is_yolo_file, read_yolo_split, yolo_splits
from mvision.errors import UserError

KEYPOINT_TASK = "keypoints"
EVERYTHING = ("detection", "instance-seg", KEYPOINT_TASK)  # tasks whose labels together are all that a split has
USUAL_SPLITS = ("train", "val", "test")
ROBOFLOW_FILE = "_annotations.coco.json"
ROBOFLOW_NAMES = {"train": "train", "valid": "val", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        name: such as ``train`` or ``val``.
        images: the folder that the images' file names are relative to.
        annotations: the COCO file, or the YOLO ``data.yaml``.
        keypoints: a second COCO file whose keypoints belong to the same annotation ids (COCO's own layout has two).
        yolo: set where the annotations are YOLO's and are converted when read.
        fraction, seed: only this share of the images, drawn with this seed; a smaller share is part of a larger one.
    """

    name: str
    images: Path
    annotations: Path
    keypoints: Path | None = None
    yolo: YoloSet | None = None
    fraction: float = 1.0
    seed: int = 0

    def load(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary.

        Raises:
            UserError: a file that is missing, malformed or no COCO (or YOLO) file.
        """
        raw = self._load()
        return raw if self.fraction >= 1 else _some_images(raw, self.fraction, self.seed)

    def _load(self) -> dict[str, Any]:
        if self.yolo is not None:
            return read_yolo_split(self.yolo, self.name)
        raw = read_json(self.annotations)
        if self.keypoints is not None:
            _join_keypoints(raw, read_json(self.keypoints))
        return raw


@dataclass(frozen=True)
class Layout:
    """A data folder that was recognised.

    Attributes:
        root: the folder.
        description: one line that says what was found.
        splits: by name; ``train`` and ``val`` where the layout has them, and every other annotation file by its stem.
    """

    root: Path
    description: str
    splits: dict[str, Split] = field(default_factory=dict)

    def split(self, name: str = "val", tasks: Sequence[str] = ()) -> Split:
        """One split by name.

        In COCO's own layout keypoints lie in files of their own: the task ``keypoints`` alone takes that file, together
        with other tasks its keypoints are joined to the objects of ``instances_*.json``.

        Raises:
            UserError: there is no such split; the message names the ones there are.
        """
        if name not in self.splits:
            near = difflib.get_close_matches(name, self.splits, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(self.splits)}"
            raise UserError(f"{self.root}: no split '{name}': {hint}")
        split = self.splits[name]
        persons = self.splits.get(f"person_keypoints_{split.annotations.stem.removeprefix('instances_')}")
        if persons is None or KEYPOINT_TASK not in tasks or persons.annotations == split.annotations:
            return split
        if set(tasks) == {KEYPOINT_TASK}:
            return replace(persons, name=name)
        return replace(split, keypoints=persons.annotations)


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


def _join_keypoints(instances: dict[str, Any], persons: dict[str, Any]) -> None:
    """Give the objects of ``instances`` the keypoints that ``persons`` has under the same ids, in place."""
    points = {annotation.get("id"): annotation.get("keypoints") for annotation in persons["annotations"]}
    for annotation in instances["annotations"]:
        found = points.get(annotation.get("id"))
        if found:
            annotation["keypoints"] = found
    about_points = {
        key: v for key, v in (persons.get("info") or {}).items() if key in ("keypoint_sigmas", "flip_pairs")
    }
    instances["info"] = {**(instances.get("info") or {}), **about_points}
    described = {category.get("id"): category for category in persons["categories"]}
    for category in instances["categories"]:
        for key in ("keypoints", "skeleton", "keypoint_sigmas", "sigmas", "flip_pairs"):
            value = described.get(category.get("id"), {}).get(key)
            if value is not None:
                category[key] = value


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


def _some_images(raw: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """The annotations of a share of the images, at least one of them, in their order."""
    count = len(raw["images"])
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, round(count * fraction))]
    images = [raw["images"][index] for index in sorted(chosen.tolist())]
    # What is no annotation of an image left out, broken ones too: whoever reads them next reports those.
    everywhere, kept = ({image.get("id") for image in of if isinstance(image, dict)} for of in (raw["images"], images))
    annotations = [
        entry
        for entry in raw["annotations"]
        if not isinstance(entry, dict) or entry.get("image_id") not in everywhere - kept
    ]
    return {**raw, "images": images, "annotations": annotations}

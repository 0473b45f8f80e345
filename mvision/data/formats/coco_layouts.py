"""Where COCO files and their images lie in a data folder: as COCO, CVAT, Roboflow, Label Studio and others write them.

A file is taken for a split by its name, in any case: ``train``, ``val`` and ``test`` and other words for them, with
``instances_`` in front of them, a year behind them or other words beside them. Names of images in it may count from
several folders: those that come into question are a split's ``images`` and ``folders``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mvision.data.formats.split import Split
from mvision.data.formats.split_names import split_of
from mvision.errors import UserError
from mvision.structures.images import IMAGE_SUFFIXES

ROBOFLOW_FILE = "_annotations.coco.json"
INSTANCES, PERSONS = "instances_", "person_keypoints_"
IMAGE_FOLDERS = ("images", "jpegimages", "imgs", "data")
COCO_KEYS = re.compile(rb'"(images|annotations)"\s*:\s*\[')
SNIFFED = 2**20  # bytes at both ends of a file in which one of COCO's lists has to begin


@dataclass
class Recognised:
    """What was found in a folder.

    Attributes:
        kind: of the layout, for the user.
        splits: by name; a file may stand for several.
        missing: by name of a split, why it cannot be used.
        notes: what was guessed or left out.
    """

    kind: str
    splits: dict[str, Split] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def annotations_folder(root: Path) -> Recognised:
    """``annotations/*.json``: COCO's own layout, CVAT's, and ``images/`` + ``annotations/{train,val}.json``.

    COCO's own layout has files that begin with ``instances_`` or ``person_keypoints_``, and a folder of images for
    each; other files (captions) are left out there.
    """
    folder = _folder(root, "annotations")
    found = Recognised("COCO annotations")
    if folder is None:
        return found
    files = _coco_files(folder, found)
    prefixed = [file for file in files if file.stem.startswith((INSTANCES, PERSONS))]
    if prefixed:
        found.kind = "COCO's own layout"
        _say_left_out([file for file in files if file not in prefixed], found)
    images = next((place for name in IMAGE_FOLDERS if (place := _folder(root, name)) is not None), None)
    around = [place for place in (root, images) if place is not None]
    for file in prefixed or files:
        part = _part(file)
        own = _image_folder(part, around)
        place = (own or images) if prefixed else (images or own)
        if place is None and not _has_images(root):
            why = f"{file.name} is there, its images are not: neither {part}/ nor images/"
            found.missing.setdefault(split_of(part) or part, why)
            continue
        place = place or root
        folders = _others((own, images, root), place)
        if prefixed:
            found.splits[file.stem] = Split(file.stem, place, file, folders=folders)
        _add(found, Split(split_of(part) or part, place, file, folders=folders))
    return _completed(found)


def folders_with_files(root: Path) -> Recognised:
    """A folder for each split with one COCO file in it, as Roboflow and FiftyOne write them.

    Raises:
        UserError: there are several COCO files in such a folder.
    """
    found = Recognised("COCO files in folders")
    for folder in _visible(root):
        name = split_of(folder.name)
        if name is None or not folder.is_dir():
            continue
        if (folder / ROBOFLOW_FILE).is_file():
            files = [folder / ROBOFLOW_FILE]
            found.kind = "Roboflow's COCO export"
        else:
            files = _coco_files(folder, found)
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:5])
            raise UserError(f"{folder}: several COCO files ({names}): leave one, or put them beside {folder.name}/")
        for file in files:
            _add(found, Split(name, folder, file, folders=_subfolders(folder)))
    return found


def files_beside_images(root: Path) -> Recognised:
    """COCO files in the folder itself, beside the images or beside folders of them (Label Studio, labelme2coco)."""
    found = Recognised("COCO files beside their images")
    for file in _coco_files(root, found):
        part = _part(file)
        folders = _others((_image_folder(part, [root]), *_subfolders(root)), root)
        _add(found, Split(split_of(part) or part, root, file, folders=folders))
    return _completed(found)


def _completed(found: Recognised) -> Recognised:
    """Gives ``train``, ``val`` and ``test`` to files that have these words among others in their names; a single file
    serves as ``train`` where nothing else could."""
    candidates: dict[str, dict[Path, Split]] = {}
    for split in found.splits.values():
        words = {split_of(word) for word in re.split(r"[^a-zA-Z0-9]+", split.annotations.stem)} - {None}
        if len(words) == 1:
            candidates.setdefault(str(words.pop()), {})[split.annotations] = split
    for name, splits in candidates.items():
        if name not in found.splits and len(splits) == 1:
            _serve(found, name, *splits.values())
    files = {split.annotations: split for split in found.splits.values()}
    if len(files) == 1 and not found.splits.keys() & {"train", "val", "test"}:
        _serve(found, "train", *files.values())
    return found


def _serve(found: Recognised, name: str, split: Split) -> None:
    found.notes.append(f"{split.annotations.name} serves as '{name}'")
    found.splits[name] = Split(name, split.images, split.annotations, folders=split.folders)


def _add(found: Recognised, split: Split) -> None:
    """A file under the name of its split; of two with one name (2014, 2017) the last, all objects before persons."""
    other = found.splits.get(split.name)
    if other is not None and not split.annotations.stem.startswith(PERSONS):
        if not other.annotations.stem.startswith(PERSONS):
            found.notes.append(f"'{split.name}' is {split.annotations.name}, not {other.annotations.name}")
            own = other.annotations.stem
            found.splits[own] = Split(own, other.images, other.annotations, folders=other.folders)
        other = None
    if other is None:
        found.splits[split.name] = split


def _coco_files(folder: Path, found: Recognised) -> list[Path]:
    """The JSON files of a folder that hold COCO's lists, and those called like splits, whatever is in them."""
    files = [entry for entry in _entries(folder) if entry.name.casefold().endswith(".json") and entry.is_file()]
    hidden = [file.name for file in files if file.name.startswith(".")]  # ``...json`` has dots alone before its ending
    if hidden:
        found.notes.append(f"hidden files are left out: {', '.join(hidden[:5])}{', ...' if len(hidden) > 5 else ''}")
    files = [file for file in files if not file.name.startswith(".")]
    chosen = [file for file in files if split_of(_part(file)) is not None or _looks_like_coco(file)]
    if chosen:
        _say_left_out([file for file in files if file not in chosen], found)
    return chosen


def _say_left_out(files: Sequence[Path], found: Recognised) -> None:
    if files:
        names = ", ".join(file.name for file in files[:3])
        found.notes.append(f"not read: {names}{f' and {len(files) - 3} more' if len(files) > 3 else ''}")


def _looks_like_coco(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            if COCO_KEYS.search(opened.read(SNIFFED)):
                return True
            opened.seek(max(file.stat().st_size - SNIFFED, 0))
            return COCO_KEYS.search(opened.read(SNIFFED)) is not None
    except OSError:
        return False


def _part(file: Path) -> str:
    return file.stem.removeprefix(INSTANCES).removeprefix(PERSONS)


def _image_folder(part: str, places: Sequence[Path]) -> Path | None:
    """The folder of a part's images: of its name, in any case, else of another name for the same split."""
    exact = next((place / part for place in places if (place / part).is_dir()), None)
    if exact is not None:
        return exact
    folders = [folder for place in places for folder in _visible_folders(place)]
    alike = [folder for folder in folders if folder.name.casefold() == part.casefold()]
    if not alike and split_of(part) is not None:
        alike = [folder for folder in folders if split_of(folder.name) == split_of(part)]
    return alike[0] if alike else None


def _folder(root: Path, name: str) -> Path | None:
    """A folder of this name, in any case; as it is written first."""
    if (root / name).is_dir():
        return root / name
    return next((entry for entry in _visible(root) if entry.name.casefold() == name and entry.is_dir()), None)


def _has_images(root: Path) -> bool:
    return any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in _visible(root))


def _others(folders: Iterable[Path | None], first: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(folder for folder in folders if folder is not None and folder != first))


def _subfolders(root: Path) -> tuple[Path, ...]:
    """Folders that images usually lie in come first."""
    folders = _visible_folders(root)
    return tuple(sorted(folders, key=lambda folder: (folder.name.casefold() not in IMAGE_FOLDERS, folder.name)))


def _visible_folders(root: Path) -> list[Path]:
    """Without a look at every file: there may be 100,000 images beside them."""
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise UserError(f"--data {root}: cannot be read ({error.strerror})") from error
    return [root / name for name in names if not name.startswith((".", "__MACOSX"))]


def _visible(root: Path) -> list[Path]:
    return [entry for entry in _entries(root) if not entry.name.startswith((".", "__MACOSX"))]


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"--data {root}: cannot be read ({error.strerror})") from error

"""Where the exports of tools for labelling lie that are not COCO's or YOLO's: CVAT's XML, Label Studio's JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvision.data.formats.coco_layouts import IMAGE_FOLDERS, Recognised
from mvision.data.formats.cvat import cvat_subsets, is_cvat, read_cvat
from mvision.data.formats.label_studio import is_label_studio, read_label_studio
from mvision.data.formats.problems import Problems
from mvision.data.formats.split import Split
from mvision.data.formats.split_names import split_of
from mvision.errors import UserError

MANY = 100  # files of one ending; so many are one for each picture, and none of them is such an export
Reader = Callable[[Split, Problems], dict[str, Any]]
KINDS: dict[str, tuple[str, Callable[[Path], bool], Reader]] = {
    ".xml": ("CVAT for images", is_cvat, read_cvat),
    ".json": ("Label Studio's JSON", is_label_studio, read_label_studio),
}
FURTHER = re.compile(r"(.+)-\d+")


def tool_files(root: Path) -> Recognised:
    """Exports in a folder, or in folders called like splits; a single one serves as ``train``.

    Raises:
        UserError: several exports stand for one split.
    """
    found = _recognised(root, _exports(root))
    if found.splits:
        return found
    with os.scandir(root) as entries:  # without a look at every file: there may be 100,000 pictures
        folders = sorted(entry.name for entry in entries if split_of(entry.name) and entry.is_dir())
    for folder in folders:
        for file in _exports(root / folder):
            _add(found, str(split_of(folder)), file, root / folder)
    return found


def tool_file(file: Path) -> Recognised:
    """One export, given by its path; nothing if it is none."""
    known = KINDS.get(file.suffix.lower())
    return _recognised(file.parent, [file]) if known is not None and known[1](file) else Recognised("")


def _exports(folder: Path) -> list[Path]:
    files: list[Path] = []
    for suffix, (_, is_export, _) in KINDS.items():
        named = [path for path in folder.glob(f"*{suffix}") if not path.name.startswith(".") and path.is_file()]
        files += [path for path in sorted(named)[:MANY] if is_export(path)] if len(named) < MANY else []
    stems = {path.stem for path in files}
    # tasks-2.json is a part of tasks.json.
    return [path for path in files if not ((part := FURTHER.fullmatch(path.stem)) and part[1] in stems)]


def _recognised(root: Path, files: list[Path]) -> Recognised:
    found = Recognised("")
    for file in files:
        subsets = cvat_subsets(file) if file.suffix.lower() == ".xml" else []
        words = {split_of(word) for word in re.split(r"[^a-zA-Z0-9]+", file.stem)} - {None}
        own = str(words.pop()) if len(words) == 1 else ""
        for name in dict.fromkeys(split_of(subset) or subset for subset in subsets) if len(subsets) > 1 else [own]:
            _add(found, name or ("train" if len(files) == 1 else file.stem), file, root)
    return found


def _add(found: Recognised, name: str, file: Path, root: Path) -> None:
    if name in found.splits:
        other = found.splits[name].annotations
        raise UserError(
            f"{root}: {other.name} and {file.name} are both '{name}': leave one, or call them train and val"
        )
    kind, _, reader = KINDS[file.suffix.lower()]
    found.kind = found.kind or kind
    if name == "train" and split_of(file.stem) is None and split_of(root.name) is None:
        found.notes.append(f"{file.name} serves as 'train'")
    folders = [root / folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()]
    below = [entry for folder in folders for entry in sorted(folder.iterdir()) if entry.is_dir()]
    found.splits[name] = Split(name, root, file, folders=(*folders, *below), reader=reader)

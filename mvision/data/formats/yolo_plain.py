"""YOLO label files without a ``data.yaml``, as Label Studio and CVAT write them: the classes are in a text file."""

from __future__ import annotations

import os
from pathlib import Path

from mvision.data.formats.split_names import split_of
from mvision.data.formats.yolo_pictures import LIST_SUFFIX, PICTURES, common_folder
from mvision.data.formats.yolo_yaml import YoloSet
from mvision.errors import UserError
from mvision.storage.text_files import read_text

NAME_FILES = ("classes.txt", "obj.names", "data.names", "labels/classes.txt")
MAX_NAMES = 2**20  # bytes


def is_plain_yolo(root: Path) -> bool:
    """Whether a folder has a text file with classes."""
    return any((root / name).is_file() for name in NAME_FILES)


def plain_yolo(root: Path) -> YoloSet:
    """The data set in a folder with a text file of classes, one a line.

    Its splits are lists (``train.txt``), else folders called like splits in ``images/`` or in the folder itself; where
    there is neither, all images are ``train``.

    Raises:
        UserError: the classes cannot be read, or a list has no images.
    """
    own = Path(os.path.abspath(root))  # noqa: PTH100 - links stay links
    file = next(own / name for name in NAME_FILES if (own / name).is_file())
    text, _ = read_text(file, MAX_NAMES)
    names = dict(enumerate(line.strip() for line in text.rstrip().splitlines()))
    if not names or not all(names.values()):
        raise UserError(f"{file}: one class a line is expected, without empty lines")
    sources = _sources(own)
    folders = {name: common_folder(paths, [own]) for name, paths in sources.items()}
    note = (next(iter(sources)), "there is no data.yaml: the classes are the lines of a text file", str(file))
    return YoloSet(file, names, sources, folders, [], 0, roots=[own], find_points=True, notes=[note])


def _sources(root: Path) -> dict[str, list[Path]]:
    entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    lists = [entry for entry in entries if entry.suffix == LIST_SUFFIX and split_of(entry.stem) and entry.is_file()]
    images = [entry for entry in entries if entry.name.casefold() == PICTURES and entry.is_dir()]
    below = [entry for folder in (*images, root) for entry in sorted(folder.iterdir()) if entry.is_dir()]
    found: dict[str, list[Path]] = {}
    for entry in lists or [entry for entry in below if split_of(entry.name)]:
        found.setdefault(str(split_of(entry.stem)), []).append(entry)
    return found or {"train": images or [root]}

"""The ``data.yaml`` of a YOLO data set: where its pictures lie, its classes and its keypoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvision.data.formats.yolo_pictures import LIST_SUFFIX, Folders, common_folder, found_by_tail
from mvision.errors import UserError
from mvision.storage.yaml_files import read_yaml
from mvision.structures.images import IMAGE_SUFFIXES

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
AS_TEXT = ("names", "kpt_names", "path", *SPLIT_NAMES)  # a class or a folder may be called no, 010 or 1.50
ABSENT = ("", "~", "null", "Null", "NULL", "None")
MAX_POINTS = 1000  # of an object


@dataclass(frozen=True)
class YoloSet:
    """A ``data.yaml``, read.

    Attributes:
        file: the YAML file.
        names: class names by the number that a label file's lines begin with.
        sources: by split, the folders, list files and pictures that it consists of, as written, absolute.
        folders: by split, the folder that all images of the split lie in.
        keypoint_names: of every class with keypoints; empty for boxes and polygons, or where ``kpt_shape`` is missing.
        keypoint_dims: numbers per keypoint in the label files, 2 (x, y) or 3 (x, y, visibility).
        roots: the folders that belong to the data set: that of the YAML file, and its ``path:`` where that is there.
        find_points: ``kpt_shape`` is missing: label files with poses are recognised by their numbers.
        missing: by split, why it cannot be used although the file names it.
        described: ``flip_idx`` and ``kpt_names`` as they are written.
        notes: what was mended or guessed: the split that it concerns, what, and where.
    """

    file: Path
    names: dict[int, str]
    sources: dict[str, list[Path]]
    folders: dict[str, Path]
    keypoint_names: list[str]
    keypoint_dims: int
    roots: list[Path] = field(default_factory=list)
    find_points: bool = False
    missing: dict[str, str] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str, str]] = field(default_factory=list)


def is_yolo_file(path: Path) -> bool:
    """Whether a YAML file describes a YOLO data set: it has a split that is a path, and classes or a name like it."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    usual_name = path.stem in ("data", "dataset")
    try:
        tree = read_yaml(path, str(path), AS_TEXT)
    except UserError:
        return usual_name  # by its name it is one, and reading it gives the user the reason
    if not isinstance(tree, dict) or not any(isinstance(tree.get(name), str | list) for name in SPLIT_NAMES):
        return False
    return "names" in tree or "nc" in tree or usual_name


def yolo_splits(file: Path) -> YoloSet:
    """Read a ``data.yaml``: path, train, val, test, names, nc, kpt_shape, flip_idx, kpt_names.

    A split whose images are not there is in ``missing``; the others can be used.

    Raises:
        UserError: the file is no YAML, has no classes, or not one of its splits is there.
    """
    tree = read_yaml(file, str(file), AS_TEXT)
    if not isinstance(tree, dict) or not ("names" in tree or "nc" in tree):
        raise UserError(f"{file}: not a YOLO data set: it has no 'names' (a list of the classes)")
    notes: list[tuple[str, str, str]] = []
    places = _Places(tree, file, notes)
    sources: dict[str, list[Path]] = {}
    missing: dict[str, str] = {}
    for key, name in SPLIT_NAMES.items():
        entries = _entries(tree, key, file)
        if entries and name not in sources:
            try:
                sources[name] = [places.find(entry, key, name) for entry in entries]
            except UserError as error:
                missing[name] = str(error)
    if not sources:
        raise UserError(next(iter(missing.values()), f"{file}: names no train, val or test images"))
    missing = {name: reason for name, reason in missing.items() if name not in sources}
    general = next(iter(sources))  # what concerns no split is said with the first
    names = _class_names(tree, file, general, notes)
    described = {key: tree[key] for key in ("kpt_names", "flip_idx") if tree.get(key)}
    count, dims = _keypoint_shape(tree, file)
    points = point_names(described, count, file) if count else []
    folders = {name: common_folder(paths, places.roots) for name, paths in sources.items()}
    find_points = "kpt_shape" not in tree
    return YoloSet(file, names, sources, folders, points, dims, places.roots, find_points, missing, described, notes)


class _Places:
    """Finds what the entries of a ``data.yaml`` mean on this machine."""

    def __init__(self, tree: dict[str, Any], file: Path, notes: list[tuple[str, str, str]]) -> None:
        self.file, self.notes = file, notes
        self.folders = Folders()
        self.own = Path(os.path.abspath(file.parent))  # noqa: PTH100 - links stay links
        path = tree.get("path")
        path = "" if path in (None, *ABSENT) else str(path)
        base = Path(os.path.normpath(self.own / path))
        if not base.exists() and "\\" in path:
            base = Path(os.path.normpath(self.own / path.replace("\\", "/")))
        self.base = base if base.is_dir() else self.own
        self.without = "" if base.is_dir() else f"path: {path} is not there, {self.own} is taken"
        self.roots = [self.base] if self.base == self.own else [self.base, self.own]

    def find(self, entry: str, key: str, split: str) -> Path:
        """The folder, list or picture; what had to be guessed goes to the notes."""
        plain = entry.replace("\\", "/")
        # Roboflow writes ../train/images in a file that lies beside train/: last, try it without the leading dots.
        stripped = plain
        while stripped.startswith("../"):
            stripped = stripped[3:]
        candidates = [self.base / entry, self.base / plain, self.own / plain, self.own / stripped]
        path = next((Path(os.path.normpath(place)) for place in candidates if place.exists()), None)
        if path is None:
            path = found_by_tail(plain, self.roots, self.folders)
            if path is None:
                looked = " and ".join(map(str, dict.fromkeys([self.base, self.own])))
                more = f"; {self.without}" if self.without else ""
                raise UserError(f"{self.file}: {key}: {entry} is not there (looked in {looked}{more})")
            self.notes.append((split, "path of another machine in data.yaml: found by its end", f"{entry} -> {path}"))
        elif self.without:
            self.notes.append((split, "path: of data.yaml is not there: its folder is taken", self.without))
        self.without = ""
        if path.is_file() and path.suffix.lower() not in {LIST_SUFFIX, *IMAGE_SUFFIXES}:
            raise UserError(f"{self.file}: {key}: {entry} is neither a folder nor a list of images ({LIST_SUFFIX})")
        return path


def _entries(tree: dict[str, Any], key: str, file: Path) -> list[str]:
    value = tree.get(key)
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str | None) for entry in entries):
        raise UserError(f"{file}: {key} has to be a folder, a list file, or a list of these, not {str(value)[:60]}")
    return [entry for entry in entries if entry is not None and entry.strip() not in ABSENT]


def _class_names(tree: dict[str, Any], file: Path, split: str, notes: list[tuple[str, str, str]]) -> dict[int, str]:
    """Names by number. Numbers may have gaps; ``nc`` alone gives names as other tools do."""
    names, count = tree.get("names"), tree.get("nc")
    if names is None and isinstance(count, int) and 1 <= count <= 100_000:
        notes.append((split, "data.yaml has no names: the classes are called class_0, class_1, ...", f"nc: {count}"))
        return {number: f"class_{number}" for number in range(count)}
    shown = str(names)[:60]
    if isinstance(names, dict):
        if not names or not all(str(key).isascii() and str(key).isdecimal() for key in names):
            raise UserError(f"{file}: names has to be a list, or numbers with names (0: cat), not {shown}")
        if len({int(key) for key in names}) < len(names):
            raise UserError(f"{file}: names has two names for one number: {shown}")
        numbered = {int(key): names[key] for key in sorted(names, key=int)}
    elif isinstance(names, list) and names:
        numbered = dict(enumerate(names))
    else:
        raise UserError(f"{file}: names has to be a list of class names, not {shown!r}")
    for number, name in numbered.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{file}: class {number} under names has no name, but {str(name)[:40]!r}")
    if list(numbered) != list(range(len(numbered))):
        numbers = ", ".join(map(str, list(numbered)[:10]))
        notes.append((split, "names do not count from 0 on without gaps: only these classes can be used", numbers))
    if isinstance(count, int) and count != len(numbered):
        notes.append((split, "nc contradicts names: the names count", f"nc: {count}, {len(numbered)} names"))
    return numbered


def _keypoint_shape(tree: dict[str, Any], file: Path) -> tuple[int, int]:
    """Number of the keypoints, and numbers per keypoint in the label files."""
    shape = tree.get("kpt_shape")
    if not shape:
        return 0, 0
    sound = isinstance(shape, list) and len(shape) == 2 and all(type(number) is int for number in shape)
    if not sound or shape[1] not in (2, 3) or not 1 <= shape[0] <= MAX_POINTS:
        raise UserError(f"{file}: kpt_shape has to be [number of keypoints, 2 or 3], not {str(shape)[:60]}")
    return shape[0], shape[1]


def point_names(described: dict[str, Any], count: int, file: Path) -> list[str]:
    """Names of ``count`` keypoints: ``kpt_names``, else ``left_`` and ``right_`` for the pairs of ``flip_idx``.

    Args:
        described: of a ``YoloSet``.
        count: number of the points.
        file: for errors.

    Raises:
        UserError: ``kpt_names`` are not as many different names, or ``flip_idx`` is no list of pairs.
    """
    names, flip = described.get("kpt_names"), _flip_indices(described, count, file)
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if names is not None:
        if not isinstance(names, list) or len({str(name) for name in names}) != len(names) or len(names) != count:
            raise UserError(f"{file}: kpt_names has to be a list of {count} different names, not {str(names)[:60]}")
        return [str(name) for name in names]
    if flip is None:
        return [f"point_{index}" for index in range(count)]
    sides = {True: "left", False: "right"}
    return [
        f"point_{index}" if other == index else f"{sides[index < other]}_point_{min(index, other)}"
        for index, other in enumerate(flip)
    ]


def mirrored_pairs(described: dict[str, Any], names: Sequence[str], file: Path) -> list[list[str]] | None:
    """The pairs of points that change places in a mirror by ``flip_idx``, whatever they are called.

    Args:
        described: of a ``YoloSet``.
        names: of the points.
        file: for errors.

    Returns:
        Pairs of names, an empty list where every point is its own mirror image; None without ``flip_idx``.

    Raises:
        UserError: ``flip_idx`` is no list of pairs.
    """
    flip = _flip_indices(described, len(names), file) if names else None
    return None if flip is None else [[names[i], names[j]] for i, j in enumerate(flip) if i < j]


def _flip_indices(described: dict[str, Any], count: int, file: Path) -> list[int] | None:
    flip = described.get("flip_idx")
    if not flip:
        return None
    sound = isinstance(flip, list) and all(type(number) is int for number in flip)
    if not sound or sorted(flip) != list(range(count)) or any(flip[flip[i]] != i for i in range(count)):
        raise UserError(
            f"{file}: flip_idx has to list, for each of the {count} keypoints, its mirror image: {str(flip)[:60]}"
        )
    return list(flip)

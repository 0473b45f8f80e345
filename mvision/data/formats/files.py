"""Finding the pictures that a file of annotations names."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import unquote

from mvision.data.formats.problems import Problems
from mvision.data.formats.split import Split
from mvision.data.formats.split_names import split_of
from mvision.errors import UserError
from mvision.structures.images import IMAGE_SUFFIXES

PROBED = 50  # names by which the folder is chosen
LONGEST_END = 8  # parts of a path of another machine that may be those of a picture in the data set


def inside(name: str, split: Split) -> str:
    """``name`` as written in the annotations, relative to the images' folder, with slashes.

    An absolute path of another machine keeps its leading slash; ``PictureFiles`` looks in the data set for what it ends
    with, and never opens it.

    Raises:
        UserError: it leads out of the folder by itself; no file of annotations decides what is opened elsewhere.
    """
    name = name.replace("\\", "/")
    parts = name.split("/")
    if ".." not in parts and "" not in parts and "." not in parts and ":" not in name:
        return name
    root = os.path.normpath(split.images)
    path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118 - an absolute name has to win here to be refused
    if path.startswith(root.rstrip(os.sep) + os.sep):
        return os.path.relpath(path, root).replace(os.sep, "/")
    if name.startswith("/") and ".." not in parts and name.strip("/."):
        return "/" + posixpath.normpath(name).lstrip("/")
    raise _leaves(name, split)


def _leaves(name: str, split: Split) -> UserError:
    return UserError(
        f"{split.annotations}: file_name '{name}' leaves the folder of the images ({split.images}); write names "
        "relative to that folder"
    )


def set_root(split: Split) -> Path:
    """The folder that holds images and annotations of a split; that of the images where they lie far apart."""
    images, annotations = (Path(os.path.abspath(path)) for path in (split.images, split.annotations.parent))  # noqa: PTH100 - links stay
    try:
        common = Path(os.path.commonpath((images, annotations)))
    except ValueError:  # on two drives
        return images
    return common if common in (images, annotations, annotations.parent) else images


def places_of(names: Iterable[str], split: Split) -> dict[str, list[str]]:
    """Those of these names, from ``inside``, that several pictures of the data set can be meant with.

    Returns:
        Their files, from the root of the data set.
    """
    root, listed = set_root(split), cache(_list_folder)
    folders = [folder for folder in _folders(split) if not _is_of_another(folder, split)]
    found = {}
    for name in names:
        parent, base = posixpath.split(name)
        there = [folder / name for folder in folders if base in listed(str(folder), parent)]
        files = {os.path.realpath(path): os.path.relpath(path, root).replace(os.sep, "/") for path in there}
        if len(files) > 1:
            found[name] = list(files.values())
    return found


def _folders(split: Split) -> list[Path]:
    """The folders that names may count from, the likeliest first."""
    folders = [split.images]
    if split.yolo is None:
        folders += [split.images / split.name, *split.folders, split.annotations.parent, set_root(split)]
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _is_of_another(folder: Path, split: Split) -> bool:
    """Whether a folder is called like another split: pictures of two splits may have the same names."""
    return split_of(folder.name) not in (None, split_of(split.name.rpartition("_")[2]) or split.name)


class PictureFiles:
    """The files of a list of names.

    Names count from the folder of the images. Where none is there, they count from a folder of the split's name in it,
    from the split's further folders, from that of the annotations, or from the root of the data set. Single files that
    are still missing are looked for in these folders too, in another spelling (capitals, accents in two parts, ``%20``
    in place of a blank), and at last by their base name anywhere in the data set, if only one file has it. Paths of
    another machine, also Windows' and URLs, are looked for by as much of their end as there is.

    Attributes:
        folder: that all files are relative to.
        files: one for each name, relative to ``folder``.
        real: their paths, links followed.
        missing: positions of the names without a file.
        unlisted: paths, links followed, of further pictures in the folders of the files.
    """

    def __init__(self, split: Split, names: Sequence[str], problems: Problems) -> None:
        """Look for the files.

        Args:
            split: names the folders.
            names: from ``inside``.
            problems: gets what was found in another place than written, what is missing, and what lies outside the
                data set's folder, through links.

        Raises:
            UserError: no name has a file, or an absolute one has none in the data set.
        """
        absolute = {position for position, name in enumerate(names) if name.startswith("/")}
        names = [name.lstrip("/") for name in names]
        self._split = split
        self._root = set_root(split)
        self._list = cache(_list_folder)
        self._folders = _folders(split)
        self.folder = self._choose(names[:: max(len(names) // PROBED, 1)], problems)
        self.files = list(names)
        lost = [at for at, name in enumerate(names) if at in absolute or not self._has(self.folder, name)]
        self.missing = self._search(lost, problems) if lost else set[int]()
        for position in sorted(self.missing & absolute):
            raise _leaves(f"/{names[position]}", split)
        if len(self.missing) == len(names):
            looked = " and ".join(map(str, self._folders[:3])) or f"{split.images}, which is no folder"
            raise UserError(
                f"{split.annotations}: none of its images is there: looked for {names[0]} and others in {looked} "
                f"(file_name is relative to that folder)"
            )
        for position in sorted(self.missing):
            problems.add("image that is not there: never shown", self.files[position])
        self.real = self._follow_links(problems)
        self.unlisted = self._find_unlisted()

    def _choose(self, probes: Sequence[str], problems: Problems) -> Path:
        """The folder with most of the files; says it where others have as many of the same names."""
        found = {folder: {name for name in probes if self._has(folder, name)} for folder in self._folders}
        most = max(map(len, found.values()), default=0)
        if not most:
            return self._split.images
        chosen, *others = (folder for folder, names in found.items() if len(names) == most)
        real = os.path.realpath(chosen)
        rivals = [
            folder
            for folder in others
            if found[folder] & found[chosen]
            and os.path.realpath(folder) != real
            and not _is_of_another(folder, self._split)
        ]
        if rivals:
            name = next(name for name in probes if name in found[chosen] & found[rivals[0]])
            taken, *left = (os.path.relpath(folder / name, self._root) for folder in (chosen, *rivals[:5]))
            kind = (
                "folder of pictures that have namesakes in others: taken; if another is meant, write it into file_name"
            )
            problems.add(kind, f"{taken}, not {', '.join(left)}")
        return chosen

    def _has(self, folder: Path, name: str) -> bool:
        parent, _, base = name.rpartition("/")
        return base in self._list(str(folder), parent)

    def _search(self, lost: Sequence[int], problems: Problems) -> set[int]:
        """Other places of these names; returns the positions of those that have none."""
        elsewhere: dict[int, Path] = {}
        missing = set()
        bases = Counter(_base(self.files[position]) for position in lost)
        found = {at: self._other_place(self.files[at], bases[_base(self.files[at])] == 1) for at in lost}
        claims = Counter(path for _, path in {(self.files[at], path) for at, path in found.items()})
        for position, path in found.items():
            if path is None or claims[path] > 1:  # one picture cannot be two images
                missing.add(position)
                continue
            elsewhere[position] = path
            said = f"{self.files[position]}: {os.path.relpath(path, self._root)}"
            problems.add("file_name that is not there as written: taken from another place of the data set", said)
        if elsewhere:
            folders = [self.folder, *(path.parent for path in elsewhere.values())]
            base = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))  # noqa: PTH100
            for position, name in enumerate(self.files):
                path = elsewhere.get(position, self.folder / name)
                self.files[position] = os.path.relpath(path, base).replace(os.sep, "/")
            self.folder = base
        return missing

    def _other_place(self, name: str, only_one: bool) -> Path | None:
        if self._split.yolo is not None:
            return None
        names = [name]
        if "%" in name:  # as in a URL: my%20pic.png
            names.append(inside(unquote(name), self._split).lstrip("/"))
        for spelled in names:
            for folder in self._folders:
                if self._has(folder, spelled):
                    return folder / spelled
            parent, base = posixpath.split(spelled)
            alike = [entry for entry in self._list(str(self.folder), parent) if _spelling(entry) == _spelling(base)]
            if len(alike) == 1:
                return self.folder / parent / alike[0]
        for spelled in names:
            parts = spelled.split("/")
            for start in range(max(1, len(parts) - LONGEST_END), len(parts) - 1):
                end = "/".join(parts[start:])
                there = [folder / end for folder in self._folders if self._has(folder, end)]
                if there:
                    return there[0] if len({os.path.realpath(path) for path in there}) == 1 else None
        for spelled in names if only_one else ():
            named = self._by_base.get(_spelling(posixpath.basename(spelled)), [])
            if len(named) == 1:
                return named[0]
        return None

    @cached_property
    def _by_base(self) -> dict[str, list[Path]]:
        """Every file of the data set by its base name; hidden folders apart."""
        found: dict[str, list[Path]] = {}
        for folder, below, files in os.walk(self._root):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in files:
                found.setdefault(_spelling(name), []).append(Path(folder, name))
        return found

    def _follow_links(self, problems: Problems) -> list[str]:
        """The real path of every file. Those outside the data set are read, as the user made the links, and counted."""
        root = os.path.realpath(self._root).rstrip(os.sep) + os.sep
        folders: dict[str, tuple[str, dict[str, bool]]] = {}
        paths = []
        for position, name in enumerate(self.files):
            parent, _, base = name.rpartition("/")
            if parent not in folders:
                real = os.path.realpath(self.folder / parent)
                folders[parent] = f"{real.rstrip(os.sep)}{os.sep}", self._list(str(self.folder), parent)
            folder, entries = folders[parent]
            path = os.path.realpath(folder + base) if entries.get(base, False) else folder + base
            paths.append(path)
            # Those of a YOLO set were counted when they were found.
            if self._split.yolo is None and position not in self.missing and not path.startswith(root):
                problems.add(f"picture outside {self._root}, through links: read from there", f"{name}: {path}")
        return paths

    def _find_unlisted(self) -> list[str]:
        named: dict[str, set[str]] = {}
        for name in self.files:
            parent, _, base = name.rpartition("/")
            named.setdefault(parent, set()).add(base)
        found = []
        for parent, bases in named.items():
            folder = os.path.realpath(self.folder / parent) + os.sep
            others = self._list(str(self.folder), parent).keys() - bases
            found += [folder + name for name in others if name[:1] != "." and _suffix(name) in IMAGE_SUFFIXES]
        return sorted(found)


def _base(name: str) -> str:
    return posixpath.basename(unquote(name))


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower()


def _list_folder(folder: str, parent: str) -> dict[str, bool]:
    """The files in a folder, and whether each is a link; empty where there is no such folder."""
    try:
        with os.scandir(os.path.join(folder, parent)) as entries:  # noqa: PTH118
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # not there, not readable, a name with a zero byte
        return {}


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

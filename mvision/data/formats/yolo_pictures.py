"""The pictures of a YOLO data set and their label files, found in folders, through links and from lists.

Paths are taken as they are written: a link keeps its own name, and only where that leads to nothing does the place
count that it points to. So a folder of links to pictures elsewhere has its label files here.
"""

# ruff: noqa: PTH118, PTH120, PTH122, PTH114, PTH206
# Paths are texts here: data sets have a million pictures, and a Path takes ten times as long.

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mvision.data.formats.problems import Problems
from mvision.errors import UserError
from mvision.storage.text_files import read_text
from mvision.structures.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES

LIST_SUFFIX = ".txt"
MAX_LIST = 256 * 2**20  # bytes of a list: a million pictures take a hundred
PICTURES, LABELS = "images", "labels"  # a label file lies in the folder called labels beside the one called images
NO_PICTURES = frozenset(
    {*(".txt", ".json", ".xml", ".yaml", ".yml", ".csv", ".tsv", ".md", ".html", ".pdf", ".py", ".ipynb"), ".cache"}
    | {".npy", ".npz", ".pkl", ".db", ".ini", ".lnk", ".log", ".zip", ".data", ".names", ".cfg"}
)  # what lies beside pictures without being one; a file with any other ending might have been meant as one
NO_LABELS = frozenset({"classes", "labels", "train", "val", "valid", "test", "readme", "notes", "license"})
SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class Folders:
    """What lies in folders; every folder is read once."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, os.DirEntry[str]]] = {}
        self._any_case: dict[str, dict[str, list[str]]] = {}

    def entries(self, folder: str) -> dict[str, os.DirEntry[str]]:
        """By name, what lies in a folder; nothing where there is no such folder or it cannot be read."""
        found = self._entries.get(folder)
        if found is None:
            try:
                with os.scandir(folder) as entries:
                    found = {entry.name: entry for entry in entries}
            except OSError:
                found = {}
            self._entries[folder] = found
        return found

    def entry(self, folder: str, name: str) -> os.DirEntry[str] | None:
        """One of them by its name, which may be written in another case where there is just one like it."""
        entries = self.entries(folder)
        if name in entries or not entries:
            return entries.get(name)
        if folder not in self._any_case:
            alike: dict[str, list[str]] = {}
            for other in entries:
                alike.setdefault(other.casefold(), []).append(other)
            self._any_case[folder] = alike
        others = self._any_case[folder].get(name.casefold(), [])
        return entries[others[0]] if len(others) == 1 else None

    def descend(self, folder: str, parts: Sequence[str]) -> str | None:
        """The folder below ``folder`` that ``parts`` lead to; None where there is none."""
        for part in parts:
            entry = self.entry(folder, part)
            if entry is None or not entry.is_dir():
                return None
            folder = entry.path
        return folder


@dataclass
class Found:
    """The pictures of a split.

    Attributes:
        pictures: absolute paths as they are written, in the order of the sources, folders sorted.
        walked: the sources that are folders.
    """

    pictures: list[str] = field(default_factory=list)
    walked: list[str] = field(default_factory=list)


def find_pictures(sources: Sequence[Path], roots: Sequence[Path], folders: Folders, problems: Problems) -> Found:
    """The pictures of a split's sources: folders with everything below them, lists, single pictures.

    Args:
        sources: absolute paths.
        roots: the folders of the data set; the lines of a list may be relative to them.
        folders: keeps what was read, for the search of label files.
        problems: gets what was left out, and pictures that are there more than once.

    Raises:
        UserError: a list that cannot be read, or of which not one picture is there.
    """
    found = Found()
    for source in sources:
        if source.suffix.lower() == LIST_SUFFIX and source.is_file():
            found.pictures += _listed(source, roots, folders, problems)
        elif source.is_file():
            found.pictures.append(str(source))
        else:
            found.walked.append(str(source))
            below = _walk(str(source), folders, problems)
            found.pictures += sorted(below, key=lambda path: path.split(os.sep))
    times: dict[str, int] = {}
    for path in found.pictures:
        times[path] = times.get(path, 0) + 1
    for path, number in times.items():
        if number > 1:
            problems.add("image listed several times: it counts as often", f"{shown(path, roots)}: {number} times")
    _count_outside(times, roots, problems)
    return found


def common_folder(sources: Sequence[Path], roots: Sequence[Path]) -> Path:
    """The folder that file names are made relative to: the source itself, or what is common to several and to all
    pictures of a list.

    Raises:
        UserError: a list that cannot be read, or of which not one picture is there.
    """
    folders = Folders()
    parts = set()
    for source in sources:
        parts.add(str(source) if source.is_dir() else str(source.parent))
        if source.suffix.lower() == LIST_SUFFIX and source.is_file():
            parts |= {os.path.dirname(path) for path in _listed(source, roots, folders, Problems())}
    return Path(os.path.commonpath(parts))


def found_by_tail(path: str, roots: Sequence[Path], folders: Folders) -> Path | None:
    """A path of another machine below the data set: its longest end that is there; None where there is none.

    The end may not begin below a folder called like a split: ``/x/train/images`` is not the ``images`` of this set.
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        for root in roots:
            folder = folders.descend(str(root), parts[start:-1])
            entry = folders.entries(folder).get(parts[-1]) if folder is not None else None
            if entry is not None:
                return Path(entry.path)
        if parts[start].casefold() in SPLIT_FOLDERS:
            return None
    return None


def shown(path: str, roots: Sequence[Path]) -> str:
    """A path for the user: relative to the data set where it lies in it."""
    for root in roots:
        if path.startswith(f"{root}{os.sep}"):
            return path[len(str(root)) + 1 :].replace(os.sep, "/")
    return path


def _walk(top: str, folders: Folders, problems: Problems) -> list[str]:
    """Pictures in a folder and all below it. Links are followed, but not to a folder read before, and not upwards."""
    pictures: list[str] = []
    queue, linked = [top], list[str]()
    seen: set[str] = set()
    real_top = os.path.realpath(top)
    while queue or linked:
        # Links come last, so that a folder of the set counts under its own name.
        folder = queue.pop() if queue else linked.pop(0)
        real = os.path.realpath(folder)
        if real in seen or real_top.startswith(os.path.join(real, "")):
            problems.add("link to a folder that was read before, or to one above: not followed", folder)
            continue
        seen.add(real)
        for name, entry in folders.entries(folder).items():
            suffix = os.path.splitext(name)[1].lower()
            if entry.is_dir():
                if name.startswith("."):
                    problems.add("hidden folder: left out", entry.path)
                else:
                    (linked if entry.is_symlink() else queue).append(entry.path)
            elif name.startswith("."):
                if suffix in IMAGE_SUFFIXES:
                    problems.add("hidden file that is called like an image: left out", entry.path)
            elif suffix in IMAGE_SUFFIXES:
                if entry.is_file():
                    pictures.append(entry.path)
                else:
                    problems.add("link that leads nowhere, or no file: left out", entry.path)
            elif suffix not in NO_PICTURES:
                ending = f"the ending {suffix}" if suffix else "no ending"
                why = "for which there is no decoder" if suffix in UNREADABLE_SUFFIXES else "which no image has"
                problems.add(f"file with {ending}, {why}: left out", entry.path)
    return pictures


def _listed(file: Path, roots: Sequence[Path], folders: Folders, problems: Problems) -> list[str]:
    """Pictures named in a text file, one a line: relative to the file, to the data set, or of another machine."""
    text, encoding = read_text(file, MAX_LIST)
    if encoding != "UTF-8":
        problems.add(f"list in {encoding}: read", str(file))
    bases = [str(base) for base in dict.fromkeys([file.parent, *roots])]
    pictures: list[str] = []
    lines = [line.strip().strip("\"'") for line in text.splitlines()]
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        path = _first_there(line, bases, folders)
        if path is None and (by_tail := found_by_tail(line, roots, folders)) is not None:
            path = str(by_tail)
            problems.add("image listed with a path of another machine: found by its end", f"{line} -> {path}")
        if path is None:
            problems.add("image that is listed but not there: left out", f"{file.name}, line {number}: {line}")
        else:
            pictures.append(path)
    if not pictures:
        first = next((line for line in lines if line), "")
        looked = " and ".join(os.path.join(base, first) for base in bases)
        raise UserError(
            f"{file}: {f'none of its images is there: looked for {looked}' if first else 'no images are listed in it'}"
        )
    return pictures


def _first_there(line: str, bases: Sequence[str], folders: Folders) -> str | None:
    for name in (line, line.replace("\\", "/")) if "\\" in line else (line,):
        for base in bases:
            path = os.path.normpath(os.path.join(base, name))
            folder, file = os.path.split(path)
            entry = folders.entries(folder).get(file)
            if entry is not None and entry.is_file():
                return path
    return None


def _count_outside(pictures: dict[str, int], roots: Sequence[Path], problems: Problems) -> None:
    """Links and lists may lead anywhere, which is common and said."""
    inside = tuple(os.path.join(os.path.realpath(root), "") for root in roots)
    real_folders: dict[str, str] = {}
    for path in pictures:
        folder, name = os.path.split(path)
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        real = f"{real_folders[folder]}{os.sep}{name}"
        if os.path.islink(path):
            real = os.path.realpath(path)
        if not real.startswith(inside):
            way = "through links" if any(path.startswith(f"{root}{os.sep}") for root in roots) else "as it is listed"
            to = f" -> {real}" if real != path else ""
            problems.add(f"image outside {roots[-1]}, {way}: used", f"{shown(path, roots)}{to}")


class LabelFiles:
    """Finds the label files of pictures."""

    def __init__(self, roots: Sequence[Path], folders: Folders) -> None:
        """Prepare the search.

        Args:
            roots: the folders of the data set. Above them, a folder called images has no meaning.
            folders: keeps what was read.
        """
        self.roots = [str(root) for root in roots]
        self.folders = folders
        self._places: dict[str, list[str]] = {}
        self.used: dict[str, str] = {}  # label file -> the picture that it belongs to

    def find(self, picture: str) -> str | None:
        """The label file: as the picture's path is written, beside the picture, then the same where links lead to."""
        folder, name = os.path.split(picture)
        found = self._in_places(folder, name)
        if found is None:
            real = os.path.realpath(picture)
            if real != picture:
                found = self._in_places(*os.path.split(real))
        return found

    def looked_for(self, picture: str) -> list[str]:
        """The paths of a label file that this picture might have, whether there are such folders or not."""
        folder, name = os.path.split(picture)
        stem = os.path.splitext(name)[0]
        swapped = [self._swapped(parts, at) for parts, at in self._swaps(folder)]
        return [os.path.join(place, f"{stem}.txt") for place in dict.fromkeys([*swapped, folder])]

    def orphans(self, found: Found) -> Iterator[str]:
        """Label files in the folders that belong to the split's pictures, without a picture.

        A picture of another split in the same folder counts, and so does one that cannot be read or has an unknown
        ending: that is said elsewhere.
        """
        stems: dict[str, set[str]] = {}
        of_pictures = dict.fromkeys(os.path.dirname(picture) for picture in found.pictures)
        beside = of_pictures.keys() & {os.path.dirname(file) for file in self.used}
        for folder in of_pictures:
            names = {os.path.splitext(name)[0].casefold() for name in self._others(folder)}
            for place in self.places(folder):
                if place != folder or place in beside:
                    stems.setdefault(place, set()).update(names)
        queue = list(stems)
        for source in found.walked:
            queue += self.places(source)[:-1]
        seen = set()
        while queue:
            place = queue.pop(0)
            if place in seen:
                continue
            seen.add(place)
            for name, entry in self.folders.entries(place).items():
                stem, suffix = os.path.splitext(name.casefold())
                if name.startswith(".") or entry.path in self.used:
                    continue
                if suffix == ".txt" and stem not in stems.get(place, ()) and stem not in NO_LABELS:
                    yield entry.path
                elif place not in beside and entry.is_dir() and not entry.is_symlink():
                    queue.append(entry.path)

    def places(self, folder: str) -> list[str]:
        """Folders in which the label files of the pictures of a folder may lie, that folder itself last."""
        places = self._places.get(folder)
        if places is None:
            places = []
            for parts, at in self._swaps(folder):
                place = self._there(parts, at)
                if place is not None:
                    places.append(place)
            places = [*dict.fromkeys(places), folder]
            self._places[folder] = places
        return places

    def _in_places(self, folder: str, name: str) -> str | None:
        stem = os.path.splitext(name)[0]
        for place in self.places(folder):
            entry = self.folders.entry(place, f"{stem}.txt")
            if entry is not None and not entry.is_dir():
                return entry.path  # also a link that leads nowhere: the image is labelled, nobody knows how
        return None

    def _others(self, folder: str) -> Iterator[str]:
        return (name for name in self.folders.entries(folder) if not name.lower().endswith(".txt"))

    def _swaps(self, folder: str) -> Iterator[tuple[list[str], int]]:
        """The parts of a path, and the positions of folders called images in it, the last one first."""
        parts = folder.split(os.sep)
        inside = [len(root.split(os.sep)) for root in self.roots if f"{folder}{os.sep}".startswith(f"{root}{os.sep}")]
        first = min(inside, default=0)
        positions = [at for at in range(len(parts) - 1, first - 1, -1) if parts[at].casefold() == PICTURES]
        # Outside the data set nobody knows where a set begins: only the last one counts.
        yield from ((parts, at) for at in (positions if inside else positions[:1]))

    def _swapped(self, parts: list[str], at: int) -> str:
        return os.sep.join([*parts[:at], _in_case_of(parts[at], LABELS), *parts[at + 1 :]])

    def _there(self, parts: list[str], at: int) -> str | None:
        """The folder with ``labels`` in place of ``images``, in any case; that in the same case first."""
        above = os.sep.join(parts[:at]) or os.sep
        wanted = (_in_case_of(parts[at], LABELS), LABELS)
        names = [name for name in self.folders.entries(above) if name.casefold() == LABELS]
        for name in sorted(names, key=lambda name: (name != wanted[0], name != wanted[1], name)):
            folder = self.folders.descend(os.path.join(above, name), parts[at + 1 :])
            if folder is not None:
                return folder
        return None


def _in_case_of(example: str, word: str) -> str:
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[:1].isupper() else word

"""The images of an annotation file: checked, found on disk, and each of them once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvision.data.formats.files import PictureFiles, inside, places_of
from mvision.data.formats.numbers import whole_number
from mvision.data.formats.problems import Problems
from mvision.data.formats.split import Split
from mvision.errors import UserError
from mvision.structures.images import BadImage, image_size

MOST_PIXELS = 2**32 - 1  # of an image: run lengths are counted in 32 bits


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split: the data set's id, the file, and height and width in pixels as the annotations assume."""

    id: int
    file: str
    height: int
    width: int


@dataclass
class Images:
    """All images of a split.

    Attributes:
        folder: the folder that the records' ``file`` are relative to.
        records: the images, in the file's order.
        positions: the image ids of the file -> position in ``records``.
        broken: positions of the images that are not there or no pictures, as far as is known without reading them.
        real_files: the path of every image's file, links followed.
        unlisted: those of further pictures beside them.
        left_out: image ids of the file that have no record, as their pictures cannot be told; named and counted.
    """

    folder: Path
    records: list[ImageRecord]
    positions: dict[int, int]
    broken: set[int]
    real_files: list[str]
    unlisted: list[str]
    left_out: frozenset[int] = frozenset()


def read_images(raw: dict[str, Any], split: Split, problems: Problems) -> Images:
    """Read ``images`` of a COCO dictionary.

    A picture that several entries list (a merge of two exports) becomes one record, with the labels of all of them. The
    entries are left out where their name stands for several files: each may mean another.

    Raises:
        UserError: no images, an entry without whole number as id or without file_name, an id with two files, a file
            outside the folder, or none of the files is there or can be told from others.
    """
    where = str(split.annotations)
    positions: dict[int, int] = {}
    position_of: dict[str, int] = {}
    entries: list[tuple[int, str, tuple[int, int] | None]] = []
    identities = [_identity(entry, number, split) for number, entry in enumerate(raw["images"])]
    left_out = _leave_out(identities, split, problems)
    for (identity, name), entry in zip(identities, raw["images"]):
        if identity in left_out:
            continue
        # YOLO's sizes come from the files themselves.
        size = _size(entry, name, problems if split.yolo is None else Problems())
        if identity in positions and entries[positions[identity]][1] != name:
            other = entries[positions[identity]][1]
            raise UserError(f"{where}: image id {identity} occurs twice ({other}, {name})")
        # Known by its id, else by its name; a list of pictures of YOLO may repeat one on purpose.
        same = positions.get(identity, position_of.get(name) if split.yolo is None else None)
        if same is not None and (identity in positions or entries[same][2] == size):
            problems.add(
                "picture in several image entries: read once, with the labels of all of them",
                f"{name}, ids {entries[same][0]} and {identity}",
            )
            positions[identity] = same
            continue
        if same is not None:
            problems.add(
                "picture in several image entries that differ in height and width: read once for each",
                f"{name}, {_text(entries[same][2])} and {_text(size)}",
            )
        positions[identity] = position_of[name] = len(entries)
        entries.append((identity, name, size))
    if not entries:
        raise UserError(f"{where}: no images in it")
    files = PictureFiles(split, [name for _, name, _ in entries], problems)
    broken = set(files.missing)
    records = []
    for position, ((identity, _, size), file) in enumerate(zip(entries, files.files)):
        if size is None:
            size = None if position in broken else _size_of_file(files.folder / file, file, problems)
            if size is None:
                broken.add(position)
        records.append(ImageRecord(identity, file, *(size or (1, 1))))
    return Images(files.folder, records, positions, broken, files.real, files.unlisted, left_out)


def _leave_out(identities: Sequence[tuple[int, str]], split: Split, problems: Problems) -> frozenset[int]:
    """The ids of entries that share a name without folder which is that of several files."""
    ids = dict(identities)
    if split.yolo is not None or len(ids) == len(set(ids.values())) or len(ids) < len(set(identities)):
        return frozenset()  # YOLO's lists give paths; every name occurs once; or an id has two names, and is refused
    count = Counter(ids.values())
    places = places_of((name for name, number in count.items() if number > 1 and "/" not in name), split)
    of_name: dict[str, list[int]] = {}
    for identity, name in ids.items():
        if name in places:
            of_name.setdefault(name, []).append(identity)
    said = [
        f"{name}, ids {' and '.join(map(str, of_name[name][:5]))}: {', '.join(files[:5])}"
        for name, files in places.items()
    ]
    if said and len(places) == len(count):
        raise UserError(
            f"{split.annotations}: which pictures are meant cannot be told, as several image entries and several files "
            f"have the same name ({said[0]}); write the folder into file_name"
        )
    kind = (
        "file_name of several image entries and several files: left out with their labels, as which picture is meant "
        "cannot be told; write the folder into file_name"
    )
    for place in said:
        problems.add(kind, place)
    return frozenset(identity for ids in of_name.values() for identity in ids)


def _identity(entry: Any, number: int, split: Split) -> tuple[int, str]:
    """Id and file name of an entry."""
    identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
    if identity is None:
        raise UserError(f"{split.annotations}: images[{number}] has no whole number as id: {entry!r:.200}; number them")
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{split.annotations}: image {identity} has no file_name")
    return identity, inside(name, split)


def _size(entry: dict[str, Any], where: str, problems: Problems) -> tuple[int, int] | None:
    """Height and width as annotated; None where they are missing or cannot be true."""
    height, width = whole_number(entry.get("height")), whole_number(entry.get("width"))
    if height is None or width is None or min(height, width) < 1:
        problems.add("image without height and width in the annotations: taken from the file", where)
        return None
    if height * width > MOST_PIXELS:
        problems.add("image with an impossible height and width: taken from the file", f"{where}: {width} x {height}")
        return None
    return height, width


def _size_of_file(path: Path, name: str, problems: Problems) -> tuple[int, int] | None:
    try:
        height, width, _ = image_size(path)
    except BadImage as error:
        problems.add("image that cannot be read: never shown", f"{name}: {error.reason}")
        return None
    return height, width


def _text(size: tuple[int, int] | None) -> str:
    return "without size" if size is None else f"{size[1]} x {size[0]}"

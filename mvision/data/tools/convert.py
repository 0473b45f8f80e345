"""``mvision data convert``: a data set of any layout, written as ``images/`` + ``annotations/{train,val}.json``."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import Layout, find_layout, usual_splits
from mvision.data.formats.problems import Problems
from mvision.errors import UserError
from mvision.machine import cores
from mvision.structures.images import BadImage, read_image

# What does not survive in JSON or on other systems: control characters, backslashes (folders in names from Windows) and
# bytes that are no UTF-8.
ODD = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


def convert(
    layout: Layout,
    destination: str | Path,
    splits: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
    problems: Problems | None = None,
) -> Layout:
    """Copy images and write the usable annotations of each split.

    Images are copied to ``images/SPLIT/``, so that two splits may have files of the same name. A file is copied only if
    it decodes as a picture: a link to anything else would put its content into the new data set. The destination
    appears when everything is written; after an error there is none.

    Args:
        layout: from ``find_layout``.
        destination: a folder that does not exist yet, or is empty.
        splits: names; None: train, val and test where they exist, else all.
        progress: called with the number of images just copied.
        problems: gets what was left out or mended in the annotations, and what was left out or renamed by copying.

    Returns:
        The new layout.

    Raises:
        UserError: the destination holds something or cannot be written, a split does not exist, its annotations are
            broken, or none of its images can be read.
    """
    target = Path(destination).expanduser()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"{target}: is there already and not empty; choose a new folder")
    chosen = [CocoSplit(layout.split(name, FIELDS), FIELDS) for name in (splits or usual_splits(layout))]
    said = Problems() if problems is None else problems
    for left in sorted(target.parent.glob(_hidden(target, "*"))):
        said.add("folder that a conversion left when it was killed: delete it", str(left))
    try:
        with _whole_folder(target) as folder:
            (folder / "annotations").mkdir()
            for split in chosen:
                for problem in split.problems:
                    for place in problem.examples:
                        said.add(problem.kind, f"{split.split.name}: {place}", problem.field)
                _convert_split(split, folder, said, progress)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); nothing was left there") from error
    return find_layout(target)


@dataclass
class _Names:
    """File names in the new data set: inside its folder, legal everywhere, and one for each source."""

    problems: Problems
    of_source: dict[Path, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def name(self, source: Path, file: str, split: str) -> str:
        """The name of a source below ``images/``."""
        if source in self.of_source:
            return self.of_source[source]
        parts = [ODD.sub("_", part) for part in file.split("/") if part not in ("", ".", "..")]
        wanted = "/".join(parts)
        stem, suffix = os.path.splitext(wanted)  # noqa: PTH122 - of the whole path
        name, number = wanted, 1
        while name.casefold() in self.taken:  # "A.jpg" and "a.jpg" are one file on Windows and macOS
            number += 1
            name = f"{stem}-{number}{suffix}"
        if name != file:
            self.problems.add("image copied under another name", f"{split}: {file} as {name}")
        self.taken.add(name.casefold())
        self.of_source[source] = f"{split}/{name}"
        return self.of_source[source]


def _convert_split(
    split: CocoSplit, target: Path, problems: Problems, progress: Callable[[int], object] | None
) -> None:
    name, tree = split.split.name, split.coco_dict
    names = _Names(problems)
    work = [
        (split.folder / image["file_name"], names.name(split.folder / image["file_name"], image["file_name"], name))
        for image in tree["images"]
    ]
    objects = dict.fromkeys((image["id"] for image in tree["images"]), 0)
    for annotation in tree["annotations"]:
        objects[annotation["image_id"]] += 1
    kept, reason = [], ""
    with ThreadPoolExecutor(cores()) as pool:
        copied = pool.map(lambda pair: _copy_picture(pair[0], target / "images" / pair[1]), work)
        for position, (image, (_, file), reason) in enumerate(zip(tree["images"], work, copied)):
            if not reason:
                kept.append({**image, "file_name": file})
            elif position not in split.broken:  # else it was named when the annotations were read
                count = objects[image["id"]]
                place = f"{name}: {image['file_name']}: {reason}, {count} object{'s' * (count != 1)}"
                problems.add("image that cannot be read: left out with its objects", place)
            if progress is not None:
                progress(1)
    if not kept:
        raise UserError(f"{split.split.annotations}: none of its {len(work)} images can be read: {reason}")
    identities = {image["id"] for image in kept}
    annotations = [annotation for annotation in tree["annotations"] if annotation["image_id"] in identities]
    text = json.dumps({"images": kept, "annotations": annotations, "categories": tree["categories"]})
    (target / "annotations" / f"{name}.json").write_text(text, encoding="utf-8")


def _copy_picture(source: Path, target: Path) -> str:
    """Copy a file that decodes as a picture; returns why it was not copied, or nothing.

    Raises:
        OSError: the copy cannot be written.
    """
    try:
        read_image(source, at_least=(1, 1))
    except BadImage as error:
        return error.reason
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():  # several entries of one file
        shutil.copyfile(source, target)
        shutil.copystat(source, target)
        target.chmod(target.stat().st_mode | 0o600)  # a picture from a read-only folder may be changed in a copy
    return ""


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside ``target`` that takes its name at the end, and is removed after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(_hidden(target, secrets.token_hex(6)))
    folder.mkdir()
    try:
        yield folder
        if target.is_dir():  # it is empty
            target.rmdir()
        folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(target: Path, token: str) -> str:
    return f".{glob.escape(target.name) if token == '*' else target.name}.{token}.partial"

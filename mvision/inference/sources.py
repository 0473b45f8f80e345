"""The sources of a prediction: image files, folders, globs, videos, streams and cameras.

Names are looked up first, so that a misspelt one is reported before any work; ``mvision.inference.reading`` decodes
what was found.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from mvision.errors import UserError
from mvision.inference.streams import check_url, hide_password, is_picture, is_url, name_of_url
from mvision.structures.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, BadImage, image_size, picture_header

VIDEO_SUFFIXES = frozenset(
    (
        *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg"),
        *(".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    )
)
MOVING = frozenset({".gif", ".apng"})  # pictures that are videos where they have several frames
VIDEO_DEVICE = re.compile(r"/dev/video(\d+)")


@dataclass(frozen=True)
class Source:
    """One image file, video file, stream or camera.

    Attributes:
        kind: one of the four.
        path: the file, as the user wrote it or its folder; a URL; a camera's number as text.
        name: the path below the folder that was given, with forward slashes; for a file that was given, its name.
        required: the user named this file itself (not its folder or a glob), so it has to be readable.
        image_id: the number of the image in the data set that it is from; None: it is numbered where it is predicted.
        size: the (height, width) that the data set's annotations of it are for; None: those of the picture.
    """

    kind: Literal["image", "video", "stream", "camera"]
    path: str
    name: str
    required: bool = True
    image_id: Any = None
    size: tuple[int, int] | None = None

    @property
    def shown(self) -> str:
        """The path for messages and results, without the password of a URL."""
        return hide_password(self.path)

    @property
    def is_live(self) -> bool:
        """Whether it may have no end, so that Ctrl-C is how it is ended."""
        return self.kind in ("stream", "camera")

    @property
    def never_ends(self) -> bool:
        """Whether what is behind it would never be read: a video of a web server, unlike other streams, has an end."""
        return self.is_live and not self.path.lower().startswith(("http://", "https://"))


class Sources(list[Source]):
    """Sources, and what was left out of the folders and globs.

    Attributes:
        left_out: the number of files by their ending, or by the reason.
        example: a picture that was left out because there is no decoder for its ending.
        outside: number of sources that lie outside their folder and are reached through links.
        skipped: (folder, reason) of each folder that cannot be read.
    """

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        super().__init__(sources)
        self.left_out: Counter[str] = Counter()
        self.example = ""
        self.outside = 0
        self.skipped: list[tuple[str, str]] = []

    def notes(self) -> list[str]:
        """Lines for the user."""
        lines = []
        if self.left_out:
            what = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
            lines.append(f"left out {self.left_out.total()} files: {what}")
        if self.example:
            lines.append(f"there is no decoder for some of them, such as {self.example}: convert them to PNG or JPEG")
        if self.outside:
            lines.append(f"{self.outside} sources lie outside the given folders, through links")
        return lines


def find_sources(sources: Sequence[str | Path], leave_out: Path | None = None) -> Sources:
    """Look up sources, in the order given; files in folders (at any depth) and of globs are sorted by name.

    Args:
        sources: image or video files, folders, globs (``**`` is any depth), camera numbers ("0"), or URLs, see
            ``mvision.inference.streams``.
        leave_out: a folder whose files are ignored, such as an earlier run's output inside the folder of pictures.

    Raises:
        UserError: a missing path, a folder or glob without pictures, an empty list, a URL of another kind or of a host
            that does not answer, or something behind a camera or live stream.
    """
    found = Sources()
    for source in sources:
        text = os.fspath(source)
        path = Path(text)
        if not text.strip():
            raise UserError("source '': no name; for the folder that you are in, give '.'")
        try:
            is_there, is_folder = path.exists(), path.is_dir()
        except (OSError, ValueError) as error:  # a folder above that may not be read, a name too long, or no name
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"source {text}: cannot be looked up ({reason})") from error
        if is_folder:
            _in_folder(path, leave_out, found)
        elif device := VIDEO_DEVICE.fullmatch(text):
            found.append(Source("camera", device[1], f"camera-{device[1]}"))
        elif is_there:
            found.append(_file(path, text))
        elif text.isdecimal():
            found.append(Source("camera", text, f"camera-{text}"))
        elif is_url(text):
            found.append(_url(text))
        elif glob.has_magic(text):
            _in_glob(text, leave_out, found)
        else:
            raise UserError(f"source {text}: no such file or folder")
    once = list({(source.kind, source.path): source for source in reversed(found)}.values())[::-1]
    if len(once) < len(found):
        found.left_out["named twice"] += len(found) - len(once)
        found[:] = once
    if not found:
        raise UserError(
            "no source given: name images, a folder, a glob such as 'photos/*.jpg', a video, a URL or a camera"
        )
    for live, behind in pairwise(found):
        if live.never_ends:
            raise UserError(
                f"source {live.shown}: {'a camera' if live.kind == 'camera' else 'a live stream'} never ends, so that "
                f"{behind.shown} would never be read; one live source in a command, as the last one"
            )
    return found


def _file(path: Path, text: str) -> Source:
    """A file that the user named; without a known ending, its content tells whether it is a picture."""
    if not path.is_file():
        raise UserError(f"source {text}: neither a file nor a folder")
    kind = _kind(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES | UNREADABLE_SUFFIXES | VIDEO_SUFFIXES:
        try:
            image_size(path)
        except BadImage:
            kind = "video"
    return Source(kind, text, path.name)


def _url(text: str) -> Source:
    check_url(text)
    return Source("image" if is_picture(text) else "stream", text, name_of_url(text))


def _kind(path: Path) -> Literal["image", "video"]:
    suffix = path.suffix.lower()
    if suffix in MOVING:
        try:
            return "video" if picture_header(path).several else "image"
        except BadImage:
            return "image"  # which is reported when it is read
    return "video" if suffix in VIDEO_SUFFIXES else "image"


def _in_folder(folder: Path, leave_out: Path | None, found: Sources) -> None:
    def refuse(error: OSError) -> None:
        reason = f"cannot be read ({error.strerror})"
        if error.filename == os.fspath(folder):
            raise UserError(f"source {folder}: {reason}") from error
        found.skipped.append((str(error.filename), reason))

    top = folder.resolve()
    files, visited = [], {top}
    elsewhere: set[str] = set()  # folders that are reached through a link out of the given one
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        is_elsewhere = str(Path(root)) in elsewhere
        files += [(Path(root) / name, is_elsewhere) for name in names]
        kept = []
        for name in folders:
            inner = Path(root) / name
            if name.startswith("."):
                found.left_out["hidden folders"] += 1
                continue
            if is_elsewhere or inner.is_symlink():
                target = inner.resolve()
                if target in visited or target.is_relative_to(top):
                    continue  # the same pictures a second time
                if top.is_relative_to(target):
                    found.left_out["links to a folder above"] += 1
                    continue
                visited.add(target)
                elsewhere.add(str(inner))
            kept.append(name)
        folders[:] = kept
    _add(files, folder, leave_out, found, f"{folder}: no image or video in this folder")


def _in_glob(pattern: str, leave_out: Path | None, found: Sources) -> None:
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    # Unlike Path.glob, this takes patterns with a folder in front, absolute or not.
    files = [(Path(name), False) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    files = [file for file in files if not file[0].is_dir()]
    _add(files, Path(*parts[:fixed]), leave_out, found, f"{pattern}: matches no image or video")


def _add(files: list[tuple[Path, bool]], root: Path, leave_out: Path | None, found: Sources, problem: str) -> None:
    """Add the files with a known suffix in natural order; count hidden ones, those below ``leave_out``, and others.

    Args:
        files: each with whether it lies in a folder outside.

    Raises:
        UserError: there are none; ``problem`` is the message.
    """
    top = root.resolve()
    excluded = None
    if leave_out is not None and top in leave_out.resolve().parents:
        excluded = f"{leave_out.resolve().relative_to(top).as_posix()}/"
    pictures: list[Source] = []
    left_out: Counter[str] = Counter()
    for file, is_outside in files:
        name = file.relative_to(root).as_posix()
        reason = _left_out(file, name, excluded)
        if reason:
            left_out[reason] += 1
            if file.suffix.lower() in UNREADABLE_SUFFIXES and reason.startswith("."):
                found.example = found.example or name
            continue
        pictures.append(Source(_kind(file), str(file), name, required=False))
        found.outside += is_outside or (file.is_symlink() and not file.resolve().is_relative_to(top))
    if not pictures:
        there = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(5))
        known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"source {problem} ({known}){f'; there are {there}' if there else ''}")
    found.left_out += left_out
    found += sorted(pictures, key=lambda source: natural(source.name))


def _left_out(file: Path, name: str, excluded: str | None) -> str:
    """Why a file of a folder is no source; empty if it is one."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if excluded and name.startswith(excluded):
        return "in the output folder"
    if file.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return file.suffix.lower() or "without ending"
    try:
        is_file = S_ISREG(file.stat().st_mode)
    except OSError:
        return ""  # such as a link to nothing: it is named when it is read
    return "" if is_file else "neither file nor folder"  # reading a named pipe would wait for ever


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that compares numbers by value: frame-9 comes before frame-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

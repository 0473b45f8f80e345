"""The sources of a prediction: image files, folders, globs, videos and cameras, as one ordered stream of frames.

Names are looked up first, so that a misspelt one is reported before any work; pictures are decoded one after another.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np

from mvision.errors import UserError
from mvision.inference.pipeline import background, ordered_map
from mvision.structures.images import IMAGE_SUFFIXES, BadImage, read_image

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
DECODERS = 4
DEFAULT_RATE = 25.0  # frames per second, where a video or camera does not give a rate


@dataclass(frozen=True)
class Source:
    """One image file, video file or camera.

    Attributes:
        kind: one of the three.
        path: the file, as the user wrote it or its folder; a camera's number as text.
        name: the path below the folder that was given, with forward slashes; for a file that was given, its name.
        required: the user named this file itself (not its folder or a glob), so it has to be readable.
    """

    kind: Literal["image", "video", "camera"]
    path: str
    name: str
    required: bool = True


@dataclass
class Frame:
    """One picture to predict on.

    Attributes:
        source: the file or camera that it is from.
        image: (H, W, 3) uint8 RGB, upright; None if it cannot be read, see ``problem``.
        index: 0-based number within a video or camera, None for an image file.
        time: seconds since the start of the video.
        rate: frames per second of the video.
        problem: the reason why an image, or the rest of a video, cannot be read.
    """

    source: Source
    image: np.ndarray | None
    index: int | None = None
    time: float = 0.0
    rate: float = 0.0
    problem: str = ""


def find_sources(sources: Sequence[str | Path], leave_out: Path | None = None) -> list[Source]:
    """Look up sources, in the order given; files in folders (at any depth) and of globs are sorted by name.

    Args:
        sources: image or video files, folders, globs (``**`` is any depth), or camera numbers ("0").
        leave_out: a folder whose files are ignored, such as an earlier run's output inside the folder of pictures.

    Raises:
        UserError: a missing path, a folder or glob without pictures, or an empty list.
    """
    inputs: list[Source] = []
    for source in sources:
        text = os.fspath(source)
        path = Path(text)
        if path.is_dir():
            inputs += _in_folder(path, leave_out)
        elif path.exists():
            inputs.append(Source(_kind(path), text, path.name))
        elif text.isdecimal():
            inputs.append(Source("camera", text, f"camera-{text}"))
        elif glob.has_magic(text):
            inputs += _in_glob(text, leave_out)
        else:
            raise UserError(f"source {text}: no such file or folder")
    if not inputs:
        raise UserError("no source given: name images, a folder, a glob such as 'photos/*.jpg', a video or a camera")
    return inputs


def read_frames(sources: Iterable[Source], ahead: int = 2 * DECODERS) -> Generator[Frame, None, None]:
    """Decode in the background, up to ``ahead`` pictures before they are taken, and yield frames in order.

    A picture of a folder or a glob that cannot be read is a frame without image; so is the rest of a video that breaks
    off, after its readable frames.

    Raises:
        UserError: a file that the user named, or a camera, cannot be read.
    """
    for kind, group in groupby(sources, key=lambda source: source.kind):
        if kind == "image":
            yield from ordered_map(_read_image, group, workers=DECODERS, ahead=ahead)
            continue
        for source in group:
            yield from background(_read_video(source) if kind == "video" else _read_camera(source))


def _kind(path: Path) -> Literal["image", "video"]:
    return "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"


def _in_folder(folder: Path, leave_out: Path | None) -> list[Source]:
    def refuse(error: OSError) -> None:
        raise UserError(f"source {error.filename}: cannot be read ({error.strerror})") from error

    files = [Path(root) / name for root, _, names in os.walk(folder, onerror=refuse) for name in names]
    return _pictures(files, folder, leave_out, f"{folder}: no image or video in this folder")


def _in_glob(pattern: str, leave_out: Path | None) -> list[Source]:
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    # Unlike Path.glob, this takes patterns with a folder in front, absolute or not.
    files = [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    files = [file for file in files if file.is_file()]
    return _pictures(files, Path(*parts[:fixed]), leave_out, f"{pattern}: matches no image or video")


def _pictures(files: list[Path], root: Path, leave_out: Path | None, problem: str) -> list[Source]:
    """Files with a known suffix in natural order, without hidden ones and those below ``leave_out``.

    Raises:
        UserError: there are none; ``problem`` is the message.
    """
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    excluded = None
    if leave_out is not None and root.resolve() in leave_out.resolve().parents:
        excluded = f"{leave_out.resolve().relative_to(root.resolve()).as_posix()}/"
    found = []
    for file in files:
        name = file.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and file.suffix.lower() in known and not (excluded and name.startswith(excluded)):
            found.append(Source(_kind(file), str(file), name, required=False))
    if not found:
        raise UserError(f"source {problem} ({' '.join(sorted(suffix[1:] for suffix in known))})")
    return sorted(found, key=lambda source: _natural(source.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that compares numbers by value: frame-9 comes before frame-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_image(source: Source) -> Frame:
    try:
        return Frame(source, read_image(source.path))
    except BadImage as error:
        return _unreadable(source, error.reason, error)


def _read_video(source: Source) -> Iterator[Frame]:
    index = announced = 0
    try:
        with av.open(source.path) as container:
            if not container.streams.video:
                yield _unreadable(source, "no video in this file", None)
                return
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            announced = stream.frames
            rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
            for picture in container.decode(stream):
                quarters = round(getattr(picture, "rotation", 0) / 90)  # counter-clockwise; older PyAV lacks it
                image = np.rot90(picture.to_ndarray(format="rgb24"), quarters)
                seconds = index / rate if picture.time is None else float(picture.time)
                yield Frame(source, np.ascontiguousarray(image), index, seconds, rate)
                index += 1
    except (av.error.FFmpegError, OSError) as error:
        if index == 0:
            yield _unreadable(source, f"not a video that can be read ({error.strerror})", error)
        else:
            yield Frame(source, None, problem=f"breaks off after {index} frames ({error.strerror})")
        return
    if index == 0:
        yield _unreadable(source, "a video without pictures", None)
    elif index < 0.9 * announced:  # the header's number is an estimate in some formats
        yield Frame(source, None, problem=f"breaks off after {index} of {announced} frames")


def _read_camera(source: Source) -> Iterator[Frame]:
    camera = cv2.VideoCapture(int(source.path))
    try:
        rate = camera.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
        index = 0
        while True:
            good, image = camera.read()
            if not good:
                break
            yield Frame(source, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), index, index / rate, rate)
            index += 1
    finally:
        camera.release()
    if index == 0:
        raise UserError(f"source {source.path}: no camera with this number, or it gives no pictures")


def _unreadable(source: Source, reason: str, error: Exception | None) -> Frame:
    if source.required:
        raise UserError(f"source {source.path}: {reason}") from error
    return Frame(source, None, problem=reason)

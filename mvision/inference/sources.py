"""What to predict on: image files, folders, globs, videos and cameras, as one ordered stream of frames.

Names are looked up first (so that a typing error costs nothing), pictures are decoded when their turn comes.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from mvision.data.images import IMAGE_SUFFIXES, BadImage, read_image
from mvision.errors import UserError
from mvision.inference.pipeline import background, ordered_map

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
DECODERS = 4


@dataclass(frozen=True)
class Source:
    """One image file, video file or camera.

    Attributes:
        kind: what it is.
        path: the file as the user named or would name it; a camera's number as text.
        name: the path below the folder that was given, with forward slashes; for a file that was given, its name.
        required: whether the user named this very file, so that it has to be readable.
    """

    kind: Literal["image", "video", "camera"]
    path: str
    name: str
    required: bool = True


@dataclass
class Frame:
    """One picture to predict on.

    Attributes:
        source: where it comes from.
        image: (H, W, 3) uint8 RGB, upright; None if it cannot be read, and then ``problem`` says why.
        index: 0-based number within a video or camera, None for an image file.
        time: seconds since the video's start.
        rate: frames per second of the video.
        problem: the reason why an image, or the rest of a video, is missing.
    """

    source: Source
    image: np.ndarray | None
    index: int | None = None
    time: float = 0.0
    rate: float = 0.0
    problem: str = ""


def find_sources(sources: Sequence[str | Path], leave_out: Path | None = None) -> list[Source]:
    """Look up what the user named, in the order given; folders (with all below) and globs sorted by name.

    Args:
        sources: image or video files, folders, globs (``**`` is any depth), or camera numbers ("0").
        leave_out: a folder whose files are not taken from folders and globs: the output, so that a second run does not
            predict on the pictures of the first.

    Raises:
        UserError: a missing path, a folder or glob without pictures, nothing at all.
    """
    found: list[Source] = []
    for source in sources:
        text = os.fspath(source)
        path = Path(text)
        if path.is_dir():
            found += _in_folder(path, leave_out)
        elif path.exists():
            found.append(Source(_kind(path), text, path.name))
        elif text.isdecimal():
            found.append(Source("camera", text, f"camera-{text}"))
        elif glob.has_magic(text):
            found += _in_glob(text, leave_out)
        else:
            raise UserError(f"source {text}: no such file or folder")
    if not found:
        raise UserError("no source given: name an image, a folder, a glob such as 'photos/*.jpg', a video or a camera")
    return found


def read_frames(sources: Sequence[Source], prepare: Callable[[np.ndarray], Any] | None = None) -> Iterator[Frame]:
    """Decode in the background and yield frames in order, a few ahead at most.

    An image that cannot be read comes as a frame without image, if it was found in a folder or by a glob; so does the end
    of a video that breaks off, after its readable frames.

    Raises:
        UserError: a file that the user named, or a camera, cannot be read.
    """
    for kind, group in groupby(sources, key=lambda source: source.kind):
        if kind == "image":
            yield from ordered_map(_read_image, group, workers=DECODERS)
        else:
            for source in group:
                yield from background(_read_video(source) if kind == "video" else _read_camera(source))

"""Pictures behind URLs as sources, beside those on disk; and reading any of them to the size of a model's input."""

from __future__ import annotations

import glob
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mvision.errors import UserError
from mvision.inference.pipeline import ordered_map
from mvision.inference.reading import Frame, read_frames
from mvision.inference.sources import Source, Sources, find_sources, natural
from mvision.inference.streams import hide_password
from mvision.storage.urls import open_url, reason_of, remote_errors, scheme_of
from mvision.structures.images import IMAGE_SUFFIXES, PixelRange

CONNECTIONS = 16  # pictures that are fetched at the same time


def find_pictures(sources: Sequence[str], leave_out: Path | None = None) -> Sources:
    """Look up pictures for a prediction by many processes: on disk as ``find_sources`` does, and behind URLs.

    A URL is a picture, a folder (taken at any depth) or a glob; ``file://`` is the disk. Pictures that cannot be read
    are found out later and are no error, those that were named among them.

    Raises:
        UserError: see ``find_sources``; a URL that cannot be listed or has no picture; a video, a stream or a camera.
    """
    found = Sources()
    for text in sources:
        scheme = scheme_of(text)
        if scheme in ("", "file", "local"):
            part = find_sources([text.partition("://")[2] if scheme else text], leave_out)
        else:
            part = _behind_url(text)
        found += part
        found.left_out += part.left_out
        found.skipped += part.skipped
        found.example, found.outside = found.example or part.example, found.outside + part.outside
    once = {source.path: replace(source, required=False) for source in reversed(found) if source.kind == "image"}
    moving = [source for source in found if source.kind != "image"]
    for source in moving:
        if source.required:
            raise UserError(f"source {source.shown}: a {source.kind}; --engine ray predicts on pictures, leave it out")
    if not once:
        raise UserError(f"source {sources[0] if sources else ''}: no picture; --engine ray predicts on pictures alone")
    found.left_out += Counter({"videos": len(moving)} if moving else {})
    if repeated := len(found) - len(moving) - len(once):
        found.left_out["named twice"] += repeated
    found[:] = list(once.values())[::-1]
    return found


def _behind_url(url: str) -> Sources:
    shown = hide_password(url)
    file_system, path = open_url(url, "source")
    found = Sources()
    with remote_errors("source", shown):
        if file_system.isfile(path):
            return Sources([Source("image", url, PurePosixPath(path).name)])
        if glob.has_magic(path):
            names = [name for name in file_system.glob(path) if not file_system.isdir(name)]
            path = path[: min(path.find(character) for character in "*?[" if character in path)].rpartition("/")[0]
        else:
            names = file_system.find(path)
    for name in names:
        below = name.removeprefix(path).lstrip("/")
        suffix = PurePosixPath(name).suffix.lower()
        if any(part.startswith(".") for part in below.split("/")):
            found.left_out["hidden"] += 1
        elif suffix not in IMAGE_SUFFIXES:
            found.left_out[suffix or "without ending"] += 1
        else:
            found.append(Source("image", file_system.unstrip_protocol(name), below, required=False))
    if not found:
        there = ", ".join(f"{count} {reason}" for reason, count in found.left_out.most_common(5))
        raise UserError(f"source {shown}: no picture there{f'; there are {there}' if there else ''}")
    found.sort(key=lambda source: natural(source.name))
    return found


def read_inputs(paths: Sequence[str], size: tuple[int, int], pixel_range: PixelRange | None) -> list[Frame]:
    """Pictures at the (height, width) of a model's input, decoded by several threads; the frames are in this order.

    Pictures behind URLs are fetched at once first. One that cannot be fetched or decoded is a frame with a problem.
    """
    frames: dict[str, Frame] = {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str] = {}
        remote = [path for path in paths if scheme_of(path)]
        for number, (path, content) in enumerate(_fetched(remote).items()):
            if isinstance(content, bytes):
                file = Path(folder) / f"{number}{PurePosixPath(path).suffix.lower()}"
                file.write_bytes(content)
                files[path] = str(file)
            else:
                source = Source("image", path, path, required=False)
                frames[path] = Frame(source, None, problem=f"cannot be fetched ({content})")
        files |= {path: path for path in paths if not scheme_of(path)}
        sources = [Source("image", file, path, required=False) for path, file in files.items()]
        for frame in read_frames(sources, pixel_range=pixel_range, input_size=size, keep=False):
            frames[frame.source.name] = frame
    return [frames[path] for path in paths]


def _fetched(urls: Sequence[str]) -> dict[str, bytes | str]:
    """The content behind every URL, or why it cannot be fetched; all URLs of a scheme at once."""
    by_scheme: dict[str, list[str]] = {}
    for url in urls:
        by_scheme.setdefault(scheme_of(url), []).append(url)
    fetched: dict[str, bytes | str] = {}
    for group in by_scheme.values():
        file_system, _ = open_url(group[0], "source")

        def fetch(url: str, file_system: Any = file_system) -> bytes | str:
            try:  # one by one: the call for many takes "*", "?" and "[" in a name for a pattern
                return bytes(file_system.cat_file(file_system._strip_protocol(url)))
            except Exception as error:  # noqa: BLE001 - each package raises classes of its own
                return reason_of(error)

        fetched |= zip(group, ordered_map(fetch, group, CONNECTIONS))
    return fetched

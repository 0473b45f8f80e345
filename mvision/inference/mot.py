"""The tracks of a video as text in the format of the MOT challenge, one file a video."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from mvision.errors import UserError
from mvision.inference.reading import Frame
from mvision.inference.sources import Source
from mvision.inference.video_file import errors_name
from mvision.storage.atomic import whole_file
from mvision.structures import Instances
from mvision.structures.tracks import NO_TRACK


def mot_lines(frame: Frame, found: Instances) -> str:
    """A line for each instance that has a track.

    ``frame,id,left,top,width,height,score,-1,-1,-1``: frames and ids count from 1, boxes are in pixels, and the last
    three stand for a place in the world, which is not known. The format has no class; ids are those of one object each,
    over all classes (https://motchallenge.net/instructions).
    """
    if found.tracks is None or frame.index is None:
        return ""
    rows = zip(found.tracks.ids.tolist(), found.boxes.tolist(), found.scores.tolist())
    return "".join(
        f"{frame.index + 1},{number},{x0:.2f},{y0:.2f},{x1 - x0:.2f},{y1 - y0:.2f},{score:.5f},-1,-1,-1\n"
        for number, (x0, y0, x1, y1), score in rows
        if number != NO_TRACK
    )


class MotFiles:
    """The text files of the videos, of which one is open: each is complete or not there.

    Args:
        paths: of the videos' files.
    """

    def __init__(self, paths: Mapping[Source, Path]) -> None:
        self._paths = paths
        self._source: Source | None = None

    def add(self, source: Source, lines: str) -> None:
        """Append the lines of a frame. A video in which nothing was found has a file without lines."""
        path = self._paths[source]
        with errors_name(path):
            if source != self._source:
                self.close()
                path.parent.mkdir(parents=True, exist_ok=True)
                with ExitStack() as files:
                    temporary = files.enter_context(whole_file(path))
                    self._file = files.enter_context(temporary.open("w", encoding="ascii"))
                    self._files = files.pop_all()
                self._source = source
            self._file.write(lines)

    def close(self, error: BaseException | None = None) -> None:
        """Give the open file its name; after an error, remove it."""
        if self._source is None:
            return
        source, self._source = self._source, None
        if error is not None:
            with suppress(OSError):  # closing writes the rest, which fails again if the error was a full disk
                self._files.__exit__(type(error), error, error.__traceback__)
            return
        with errors_name(self._paths[source]):
            self._files.close()


def mot_paths(videos: Mapping[Source, Path]) -> dict[Source, Path]:
    """The text file of each video: beside its drawn video, with the same name.

    Raises:
        UserError: it would replace one of the sources.
    """
    paths = {source: path.with_suffix(".txt") for source, path in videos.items() if source.kind != "image"}
    originals = {Path(source.path).resolve() for source in videos}
    for path in paths.values():
        if path.resolve() in originals:
            raise UserError(f"--output {path.parent}: {path} would replace a source; choose another folder")
    return paths

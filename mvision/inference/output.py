"""The files of a prediction: a picture per image, a video per video, ``predictions.json``; complete or not there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import av
import cv2
import numpy as np

from mvision.errors import UserError
from mvision.inference.sources import Frame, Source
from mvision.storage.atomic import whole_file
from mvision.structures import Instances
from mvision.structures.images import write_image

PREDICTIONS = "predictions.json"
OPTIONAL_KEYS = ("segmentation", "keypoints", "region")  # of its entries, after those that all have
VIDEO_CODECS = ("libx264", "mpeg4")  # in order of preference
VIDEO_CLOCK = 90_000  # ticks per second: fine enough for any frame rate, and the usual clock of video files


@dataclass
class Summary:
    """What ``predict_sources`` did.

    Attributes:
        output: the folder with pictures and ``predictions.json``.
        images: number of pictures predicted on (frames of videos each count).
        instances: number of instances by class name.
        regions: number of pictures with a semantic region of the class, by class name; of joint models.
        skipped: (file, reason) of each file that could not be read.
        seconds: duration in seconds.
    """

    output: Path
    images: int = 0
    instances: Counter[str] = field(default_factory=Counter)
    regions: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = [f"{count} {name}" for name, count in self.instances.most_common()]
        counts += [f"region {name} in {count}" for name, count in self.regions.most_common()]
        rate = self.images / max(self.seconds, 1e-9)
        lines = [f"{self.images} images in {self.seconds:.1f} s ({rate:.1f}/s): {', '.join(counts) or 'nothing found'}"]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join([*lines, f"pictures and {PREDICTIONS}: {self.output}"])


@dataclass
class Rendered:
    """A frame with its entries of ``predictions.json`` and, of a video, the drawn picture; None: it cannot be read."""

    frame: Frame
    entries: list[dict[str, Any]] | None
    picture: np.ndarray | None = None


class Output:
    """Draws and writes results. ``render`` may run in several threads at once, ``add`` in one, in order.

    A context manager: at its end ``predictions.json`` and the last video get their names; after an error, unfinished
    files are removed.

    Raises:
        UserError: the folder cannot be written, or a picture would replace one of the sources.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        self.folder = folder
        self.summary = Summary(folder)
        self._paths = _paths(folder, sources)
        repeated = {name for name, count in Counter(source.name for source in sources).items() if count > 1}
        self._names = {s: Path(s.path).as_posix() if s.name in repeated else s.name for s in sources}
        self._video: _VideoWriter | None = None
        self._separator = "[\n"
        with ExitStack() as files:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary = files.enter_context(whole_file(folder / PREDICTIONS))
                self._file: TextIO = files.enter_context(temporary.open("w", encoding="utf-8"))
            except OSError as error:
                raise UserError(f"--output {folder}: cannot be written ({error.strerror}); choose another") from error
            self._files = files.pop_all()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Closing a file writes the rest of its buffer, which fails again if the error was a full disk.
            self._close_video(error)
            with suppress(OSError):
                self._files.__exit__(kind, error, trace)
            return
        with _errors_name(self.folder / PREDICTIONS), self._files:
            self._close_video()
            self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")

    def render(self, item: tuple[int, Frame, Instances | None]) -> Rendered:
        """Draw one numbered frame's instances; write the picture if it is an image file."""
        number, frame, instances = item
        if frame.image is None or instances is None:
            return Rendered(frame, None)
        entries = self._entries(number, frame, instances)
        picture = instances.draw(frame.image)
        if frame.source.kind != "image":
            return Rendered(frame, entries, picture)
        write_image(self._paths[frame.source], picture)
        return Rendered(frame, entries)

    def add(self, rendered: Rendered) -> Frame:
        """Write the entries and, of a video, the picture."""
        frame, summary = rendered.frame, self.summary
        if frame.problem:
            summary.skipped.append((frame.source.path, frame.problem))
        if rendered.entries is None:
            return frame
        summary.images += 1
        for entry in rendered.entries:
            (summary.regions if "region" in entry else summary.instances)[entry["category_name"]] += 1
        with _errors_name(self.folder / PREDICTIONS):
            for entry in rendered.entries:
                self._file.write(self._separator + json.dumps(entry))
                self._separator = ",\n"
        if rendered.picture is not None:
            self._video_of(frame.source, frame.rate, rendered.picture).add(rendered.picture, frame.time)
        return frame

    def _entries(self, number: int, frame: Frame, instances: Instances) -> list[dict[str, Any]]:
        """COCO results, rounded, with the names that a reader without the annotations needs."""
        names = instances.class_names
        if instances.regions is not None:
            names += instances.regions.class_names
        entries = []
        for entry, name in zip(instances.to_coco(number), names, strict=True):
            named: dict[str, Any] = {"image_id": number, "file_name": self._names[frame.source]}
            if frame.index is not None:
                named |= {"frame": frame.index, "time": round(frame.time, 3)}
            named |= {"category_id": entry["category_id"], "category_name": name}
            named |= {"bbox": [round(value, 2) for value in entry["bbox"]], "score": round(entry["score"], 5)}
            if "keypoints" in entry:
                entry["keypoints"] = [round(value, 2) for value in entry["keypoints"]]
            entries.append(named | {key: entry[key] for key in OPTIONAL_KEYS if key in entry})
        return entries

    def _video_of(self, source: Source, rate: float, picture: np.ndarray) -> _VideoWriter:
        if self._video is None or self._video.source != source:
            self._close_video()
            self._video = _VideoWriter(self._paths[source], source, rate, picture.shape[:2])
        return self._video

    def _close_video(self, error: BaseException | None = None) -> None:
        if self._video is not None:
            self._video.close(error)
            self._video = None


class _VideoWriter:
    """H.264 in MP4, with the time stamps of the source."""

    def __init__(self, path: Path, source: Source, rate: float, size: tuple[int, int]) -> None:
        self.source = source
        self._path = path
        self._size = size
        self._last = -1
        codec = next(codec for codec in VIDEO_CODECS if codec in av.codecs_available)
        with _errors_name(path), ExitStack() as files:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = files.enter_context(whole_file(path))
            self._container = files.enter_context(av.open(str(temporary), "w", format="mp4"))
            self._files = files.pop_all()
        stream = self._container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = (side + side % 2 for side in size)  # 4:2:0 colour needs even sides
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, VIDEO_CLOCK)
        if codec == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast"}
        self._stream = stream

    def add(self, picture: np.ndarray, time: float) -> None:
        """Append (H, W, 3) uint8 RGB, shown from ``time`` seconds on."""
        if picture.shape[:2] != self._size:  # a stream may change its size in the middle
            picture = cv2.resize(picture, self._size[::-1])
        odd_rows, odd_columns = (side % 2 for side in self._size)
        if odd_rows or odd_columns:
            picture = cv2.copyMakeBorder(picture, 0, odd_rows, 0, odd_columns, cv2.BORDER_REPLICATE)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._last = frame.pts = max(round(time * VIDEO_CLOCK), self._last + 1)  # the encoder needs rising time stamps
        frame.time_base = Fraction(1, VIDEO_CLOCK)
        with _errors_name(self._path):
            self._container.mux(self._stream.encode(frame))

    def close(self, error: BaseException | None = None) -> None:
        """Write the encoder's last frames and give the file its name; after an error, remove the file."""
        if error is not None:
            # Closing the container writes its index, which fails again if the error was a full disk.
            with suppress(av.error.FFmpegError, OSError):
                self._files.__exit__(type(error), error, error.__traceback__)
            return
        with _errors_name(self._path), self._files:
            self._container.mux(self._stream.encode(None))


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Errors of the system and of the video library become a ``UserError`` that names the file."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _paths(folder: Path, sources: Sequence[Source]) -> dict[Source, Path]:
    """The path of each source's picture: the same stem and folders, with a number where two would be equal."""
    taken = {PREDICTIONS}
    paths = {}
    for source in sources:
        relative = Path(source.name)
        suffix = {"image": ".png" if relative.suffix.lower() == ".png" else ".jpg"}.get(source.kind, ".mp4")
        stem = relative.stem if source.kind != "camera" else relative.name
        number, name = 1, f"{stem}{suffix}"
        while (relative.parent / name).as_posix().casefold() in taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        taken.add((relative.parent / name).as_posix().casefold())
        paths[source] = folder / relative.parent / name
    originals = {Path(source.path).resolve() for source in sources}
    for path in paths.values():
        if path.resolve() in originals:
            raise UserError(f"--output {folder}: {path} would replace a source; choose another folder")
    return paths

"""What a prediction leaves: a picture per image, a video per video, ``predictions.json``; each whole or not there.

Everything is written beside its place under a hidden name and renamed when it is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import av
import cv2
import numpy as np

from mvision.drawing.draw import draw_instances
from mvision.errors import UserError
from mvision.inference.sources import Frame, Source
from mvision.structures import Instances

PREDICTIONS = "predictions.json"
JPEG_QUALITY = 92
VIDEO_CODECS = ("libx264", "mpeg4")  # the first that this build of PyAV has
VIDEO_CLOCK = 90_000  # ticks per second: fine enough for any frame rate, and the usual clock of video files


@dataclass
class Summary:
    """What ``predict_sources`` did.

    Attributes:
        output: the folder with pictures and ``predictions.json``.
        images: number of pictures predicted on (frames of videos each count).
        instances: number of instances by class name.
        skipped: (file, reason) of what could not be read.
        seconds: how long it took.
    """

    output: Path
    images: int = 0
    instances: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.instances.most_common()) or "nothing found"
        rate = self.images / max(self.seconds, 1e-9)
        lines = [f"{self.images} images in {self.seconds:.1f} s ({rate:.1f}/s): {found}"]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join([*lines, f"pictures and {PREDICTIONS}: {self.output}"])


@dataclass
class Rendered:
    """One frame ready to be put down: the entries of ``predictions.json``, and the drawn picture of a video's frame."""

    frame: Frame
    instances: Instances | None
    entries: list[dict[str, Any]]
    picture: np.ndarray | None = None


class Output:
    """Draws and writes results. ``render`` may run in several threads at once, ``add`` in one, in order.

    Raises:
        UserError: the folder cannot be written, or a picture would replace one of the sources.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        self.folder = folder
        self.summary = Summary(folder)
        self._places = _places(folder, sources)
        repeated = {name for name, count in Counter(source.name for source in sources).items() if count > 1}
        self._names = {s: Path(s.path).as_posix() if s.name in repeated else s.name for s in sources}
        self._video: _VideoWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._temporary = folder / f".{PREDICTIONS}.partial"
            self._file: TextIO = self._temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {folder}: cannot be written ({error.strerror}); choose another") from error
        self._separator = "[\n"

    def render(self, item: tuple[int, Frame, Instances | None]) -> Rendered:
        """Draw one numbered frame's instances; write the picture if it is an image file."""
        number, frame, instances = item
        if frame.image is None or instances is None:
            return Rendered(frame, None, [])
        entries = self._entries(number, frame, instances)
        picture = draw_instances(frame.image, instances)
        if frame.source.kind != "image":
            return Rendered(frame, instances, entries, picture)
        _write_picture(self._places[frame.source], picture)
        return Rendered(frame, instances, entries)

    def add(self, rendered: Rendered) -> Frame:
        """Put down the entries and, of a video, the picture."""
        frame, summary = rendered.frame, self.summary
        if frame.problem:
            summary.skipped.append((frame.source.path, frame.problem))
        if rendered.instances is None:
            return frame
        summary.images += 1
        names = rendered.instances.names
        summary.instances.update(names[label] for label in rendered.instances.labels.tolist())
        try:
            for entry in rendered.entries:
                self._file.write(self._separator + json.dumps(entry))
                self._separator = ",\n"
        except OSError as error:
            raise UserError(f"{self._temporary}: cannot be written ({error.strerror})") from error
        if rendered.picture is not None:
            self._video_of(frame.source, frame.rate, rendered.picture).add(rendered.picture, frame.time)
        return frame

    def finish(self) -> Summary:
        """Complete the last video and ``predictions.json``."""
        self._finish_video()
        try:
            self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")
            self._file.close()
            self._temporary.replace(self.folder / PREDICTIONS)
        except OSError as error:
            raise UserError(f"{self.folder / PREDICTIONS}: cannot be written ({error.strerror})") from error
        return self.summary

    def abandon(self) -> None:
        """Remove what is not complete; does nothing after ``finish``."""
        if self._video is not None:
            self._video.abandon()
        with suppress(OSError):  # closing writes the rest of the buffer, which a full disk refuses again
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _entries(self, number: int, frame: Frame, instances: Instances) -> list[dict[str, Any]]:
        """COCO results with the names that a reader without the annotations needs."""
        names = instances.names
        entries = []
        for entry, label in zip(instances.to_coco(number), instances.labels.tolist()):
            named: dict[str, Any] = {"image_id": number, "file_name": self._names[frame.source]}
            if frame.index is not None:
                named |= {"frame": frame.index, "time": round(frame.time, 3)}
            named |= {"category_id": entry["category_id"], "category_name": names[label]}
            named |= {"bbox": [round(value, 2) for value in entry["bbox"]], "score": round(entry["score"], 5)}
            if "segmentation" in entry:
                named["segmentation"] = entry["segmentation"]
            if "keypoints" in entry:
                named["keypoints"] = [round(value, 2) for value in entry["keypoints"]]
            entries.append(named)
        return entries

    def _video_of(self, source: Source, rate: float, picture: np.ndarray) -> _VideoWriter:
        if self._video is None or self._video.source != source:
            self._finish_video()
            self._video = _VideoWriter(self._places[source], source, rate, picture.shape[:2])
        return self._video

    def _finish_video(self) -> None:
        if self._video is not None:
            self._video.finish()
            self._video = None


class _VideoWriter:
    """H.264 in MP4, with the time stamps of the source."""

    def __init__(self, path: Path, source: Source, rate: float, size: tuple[int, int]) -> None:
        self.source = source
        self._path = path
        self._temporary = _hidden(path)
        self._size = size
        self._last = -1
        codec = next(codec for codec in VIDEO_CODECS if codec in av.codecs_available)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self._temporary), "w", format="mp4")
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
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
        if picture.shape[:2] != self._size:  # a stream may change its size half-way
            picture = cv2.resize(picture, self._size[::-1])
        odd_rows, odd_columns = (side % 2 for side in self._size)
        if odd_rows or odd_columns:
            picture = cv2.copyMakeBorder(picture, 0, odd_rows, 0, odd_columns, cv2.BORDER_REPLICATE)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._last = frame.pts = max(round(time * VIDEO_CLOCK), self._last + 1)  # the encoder wants rising stamps
        frame.time_base = Fraction(1, VIDEO_CLOCK)
        self._encode(frame)

    def finish(self) -> None:
        """Write what the encoder holds back, and give the file its name."""
        self._encode(None)
        try:
            self._container.close()
            self._temporary.replace(self._path)
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        with suppress(av.error.FFmpegError, OSError):  # closing writes the index, which a full disk refuses again
            self._container.close()
        self._temporary.unlink(missing_ok=True)

    def _encode(self, frame: av.VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error


def _places(folder: Path, sources: Sequence[Source]) -> dict[Source, Path]:
    """Where each source's picture goes: the same stem and folders, a number added where two would meet."""
    taken = {PREDICTIONS}
    places = {}
    for source in sources:
        relative = Path(source.name)
        suffix = {"image": ".png" if relative.suffix.lower() == ".png" else ".jpg"}.get(source.kind, ".mp4")
        stem = relative.stem if source.kind != "camera" else relative.name
        number, name = 1, f"{stem}{suffix}"
        while (relative.parent / name).as_posix().casefold() in taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        taken.add((relative.parent / name).as_posix().casefold())
        places[source] = folder / relative.parent / name
    originals = {Path(source.path).resolve() for source in sources}
    for place in places.values():
        if place.resolve() in originals:
            raise UserError(f"--output {folder}: {place} would replace a source; choose another folder")
    return places


def _write_picture(path: Path, picture: np.ndarray) -> None:
    """Encode (H, W, 3) uint8 RGB by the path's suffix and write the file whole or not at all."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    good, data = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    if not good:
        raise UserError(f"{path}: a picture of {picture.shape[1]} x {picture.shape[0]} cannot be encoded")
    temporary = _hidden(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.tobytes())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")

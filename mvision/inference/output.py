"""The files of a prediction: a picture per image, a video per video, ``predictions.json``; complete or not there."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, TextIO

import cv2
import numpy as np

from mvision.errors import UserError
from mvision.inference.mot import MotFiles, mot_lines, mot_paths
from mvision.inference.reading import Frame
from mvision.inference.selection import Selection
from mvision.inference.sources import Source
from mvision.inference.summary import PREDICTIONS, Summary
from mvision.inference.video_file import VideoWriter, errors_name
from mvision.storage.atomic import remove_partial_files, whole_file
from mvision.structures import Category, Instances
from mvision.structures.images import BadImage, write_image

OPTIONAL_KEYS = ("track_id", "segmentation", "keypoints", "region")  # of its entries, after those that all have


@dataclass(frozen=True)
class ForMetrics:
    """What ``predictions.json`` holds of the images of a data set: what metrics need, with its numbers for the classes.

    Attributes:
        selection: the results that are written.
        model, data: the classes of the two; they are matched by name.
    """

    selection: Selection
    model: Sequence[Category]
    data: Sequence[Category]

    @property
    def category_ids(self) -> dict[int, int]:
        """The data set's number of a class, by the model's; classes that the data set does not have are missing."""
        numbers = {category.name: category.id for category in self.data}
        return {category.id: numbers[category.name] for category in self.model if category.name in numbers}


@dataclass
class Rendered:
    """A frame with its results.

    Attributes:
        entries: of ``predictions.json``; None: the frame cannot be read.
        picture: the drawn picture of a video.
        found, regions: the class names of what is drawn.
        unknown: the class names of results that the data set has no class for.
        not_drawn: why there is no picture.
        tracks: lines for the text file of a tracked video.
    """

    frame: Frame
    entries: list[dict[str, Any]] | None = None
    picture: np.ndarray | None = None
    found: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    not_drawn: str = ""
    tracks: str = ""


class Output:
    """Writes results, and draws them. ``render`` may run in several threads at once, ``add`` in one, in order.

    A context manager: at its end ``predictions.json`` and the last video get their names; after an error, unfinished
    files are removed. An earlier ``predictions.json`` is removed before the first picture is written, because it does
    not describe that picture.

    Raises:
        UserError: the folder cannot be written, or a picture would replace one of the sources.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        for_metrics: ForMetrics | None = None,
        pictures: bool = True,
        tracks: bool = False,
    ) -> None:
        """Open ``predictions.json``; with ``for_metrics``, its numbers are not rounded. Without ``pictures`` it is the
        only file, but for a text file of each video with ``tracks``.
        """
        self.folder = folder
        self.summary = Summary(folder, pictures)
        self.pictures = pictures
        self._exact = for_metrics is not None
        self._category_ids = None if for_metrics is None else for_metrics.category_ids
        self._paths = _paths(folder, sources) if pictures or tracks else {}
        self._mot = MotFiles(mot_paths(self._paths)) if tracks else None
        self._names = file_names(sources)
        self._video: VideoWriter | None = None
        self._undrawable: Source | None = None  # a video that the encoder has refused
        self._separator = "[\n"
        self._earlier_is_there, self._lock = True, threading.Lock()
        self._one_large = threading.Lock()  # held while a picture is drawn that is too large to be kept
        with ExitStack() as files:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for place in {folder, *(path.parent for path in self._paths.values())}:
                    remove_partial_files(place)
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
            if self._mot is not None:
                self._mot.close(error)
            with suppress(OSError):
                self._files.__exit__(kind, error, trace)
            return
        with errors_name(self.folder / PREDICTIONS), self._files:
            self._close_video()
            if self._mot is not None:
                self._mot.close()
            self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")

    def render(self, item: tuple[int, Frame, list[Instances] | None]) -> Rendered:
        """Draw one numbered frame's instances; write the picture if it is an image file.

        Of two sets of instances the first is drawn and the second written to ``predictions.json``.
        """
        number, frame, found = item
        if found is None:
            return Rendered(frame)
        shown = found[0]
        regions = [] if shown.regions is None else shown.regions.class_names
        rendered = Rendered(frame, found=shown.class_names, regions=regions, tracks=mot_lines(frame, shown))
        rendered.entries = self._entries(number, frame, found[-1], rendered.unknown)
        if self.pictures and frame.source != self._undrawable:
            with nullcontext() if frame.again is None and not frame.reduced else self._one_large:
                self._draw(rendered, shown)
        return rendered

    def _draw(self, rendered: Rendered, shown: Instances) -> None:
        frame, image = rendered.frame, rendered.frame.image
        try:
            if frame.reduced and frame.large is not None and frame.shown is not None:
                image, shown = frame.large.reduced(), frame.shown
            elif frame.again is not None:
                image = frame.again()
            assert image is not None
            size = image.shape[:2]
            picture = (shown if shown.size == size else shown.resized(size)).draw(image)
            del image  # a large one is not needed any more
        except (BadImage, cv2.error, MemoryError, OverflowError) as error:  # of pictures of extraordinary size
            rendered.not_drawn = f"{frame.size[1]} x {frame.size[0]} pixels cannot be drawn on ({error})"
            return
        if frame.source.kind != "image":
            rendered.picture = picture
            return
        self._forget_earlier()
        try:
            write_image(self._paths[frame.source], picture)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # the disk, not the picture
                raise
            rendered.not_drawn = str(error).removeprefix(f"{self._paths[frame.source]}: ")

    def add(self, rendered: Rendered) -> Frame:
        """Write the entries and, of a video, the picture."""
        frame, summary = rendered.frame, self.summary
        if frame.problem:
            summary.skipped.append((frame.source.shown, frame.problem))
        if rendered.entries is None:
            return frame
        summary.images += 1
        summary.instances.update(rendered.found)
        summary.regions.update(rendered.regions)
        summary.remarks.update(frame.notes)
        summary.unknown.update(rendered.unknown)
        with errors_name(self.folder / PREDICTIONS):
            for entry in rendered.entries:
                self._file.write(self._separator + json.dumps(entry))
                self._separator = ",\n"
        if self._mot is not None and frame.index is not None:
            self._forget_earlier()
            self._mot.add(frame.source, rendered.tracks)
        if rendered.picture is not None and frame.source != self._undrawable:
            rendered.not_drawn = self._add_to_video(frame, rendered.picture)
        if rendered.not_drawn:
            summary.not_drawn.append((frame.source.shown, rendered.not_drawn))
        return frame

    def _entries(self, number: int, frame: Frame, instances: Instances, unknown: list[str]) -> list[dict[str, Any]]:
        """COCO results, rounded, with the names that a reader without the annotations needs."""
        names = instances.class_names
        if instances.regions is not None:
            names += instances.regions.class_names
        source = frame.source
        image_id = number if source.image_id is None else source.image_id
        entries = []
        for entry, name in zip(instances.to_coco(image_id), names, strict=True):
            category_id = entry["category_id"]
            if self._category_ids is not None:
                if category_id not in self._category_ids:
                    unknown.append(name)
                    continue
                category_id = self._category_ids[category_id]
            named: dict[str, Any] = {"image_id": image_id, "file_name": self._names[source]}
            if frame.index is not None:
                named |= {"frame": frame.index, "time": round(frame.time, 3)}
            named |= {"category_id": category_id, "category_name": name}
            entries.append(named | result_values(entry, self._exact))
        return entries

    def _add_to_video(self, frame: Frame, picture: np.ndarray) -> str:
        """Append a picture; the reason where the encoder does not take pictures of this kind."""
        try:
            if self._video is None or self._video.source != frame.source:
                self._close_video()
                self._video = VideoWriter(self._paths[frame.source], frame.source, frame.rate, picture.shape[:2])
            self._video.add(picture, frame.time)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # the disk, not the picture
                raise
            self._undrawable = frame.source
            self._close_video(error)
            return str(error)
        return ""

    def _close_video(self, error: BaseException | None = None) -> None:
        if self._video is None:
            return
        video, self._video = self._video, None
        if error is None:
            self._forget_earlier()
            if video.resized:
                size = f"{video.resized} of its frames have another size than the first"
                self.summary.notes.append(f"{video.source.shown}: {size}; they are drawn at that size")
        video.close(error)

    def _forget_earlier(self) -> None:
        """Remove the ``predictions.json`` of an earlier run."""
        with self._lock:
            if self._earlier_is_there:
                with errors_name(self.folder / PREDICTIONS):
                    (self.folder / PREDICTIONS).unlink(missing_ok=True)
                self._earlier_is_there = False


def file_names(sources: Sequence[Source]) -> dict[Source, str]:
    """The name of every source in ``predictions.json``: below its folder, and with the path where two are equal."""
    repeated = {name for name, count in Counter(source.name for source in sources).items() if count > 1}
    return {source: _posix(source) if source.name in repeated else source.name for source in sources}


def result_values(entry: dict[str, Any], exact: bool = False) -> dict[str, Any]:
    """What an entry of ``predictions.json`` says of a result besides where and what it is; rounded unless ``exact``."""

    def rounded(values: list[float], digits: int) -> list[float]:
        return values if exact else [round(value, digits) for value in values]

    values: dict[str, Any] = {"bbox": rounded(entry["bbox"], 2), "score": rounded([entry["score"]], 5)[0]}
    if "keypoints" in entry:
        entry["keypoints"] = rounded(entry["keypoints"], 2)
    return values | {key: entry[key] for key in OPTIONAL_KEYS if key in entry}


def _posix(source: Source) -> str:
    return source.shown if source.kind == "stream" or "://" in source.path else Path(source.path).as_posix()


def _paths(folder: Path, sources: Sequence[Source]) -> dict[Source, Path]:
    """The path of each source's picture: the same stem and folders, with a number where two would be equal."""
    taken = {PREDICTIONS}
    paths = {}
    for source in sources:
        relative = _inside(source.name)
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


def _inside(name: str) -> Path:
    """A name as a path that stays inside a folder: a data set may list pictures that lie beside its own folder."""
    path = PurePath(name)
    return Path(*[part for part in path.parts if part not in (path.anchor, "..", ".")])

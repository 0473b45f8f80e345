"""Videos whose objects are followed: those of ``mvision predict --track``, and ``Model.track`` for a loop in Python."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mvision.errors import UserError, printable
from mvision.inference.large_images import ArrayPicture
from mvision.inference.pictures import picture_array
from mvision.inference.pipeline import ordered_map
from mvision.inference.predict import Predictor, Prepared, infer, modules_in_eval_mode
from mvision.inference.reading import DEFAULT_RATE, Frame, read_frames
from mvision.inference.selection import DEFAULT_THRESHOLD, AskedThreshold, Selection, resolve_threshold
from mvision.inference.sources import Source, Sources, find_sources
from mvision.inference.tiled import as_instances, infer_tiled
from mvision.inference.tiles import Tiling, make_tiling
from mvision.inference.tracking import DEFAULT_TRACKER, Tracker, check_tracker, detection_threshold
from mvision.machine import PrecisionOption
from mvision.structures import Instances
from mvision.structures.images import resize_image

_log = logging.getLogger("mvision")
Picture = str | Path | Image.Image | np.ndarray


class TrackedVideos:
    """Follows the objects of each video, stream and camera of some sources; none of them knows of another.

    Args:
        sources: what is to be predicted on.
        method: see ``Tracker``.
        wanted: what is reported without tracking; its threshold is that from which a track starts.

    Attributes:
        chosen: the detections that are needed of every frame, one selection.
        counts: number of tracks by class name, in all videos together.

    Raises:
        UserError: there is no video among the sources, the method is unknown, or its package is missing.
    """

    def __init__(self, sources: Sources, method: str, wanted: Selection) -> None:
        check_tracker(method)
        pictures = [source for source in sources if source.kind == "image"]
        if len(pictures) == len(sources):
            raise UserError(
                f"source {pictures[0].shown}: --track follows objects through a video, a stream or a camera, and this "
                "is a picture; frames that are pictures of their own: model.track(files) in Python"
            )
        self._pictures = len(pictures)
        self._method, self._wanted = method, wanted
        self.chosen = [replace(wanted, threshold=detection_threshold(method, wanted.threshold))]
        self.counts: Counter[str] = Counter()
        self._source: Any = None
        self._tracker: Tracker | None = None

    def follow(self, item: tuple[Frame, list[Instances] | None]) -> tuple[Frame, list[Instances] | None]:
        """Give the instances of a frame their tracks. Frames come in their order, those of a video together."""
        frame, found = item
        if found is None:
            return item
        if frame.index is None:
            return frame, [self._wanted.reached(one) for one in found]
        if self._tracker is None or frame.source != self._source:
            self._source, self._tracker = frame.source, Tracker(self._method, self._wanted.threshold, frame.rate)
        before = Counter(self._tracker.counts)
        tracked = self._tracker.update(found[0], frame.image, frame.time)
        self.counts += Counter(self._tracker.counts) - before
        return frame, [tracked]

    def notes(self) -> list[str]:
        """Lines for the user."""
        if not self._pictures:
            return []
        return [f"{self._pictures} of the sources are pictures, no videos: their objects are not tracked"]


class Tracked(NamedTuple):
    """A frame of a video, the objects in it and their tracks.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright.
        instances: in pixels of the image; ``track_ids`` says which object each of them is.
        seconds: since the start of the video.
    """

    image: np.ndarray
    instances: Instances
    seconds: float


class TracksVideos:
    """The part of a model that follows objects through videos."""

    def track(
        self,
        source: str | Path | int | Iterable[Picture],
        tracker: str = DEFAULT_TRACKER,
        threshold: AskedThreshold = DEFAULT_THRESHOLD,
        batch_size: int | None = None,
        *,
        rate: float | None = None,
        multi_label: bool = False,
        nms: float | None = None,
        tile: int | tuple[int, int] | None = None,
        overlap: float | None = None,
        whole: bool = True,
        precision: PrecisionOption = "auto",
        device: str | torch.device | None = None,
    ) -> Generator[Tracked, None, None]:
        """Follow the objects of a video, frame by frame; frames are read while they are asked for.

        .. code-block:: python

            for image, found, seconds in model.track("street.mp4"):
                print(seconds, found.track_ids)

        Every call starts anew, with ids from 1 on. The frame after the one that is handed out may have been read
        already; where that is in the way, such as in a control loop, take ``Tracker``.

        Args:
            source: a video file, a URL or a camera's number; or frames in their order, each a file, a PIL image or an
                (H, W, 3) uint8 RGB array.
            tracker: bytetrack, botsort, cbiou, mcbyte, ocsort or sort.
            threshold: the score (0..1) from which a detection starts a track and is reported without one; with most
                methods, weaker detections continue a track. See ``predict_images``.
            batch_size: frames (or tiles) in a pass; None: one, but 8 on a GPU where frames need not be waited for.
            rate: frames per second of an iterable; None: 25. A video has its own.
            multi_label, nms, tile, overlap, whole, precision, device: see ``Model.predict``.

        Yields:
            ``Tracked``: the picture, its ``Instances`` and the time.

        Raises:
            UserError: as ``predict``; an unknown tracker, a source that is no video, or the package ``trackers`` is
                missing. What cannot be decoded of a video is a warning of the logger ``mvision``.
        """
        tiling = make_tiling(tile, overlap, whole)
        model: Predictor = self._for_prediction(precision, device)  # type: ignore[attr-defined]
        if all(self.head(task).kind == "regions" for task in self.tasks):  # type: ignore[attr-defined]
            raise UserError("track: this model finds regions of a class, no objects that could be followed")
        from_score = resolve_threshold(threshold, model)
        Selection(from_score, multi_label, nms).check(model.config.categories)
        tracker_of = partial(Tracker, tracker, from_score)
        chosen = Selection(tracker_of(rate=DEFAULT_RATE).threshold_of_detections, multi_label, nms)
        live, frames = _frames(model, source, rate, tracker_of, None if tiling else model.config.image_size)
        if tiling is None:
            size = 1 if batch_size is None and live else batch_size
            results = infer(model, frames, [chosen], size, 1 if live else None)
        else:
            results = _infer_on_tiles(model, frames, tiling, chosen, batch_size, live)
        # A prepared copy computes in its own precision, whatever the caller's autocast is set to.
        autocast = nullcontext if model is self else partial(torch.autocast, model.device.type, enabled=False)
        return _follow(model, results, tracker_of, autocast)


@dataclass
class _Shown:
    """A frame that the model is run on: its picture, time in seconds and frames per second."""

    image: np.ndarray | None
    seconds: float
    rate: float


def _video(source: str | Path | int, rate: float | None) -> Source:
    """The video, stream or camera that a source names.

    Raises:
        UserError: it is something else, or has a ``rate`` of its own.
    """
    found = find_sources([str(source)])
    if len(found) > 1 or found[0].kind == "image":
        what = f"{len(found)} files" if len(found) > 1 else "a picture"
        raise UserError(f"track: source {source} is {what}, not a video; of frames that are pictures, give the list")
    if rate is not None:
        raise UserError(
            f"track: rate {rate}: {source} has a frame rate of its own; rate is for frames given one by one"
        )
    return replace(found[0], required=True)


def _frames(
    model: Predictor,
    source: str | Path | int | Iterable[Picture],
    rate: float | None,
    tracker_of: Callable[..., Tracker],
    input_size: tuple[int, int] | None,
) -> tuple[bool, Generator[Prepared[_Shown], None, None]]:
    """Whether each frame is wanted soon, and the frames.

    Args:
        input_size: of the model's input; None: none is made, as tiles are cut from the pictures.

    Raises:
        UserError: see ``TracksVideos.track``.
    """
    if isinstance(source, str | Path | int):
        video = _video(source, rate)
        return video.is_live, _frames_of_video(model, video, input_size)
    if isinstance(source, np.ndarray) and source.ndim in (2, 3):
        raise UserError(f"track: one picture (an array of shape {source.shape}), no video; give the list of its frames")
    if isinstance(source, Iterable) and not isinstance(source, Image.Image):
        of_frames = DEFAULT_RATE if rate is None else rate
        tracker_of(rate=of_frames)  # one that cannot be is said now, not when the first frame comes
        return not isinstance(source, Sized), _frames_given(model, source, of_frames, input_size)
    raise UserError(f"track: a {type(source).__name__}; give a video, a URL, a camera's number, or frames")


def _frames_of_video(
    model: Predictor, video: Source, input_size: tuple[int, int] | None
) -> Generator[Prepared[_Shown], None, None]:
    def prepare(frame: Frame) -> Prepared[_Shown]:
        if frame.problem:
            _log.warning("%s: %s", printable(video.shown), printable(frame.problem))
        return _prepared(_Shown(frame.image, frame.time, frame.rate), input_size)

    frames = read_frames([video], pixel_range=model.config.pixel_range)
    return ordered_map(prepare, frames, workers=2, ahead=0 if video.is_live else 2)


def _frames_given(
    model: Predictor, pictures: Iterable[Picture], rate: float, input_size: tuple[int, int] | None
) -> Generator[Prepared[_Shown], None, None]:
    for index, picture in enumerate(pictures):
        image = picture_array(picture, model.config.pixel_range)
        yield _prepared(_Shown(image, index / rate, rate), input_size)


def _prepared(shown: _Shown, input_size: tuple[int, int] | None) -> Prepared[_Shown]:
    if shown.image is None:
        return shown, None, (0, 0)
    height, width = shown.image.shape[:2]
    return shown, None if input_size is None else resize_image(shown.image, input_size), (height, width)


def _infer_on_tiles(
    model: Predictor,
    frames: Generator[Prepared[_Shown], None, None],
    tiling: Tiling,
    chosen: Selection,
    batch_size: int | None,
    live: bool,
) -> Generator[tuple[_Shown, list[Instances] | None], None, None]:
    """As ``infer``. Tiles of several frames share batches, but a live frame does not wait for the one behind it."""
    pictures = ((shown, None if shown.image is None else ArrayPicture(shown.image)) for shown, _, _ in frames)
    with closing(frames):
        for together in ([picture] for picture in pictures) if live else [pictures]:
            with closing(infer_tiled(model, together, tiling, [chosen], batch_size)) as results:
                for shown, found in results:
                    # Windows of a picture in memory can always be read.
                    yield shown, [as_instances(one) for one in found] if isinstance(found, list) else None


def _follow(
    model: Predictor,
    results: Generator[tuple[_Shown, list[Instances] | None], None, None],
    tracker_of: Callable[..., Tracker],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Generator[Tracked, None, None]:
    """The settings of gradients and autocast are the caller's whenever a frame is handed out."""
    tracker: Tracker | None = None
    with modules_in_eval_mode(model), closing(results):
        while True:
            with torch.no_grad(), autocast():
                shown, found = next(results, (None, None))
            if shown is None:
                return
            if found is None or shown.image is None:
                continue
            tracker = tracker or tracker_of(rate=shown.rate)
            yield Tracked(shown.image, tracker.update(found[0], shown.image, shown.seconds), shown.seconds)

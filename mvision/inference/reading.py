"""Decoding sources: pictures by several threads, videos, streams and cameras in the background, frames in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from time import monotonic

import av
import cv2
import numpy as np

from mvision.errors import UserError
from mvision.inference.large_images import Picture, TiffPicture, open_large
from mvision.inference.pipeline import background, ordered_map
from mvision.inference.sources import Source
from mvision.inference.streams import downloaded, ffmpeg_input
from mvision.inference.tiles import Tiling
from mvision.structures import Instances
from mvision.structures.decoding import BIG, check_size
from mvision.structures.images import BadImage, PixelRange, image_size, read_image, read_with_size, resize_image

DECODERS = 4
DEFAULT_RATE = 25.0  # frames per second, where a video or camera does not give a rate
RATES = (0.1, 1000.0)  # frames per second that are believed
CLOCK_STEP = 0.001  # seconds between two pictures of a camera, at the least: some clocks stand still for longer
# Of a video's picture, with those that wait for the model, for drawing and for the encoder: the limit for pictures (see
# ``check_size``) holds for all of them together.
BYTES_PER_PIXEL = 24
FAILED_READS = 100  # in succession: what follows in the file is not a video any more
ASPECT_TOLERANCE = 0.03


@dataclass
class Frame:
    """One picture to predict on.

    Attributes:
        source: the file or camera that it is from.
        image: (H, W, 3) uint8 RGB, upright; None if it cannot be read, see ``problem``, or is not kept, see ``again``.
        index: 0-based number within a video or camera, None for an image file.
        time: seconds since the start of the video, or since a camera's first picture, by the clock of this machine.
        rate: frames per second of the video.
        problem: the reason why an image, or a part of a video, cannot be read.
        notes: what was left out of the picture or replaced in it, a line each.
        model_input: the picture at the size of the model's input; of pictures that are not kept.
        size: (height, width) of the picture in pixels, (0, 0) without one.
        again: reads a picture that is not kept: some of them at once would fill the memory.
        large: a picture of which windows are read, for a prediction on tiles.
        reduced: it is drawn at a part of its size, with ``shown``, because it is never decoded whole.
        shown: the results at that size.
    """

    source: Source
    image: np.ndarray | None
    index: int | None = None
    time: float = 0.0
    rate: float = 0.0
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    model_input: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    again: Callable[[], np.ndarray] | None = None
    large: Picture | None = None
    reduced: bool = False
    shown: Instances | None = None

    def __post_init__(self) -> None:
        if self.image is not None:
            self.size = self.image.shape[:2]


def read_frames(
    sources: Iterable[Source],
    ahead: int = 2 * DECODERS,
    pixel_range: PixelRange | None = None,
    input_size: tuple[int, int] | None = None,
    keep: bool = True,
    tiling: Tiling | None = None,
) -> Generator[Frame, None, None]:
    """Decode in the background, up to ``ahead`` pictures before they are taken, and yield frames in order.

    With ``input_size``, very large pictures are not kept, see ``Frame.again``. Without ``keep``, no image file's
    picture is: a JPEG of at least twice the input on both sides is decoded at a part of its size, unless it is of a
    data set. With ``tiling``, pictures that are larger than a tile are kept at their size, and windows are read of very
    large ones, see ``Frame.large``.

    A picture of a folder or a glob that cannot be read is a frame without image; so is what is missing in a video,
    after its readable frames.

    Raises:
        UserError: a file that the user named, a stream or a camera cannot be read.
    """
    for kind, group in groupby(sources, key=lambda source: source.kind):
        if kind == "image":
            read = partial(_read_image, pixel_range, input_size, keep)
            if tiling is not None:
                read = partial(_read_for_tiles, pixel_range, input_size, keep, tiling)
            yield from ordered_map(read, group, workers=DECODERS, ahead=ahead)
            continue
        for source in group:
            if kind == "camera":  # what is read ahead of a slow model is old when its turn comes
                yield from background(_read_camera(source), ahead=1)
            else:
                yield from background(_Video(source).frames())


def _read_image(
    pixel_range: PixelRange | None, input_size: tuple[int, int] | None, keep: bool, source: Source
) -> Frame:
    notes: list[str] = []
    try:
        if input_size is not None and not keep:
            return _model_input(source, pixel_range, input_size, notes)
        if source.path.startswith(("http://", "https://")):
            with downloaded(source.path) as file:
                return Frame(source, read_image(file, pixel_range=pixel_range, notes=notes), notes=notes)
        frame = Frame(source, _decoded(source, pixel_range, notes), notes=notes)
    except BadImage as error:
        return _unreadable(source, error.reason, error)
    if frame.image is not None and input_size is not None and frame.size[0] * frame.size[1] > BIG:
        frame.model_input, frame.image = resize_image(frame.image, input_size), None
        frame.again = partial(_decoded, source, pixel_range, [])
    return frame


def _read_for_tiles(
    pixel_range: PixelRange | None, input_size: tuple[int, int] | None, keep: bool, tiling: Tiling, source: Source
) -> Frame:
    if source.path.startswith(("http://", "https://")):
        return _read_image(pixel_range, None, True, source)
    try:
        large = open_large(source.path, tiling.size[0], pixel_range)
        if large is not None:
            if source.size is not None:
                _check_shape(source, large.size)
            frame = Frame(source, None, notes=large.notes, size=large.size, large=large)
            frame.reduced = keep and isinstance(large, TiffPicture)
            if frame.reduced:
                frame.notes.append("picture of more than 64 million pixels, read in parts: drawn at a part of its size")
            elif keep:
                frame.again = partial(_decoded, source, pixel_range, [])
            return frame
        height, width, _ = image_size(source.path)
    except BadImage as error:
        return _unreadable(source, error.reason, error)
    if len(tiling.grid((height, width))) == 1:
        return _read_image(pixel_range, input_size, keep, source)
    return _read_image(pixel_range, None, True, source)


def _check_shape(source: Source, size: tuple[int, int]) -> None:
    """Raise a ``BadImage`` where the annotations of a data set are for a picture of another shape."""
    assert source.size is not None
    height, width = source.size
    if abs(size[1] / size[0] * height / width - 1) > ASPECT_TOLERANCE:
        raise BadImage(source.path, f"is {size[1]} x {size[0]}, its annotations are for {width} x {height}")


def _model_input(source: Source, pixel_range: PixelRange | None, size: tuple[int, int], notes: list[str]) -> Frame:
    """A frame without its picture, at the ``size`` of the model's input."""
    if source.size is not None:  # of a data set, whose metrics are compared with those of training
        image = _decoded(source, pixel_range, notes)
        full = image.shape[:2]
    elif source.path.startswith(("http://", "https://")):
        with downloaded(source.path) as file:
            image, full = read_with_size(file, size, pixel_range=pixel_range, notes=notes)
    else:
        image, full = read_with_size(source.path, size, pixel_range=pixel_range, notes=notes)
    return Frame(source, None, notes=notes, model_input=resize_image(image, size), size=full)


def _decoded(source: Source, pixel_range: PixelRange | None, notes: list[str]) -> np.ndarray:
    image = read_image(source.path, pixel_range=pixel_range, notes=notes)
    return _as_labelled(source, image, pixel_range)


def _as_labelled(source: Source, image: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """The picture in the geometry that its annotations are for: some tools ignore the camera's orientation.

    Raises:
        BadImage: it has another shape than they say, whichever way it is turned.
    """
    if source.size is None:
        return image
    height, width = source.size
    for candidate in (image, None):
        turned = candidate
        if turned is None:
            turned = read_image(source.path, rotate=False, pixel_range=pixel_range)
        if abs(turned.shape[1] / turned.shape[0] * height / width - 1) <= ASPECT_TOLERANCE:
            return turned
    shape = f"{image.shape[1]} x {image.shape[0]}"
    raise BadImage(source.path, f"is {shape}, its annotations are for {width} x {height}")


class _Video:
    """A video file or stream: its pictures, and what is damaged in it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = 0
        self.damaged = 0  # packets that cannot be decoded, and places where the file cannot be read
        self.doubtful = 0  # pictures that were decoded from damaged packets
        self.rate = DEFAULT_RATE
        self._regular = self._missing = 0  # steps of one frame, and frames that longer steps leave out
        self._last = 0.0  # time of the latest picture
        self._shift = 0.0  # added to the times of the file

    def frames(self) -> Iterator[Frame]:
        """All pictures that can be decoded, then a frame without image where some cannot."""
        announced, seconds = 0, 0.0
        name, options = ffmpeg_input(self.source.path, self.source.kind == "stream")
        try:
            with av.open(name, **options) as container:
                if not container.streams.video:
                    yield self._unreadable("no video in this file", None)
                    return
                # Not the picture of a cover, where there is one.
                stream = container.streams.best("video") or container.streams.video[0]
                stream.thread_type = "AUTO"
                announced = stream.frames
                if not container.streams.audio:  # sound may be longer than the pictures
                    seconds = (container.duration or 0) / av.time_base
                self._set_rate(stream)
                start = (container.start_time or 0) / av.time_base
                for picture in self._pictures(container, stream):
                    yield self._frame(picture, start)
        except BadImage as error:
            yield self._stopped(error.reason, error)
            return
        except (av.error.FFmpegError, OSError, ValueError) as error:  # ValueError: options that PyAV does not know
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, av.error.ExitError):  # PyAV's timeout
                reason = "no answer"
            yield self._stopped(reason, error)
            return
        if self.index == 0:
            yield self._unreadable(f"a video without pictures that can be decoded{self._damage()}", None)
        elif self.index < 0.9 * announced:  # the header's number is an estimate in some formats
            problem = f"breaks off after {self.index} of {announced} frames{self._damage()}"
            yield Frame(self.source, None, problem=problem)
        elif self._last + 1 < 0.9 * seconds and not announced:
            problem = f"breaks off after {self.index} frames, at {self._last:.1f} of {seconds:.1f} s{self._damage()}"
            yield Frame(self.source, None, problem=problem)
        elif self.damaged or self.doubtful or self._has_gaps:
            yield Frame(self.source, None, problem=f"{self.index} frames{self._damage()}")

    def _pictures(
        self, container: av.container.InputContainer, stream: av.video.stream.VideoStream
    ) -> Iterator[av.VideoFrame]:
        """The pictures, going on behind packets that are damaged."""
        failed = 0
        while True:
            try:
                for packet in container.demux(stream):
                    failed = 0
                    yield from self._decode(packet)
                return
            except av.error.ExitError:
                raise
            except av.error.FFmpegError:
                failed += 1
                self.damaged += 1
                if failed == FAILED_READS:
                    raise

    def _decode(self, packet: av.Packet) -> list[av.VideoFrame]:
        try:
            return packet.decode()  # type: ignore[return-value]
        except av.error.EOFError:
            return []  # the decoder's end
        except av.error.FFmpegError:
            self.damaged += 1
            return []

    def _frame(self, picture: av.VideoFrame, start: float) -> Frame:
        check_size(self.source.path, picture.width, picture.height, "video", BYTES_PER_PIXEL)
        quarters = round(getattr(picture, "rotation", 0) / 90)  # counter-clockwise; older PyAV lacks it
        image = np.rot90(picture.to_ndarray(format="rgb24"), quarters)
        seconds = self._time(None if picture.time is None else float(picture.time) - start)
        frame = Frame(self.source, np.ascontiguousarray(image), self.index, seconds, self.rate)
        self.index += 1
        self.doubtful += picture.is_corrupt
        return frame

    def _time(self, given: float | None) -> float:
        """Seconds that rise from picture to picture, also where the clock of a stream starts again."""
        if self.index == 0:
            seconds = max(given or 0.0, 0.0)
        elif given is not None and given + self._shift > self._last:
            seconds = given + self._shift
        else:
            seconds = self._last + 1 / self.rate
            self._shift = 0.0 if given is None else seconds - given
        steps = round((seconds - self._last) * self.rate)
        self._regular += steps == 1
        self._missing += max(steps - 1, 0)
        self._last = seconds
        return seconds

    def _set_rate(self, stream: av.video.stream.VideoStream) -> None:
        self.rate = _believed(float(stream.average_rate or stream.guessed_rate or 0))

    def _damage(self) -> str:
        damage = f"; {self.damaged} damaged packets left out" if self.damaged else ""
        damage += f"; {self.doubtful} frames are of damaged packets" if self.doubtful else ""
        return damage + (f"; {self._missing} frames or so are missing between them" if self._has_gaps else "")

    @property
    def _has_gaps(self) -> bool:
        """Whether frames are missing; in a video whose frames come as they like, a long step means nothing."""
        return self._regular > 0.5 * self.index and self._missing > 0.05 * self.index

    def _stopped(self, reason: str, error: Exception) -> Frame:
        if self.index == 0:
            what = "cannot be opened" if self.source.kind == "stream" else "not a video that can be read"
            return self._unreadable(f"{what} ({reason})", error)
        problem = f"breaks off after {self.index} frames ({reason}){self._damage()}"
        return Frame(self.source, None, problem=problem)

    def _unreadable(self, reason: str, error: Exception | None) -> Frame:
        return _unreadable(self.source, reason, error)


def _read_camera(source: Source) -> Iterator[Frame]:
    camera = cv2.VideoCapture(int(source.path))
    try:
        given = camera.get(cv2.CAP_PROP_FPS)
        rate = _believed(given)
        notes = [] if rate == given else [f"{source.name} gives no frame rate ({given:g}); {rate:g} is taken for it"]
        index, started, last = 0, 0.0, 0.0
        while True:
            good, image = camera.read()
            # The driver drops what is not fetched in time, so the number of a picture does not say when it was taken.
            now = monotonic()
            if not good:
                break
            if index == 0:
                started = now
            else:
                last = max(now - started, last + CLOCK_STEP)
            yield Frame(source, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), index, last, rate, notes=notes)
            index, notes = index + 1, []
    finally:
        camera.release()
    if index == 0:
        raise UserError(f"source {source.path}: no camera with this number, or it gives no pictures")


def _believed(rate: float) -> float:
    """The frames per second that a video or camera gives, or ``DEFAULT_RATE`` where they cannot be (0, -1, NaN)."""
    return rate if RATES[0] <= rate <= RATES[1] else DEFAULT_RATE


def _unreadable(source: Source, reason: str, error: Exception | None) -> Frame:
    if source.required:
        raise UserError(f"source {source.shown}: {reason}") from error
    return Frame(source, None, problem=reason)

"""Writing a video: H.264 in MP4, complete or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from mvision.errors import UserError
from mvision.inference.sources import Source
from mvision.storage.atomic import whole_file

VIDEO_CODECS = ("libx264", "mpeg4")  # in order of preference
VIDEO_CLOCK = 90_000  # ticks per second: fine enough for any frame rate, and the usual clock of video files


class VideoWriter:
    """H.264 in MP4, with the time stamps of the source."""

    def __init__(self, path: Path, source: Source, rate: float, size: tuple[int, int]) -> None:
        self.source = source
        self._path = path
        self._size = size
        self._last = -1
        self.resized = 0  # pictures of another size than the first
        codec = next(codec for codec in VIDEO_CODECS if codec in av.codecs_available)
        with errors_name(path), ExitStack() as files:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = files.enter_context(whole_file(path))
            # With the protocol in front, a colon in a name is not taken for one.
            self._container = files.enter_context(av.open(f"file:{temporary.absolute()}", "w", format="mp4"))
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
            self.resized += 1
        odd_rows, odd_columns = (side % 2 for side in self._size)
        if odd_rows or odd_columns:
            picture = cv2.copyMakeBorder(picture, 0, odd_rows, 0, odd_columns, cv2.BORDER_REPLICATE)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._last = frame.pts = max(round(time * VIDEO_CLOCK), self._last + 1)  # the encoder needs rising time stamps
        frame.time_base = Fraction(1, VIDEO_CLOCK)
        with errors_name(self._path):
            self._container.mux(self._stream.encode(frame))

    def close(self, error: BaseException | None = None) -> None:
        """Write the encoder's last frames and give the file its name; after an error, remove the file."""
        if error is not None:
            # Closing the container writes its index, which fails again if the error was a full disk.
            with suppress(av.error.FFmpegError, OSError):
                self._files.__exit__(type(error), error, error.__traceback__)
            return
        with errors_name(self._path), self._files:
            self._container.mux(self._stream.encode(None))


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Errors of the system and of the video library become a ``UserError`` that names the file."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error

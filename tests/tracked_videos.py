"""Videos of coloured rectangles that move, for the model of ``tests.fake_model``, and what tracking leaves of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from mvision.cli.main import run
from mvision.commands import predict
from mvision.inference.reading import _Video
from mvision.inference.sources import Source
from mvision.inference.tracked import TracksVideos
from mvision.inference.video_file import VideoWriter
from mvision.structures import Instances
from tests.fake_model import CATEGORIES, SIZE, FakeModel, paint

RATE = 25.0
FRAMES = 24
RED, GREEN, BLUE = 0, 1, 2


class TrackingModel(TracksVideos, FakeModel):
    """The model of rectangles with ``track``."""

    def head(self, task: str) -> SimpleNamespace:
        return SimpleNamespace(classes=self.categories, kind="objects")

    def _for_prediction(self, precision: object, device: object) -> TrackingModel:
        return self


def crossing(frame: int) -> np.ndarray:
    """A red and a green square that pass each other; something grey hides half of the red one in the middle."""
    x = 3 + 4 * frame
    picture = paint(SIZE, [(RED, (x, 6, x + 28, 34)), (GREEN, (97 - x, 50, 125 - x, 78))])
    picture[:21, 50:90] = 128
    return picture


def write(path: Path, pictures: Iterable[np.ndarray], rate: float = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    for index, picture in enumerate(pictures):
        writer = writer or VideoWriter(path, Source("video", "", ""), rate, picture.shape[:2])
        writer.add(picture, index / rate)
    assert writer is not None
    writer.close()
    return path


def write_crossing(path: Path) -> Path:
    return write(path, map(crossing, range(FRAMES)))


def lose_frames(monkeypatch: pytest.MonkeyPatch, lost: range) -> None:
    """These frames of every video are in packets that cannot be decoded."""
    decode = _Video._decode

    def failing(self: _Video, packet: av.Packet) -> list[av.VideoFrame]:
        pictures = decode(self, packet)
        kept = [picture for picture in pictures if round(float(picture.time or 0) * RATE) not in lost]
        self.damaged += len(pictures) - len(kept)
        return kept

    monkeypatch.setattr(_Video, "_decode", failing)


def predict_by_command(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str | Path], model: FakeModel | None = None
) -> int:
    """The exit code of ``mvision predict`` with a model that needs no weights."""
    monkeypatch.setattr(predict, "open_fastest", lambda *_: ((model or FakeModel()).eval(), "runtime"))
    return run(["predict", "--weights", "w", *map(str, arguments)])


def entries(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "predictions.json").read_text())


def squares(
    places: Sequence[tuple[float, float]], labels: Sequence[int] = (), scores: Sequence[float] = ()
) -> Instances:
    """Instances of 20 x 20 pixels with these corners."""
    corners = np.array(places, np.float32).reshape(-1, 2)
    return Instances(
        boxes=np.concatenate((corners, corners + 20), axis=1),
        scores=np.array(scores or [0.9] * len(corners), np.float32),
        labels=np.array(labels or [0] * len(corners), np.int64),
        size=SIZE,
        categories=CATEGORIES,
    )

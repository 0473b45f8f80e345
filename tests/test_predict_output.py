"""The files of a prediction: videos, and that none is left incomplete after Ctrl-C or an error."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from mvision.errors import UserError
from mvision.inference import output, video_file
from mvision.inference.predict_sources import predict_sources
from mvision.inference.sources import Source
from mvision.inference.video_file import VideoWriter
from mvision.storage.atomic import whole_file
from mvision.structures.images import read_image
from tests.fake_model import FakeModel, paint, save, written
from tests.test_inference_sources import Camera, write_image, write_video

RED = (0, (30, 20, 60, 60))


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().eval()


@pytest.mark.parametrize("size", [(96, 128), (51, 77)])
def test_video(model: FakeModel, tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "clip.avi"
    even = tuple(side + side % 2 for side in size)
    write_video(path, frames=12, size=even)
    summary = predict_sources(model, [path], tmp_path / "out", threshold=0.1, batch_size=5, progress=False)
    assert summary.images == 12
    assert written(tmp_path / "out") == ["clip.mp4", "predictions.json"]
    with av.open(str(tmp_path / "out" / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(10, rel=0.01)
    assert len(frames) == 12
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(12)], abs=1e-3)
    assert (frames[0].height, frames[0].width) == even
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted({entry["frame"] for entry in entries}) == list(range(12))
    assert entries[-1]["time"] == pytest.approx(1.1)
    assert entries[-1]["image_id"] == 12


def test_odd_sizes_become_videos(tmp_path: Path) -> None:
    source = Source("video", "clip.avi", "clip.avi")
    writer = VideoWriter(tmp_path / "clip.mp4", source, 29.97, (51, 77))
    for index in range(3):
        writer.add(np.zeros((51, 77, 3), np.uint8), index / 29.97)
    writer.add(np.zeros((60, 90, 3), np.uint8), 0.0)  # another size, and time standing still
    writer.close()
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [(frame.height, frame.width) for frame in frames] == [(52, 78)] * 4
    times = [frame.time for frame in frames]
    assert all(a < b for a, b in pairwise(times))


def test_ctrl_c_leaves_nothing_half_written(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        save(tmp_path / "in" / f"{index:02d}.png", paint((96, 128), [RED]))
    write_video(tmp_path / "in" / "z.mp4")
    forward = FakeModel.forward
    for calls in (10, 25):  # among the images, in the middle of the video
        out = tmp_path / f"out{calls}"

        def interrupted(self: FakeModel, images: torch.Tensor, calls: int = calls) -> torch.Tensor:
            if len(self.batch_sizes) == calls:
                raise KeyboardInterrupt
            return forward(self, images)

        monkeypatch.setattr(FakeModel, "forward", interrupted)
        model.batch_sizes.clear()
        with pytest.raises(KeyboardInterrupt):
            predict_sources(model, [tmp_path / "in"], out, threshold=0, progress=False)
        left = written(out)
        assert all(name.endswith(".png") for name in left)
        assert all(read_image(out / name).shape == (96, 128, 3) for name in left)


def test_ctrl_c_ends_a_camera_recording(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Camera):
        def read(self) -> tuple[bool, np.ndarray | None]:
            return True, paint((96, 128), [RED])[..., ::-1].copy()

    forward = FakeModel.forward

    def interrupted(self: FakeModel, images: torch.Tensor) -> torch.Tensor:
        if len(self.batch_sizes) == 30:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", Endless)
    monkeypatch.setattr(FakeModel, "forward", interrupted)
    try:
        summary = predict_sources(model, ["0"], tmp_path / "out", progress=False)
    except KeyboardInterrupt:
        pytest.fail("the recording is lost")
    assert 5 < summary.images <= 30
    assert written(tmp_path / "out") == ["camera-0.mp4", "predictions.json"]
    with av.open(str(tmp_path / "out" / "camera-0.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == summary.images
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == summary.images


def test_a_full_disk(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(6):
        save(tmp_path / "in" / f"{index}.png", paint((96, 128), [RED]))
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "3.png" in self.name:
            write(self, bytes(data)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"3\.png: cannot be written \(No space left on device\)"):
        predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    assert not [name for name in written(tmp_path / "out") if "partial" in name or "json" in name or "3.png" in name]


def fill_the_disk_under(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every byte that is written to the file of this name meets a full disk."""

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Path]:
        with whole_file(path) as temporary:
            if path.name == name:
                temporary.unlink()
                temporary.symlink_to("/dev/full")
            yield temporary

    for module in (output, video_file):
        monkeypatch.setattr(module, "whole_file", full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_under_predictions_json(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    fill_the_disk_under(monkeypatch, "predictions.json")
    with pytest.raises(UserError, match=r"predictions\.json: cannot be written \(No space left"):
        predict_sources(model, [tmp_path / "a.png"], tmp_path / "out", progress=False)
    assert "predictions.json" not in written(tmp_path / "out")


def test_an_error_removes_what_is_not_complete(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second run: its video and predictions.json; those of the first run are left as they were."""
    source = write_video(tmp_path / "clip.mp4")
    predict_sources(model, [source], tmp_path / "out", threshold=0, progress=False)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("clip.mp4", "predictions.json")}
    add = VideoWriter.add

    def fail(self: VideoWriter, picture: np.ndarray, time: float) -> None:
        if time > 0.45:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, picture, time)

    monkeypatch.setattr(VideoWriter, "add", fail)
    with pytest.raises(OSError, match="No space left"):
        predict_sources(model, [source], tmp_path / "out", threshold=0, progress=False)
    assert written(tmp_path / "out") == sorted(before)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_under_a_video(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_video(tmp_path / "clip.mp4")
    (tmp_path / "out").mkdir()
    fill_the_disk_under(monkeypatch, "clip.mp4")
    with pytest.raises(UserError, match=r"clip\.mp4: cannot be written \(No space left"):
        predict_sources(model, [source], tmp_path / "out", progress=False)
    assert written(tmp_path / "out") == []


def test_two_videos(model: FakeModel, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, frames in (("a.mp4", 4), ("b.mp4", 7)):
        write_video(tmp_path / "in" / name, frames)
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    assert summary.images == 11
    assert written(tmp_path / "out") == ["a.mp4", "b.mp4", "predictions.json"]
    for name, frames in (("a.mp4", 4), ("b.mp4", 7)):
        with av.open(str(tmp_path / "out" / name)) as container:
            assert sum(1 for _ in container.decode(video=0)) == frames


def test_an_output_that_cannot_be_a_folder(model: FakeModel, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--output .*a\.png/out: cannot be written"):
        predict_sources(model, [path], path / "out", progress=False)

"""Videos as users have them: damaged, of many kinds, with odd clocks and sizes; and pictures that move."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mvision.errors import UserError
from mvision.inference.predict_sources import predict_sources
from mvision.inference.reading import Frame, _Video, read_frames
from mvision.inference.sources import Source, find_sources
from tests.fake_model import FakeModel, paint, save, written
from tests.test_inference_sources import write_image

RED = (0, (30, 20, 60, 60))
SIZE = (48, 64)


def write(path: Path, codec: str = "mpeg4", frames: int = 60, rate: int = 25, **options: str) -> Path:
    """Noise that moves to the right, so that every packet has some bytes."""
    kind = {".mts": "mpegts", ".m2ts": "mpegts", ".vob": "mpeg"}.get(path.suffix)
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options={"g": "6", **options})
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            picture = np.ascontiguousarray(np.roll(noise, 2 * index, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> tuple[list[Frame], list[str]]:
    frames = list(read_frames(find_sources([path])))
    return [frame for frame in frames if frame.image is not None], [frame.problem for frame in frames if frame.problem]


def damage(path: Path, places: int = 4) -> Path:
    """Noise over some bytes in the middle half."""
    rng, content = np.random.default_rng(1), bytearray(path.read_bytes())
    for start in rng.integers(len(content) // 4, len(content) * 3 // 4, places).tolist():
        content[start : start + 100] = rng.bytes(100)
    damaged = path.with_name(f"damaged{path.suffix}")
    damaged.write_bytes(content)
    return damaged


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".avi", ".flv", ".3gp", ".mpg"])
def test_damage_in_the_middle_costs_little_and_is_counted(suffix: str, tmp_path: Path) -> None:
    codec = {".flv": "flv", ".mpg": "mpeg2video", ".ts": "mpeg2video"}.get(suffix, "mpeg4")
    whole, problems = read(write(tmp_path / f"whole{suffix}", codec))
    assert (len(whole), problems) == (60, [])
    frames, problems = read(damage(tmp_path / f"whole{suffix}"))
    assert 45 <= len(frames) <= 60
    assert frames[-1].time > 2
    (problem,) = problems
    assert "damaged packets" in problem


def test_a_matroska_file_whose_index_is_damaged_is_read_up_to_there_and_said(tmp_path: Path) -> None:
    write(tmp_path / "whole.mkv", frames=120)
    frames, (problem,) = read(damage(tmp_path / "whole.mkv"))
    assert 10 < len(frames) <= 120
    assert "breaks off after" in problem or "damaged packets" in problem


def test_damaged_packets_are_counted_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = _Video._decode
    seen = []

    def failing(self: _Video, packet: av.Packet) -> list[av.VideoFrame]:
        seen.append(packet)
        if len(seen) in (20, 21, 30):
            packet = av.Packet(b"\xff" * 40)
            packet.stream = seen[0].stream
        return decode(self, packet)

    monkeypatch.setattr(_Video, "_decode", failing)
    frames, (problem,) = read(write(tmp_path / "a.mkv"))
    assert len(frames) >= 40
    assert "3 damaged packets left out" in problem


def test_a_summary_names_the_damaged_video(tmp_path: Path) -> None:
    write(tmp_path / "in.avi")
    damaged = damage(tmp_path / "in.avi")
    summary = predict_sources(FakeModel().eval(), [damaged], tmp_path / "out", progress=False)
    assert summary.images >= 45
    ((name, reason),) = summary.skipped
    assert name == str(damaged)
    assert "damaged packets" in reason
    assert written(tmp_path / "out") == ["damaged.mp4", "predictions.json"]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *[("a.ts", "mpeg2video"), ("a.mts", "libx264"), ("a.m2ts", "libx264"), ("a.flv", "flv"), ("a.3gp", "mpeg4")],
        *[
            ("a.asf", "msmpeg4"),
            ("a.wmv", "wmv2"),
            ("a.webm", "libvpx"),
            ("a.MXF", "mpeg2video"),
            ("a.vob", "mpeg2video"),
        ],
        ("a.ogv", "libtheora"),
    ],
)
def test_endings_of_videos(name: str, codec: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    try:
        write(tmp_path / "in" / name, codec, frames=10)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV was built without the encoder of {codec}")
    assert [source.kind for source in find_sources([tmp_path / "in"])] == ["video"]
    frames, problems = read(tmp_path / "in")
    assert (len(frames), problems) == (10, [])
    assert frames[0].time == pytest.approx(0, abs=1e-6)  # whatever the clock of the file starts at
    assert frames[1].time == pytest.approx(0.04, abs=2e-3)


def test_an_animation_is_a_video_and_a_still_gif_a_picture(tmp_path: Path) -> None:
    pictures = [Image.fromarray(paint((96, 128), [(0, (i, 10, i + 30, 40))])) for i in range(0, 50, 10)]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].save(tmp_path / "still.gif")
    pictures[0].save(tmp_path / "pages.tif", save_all=True, append_images=pictures[1:])
    kinds = {source.name: source.kind for source in find_sources([tmp_path])}
    assert kinds == {"moving.gif": "video", "pages.tif": "image", "still.gif": "image"}
    summary = predict_sources(FakeModel().eval(), [tmp_path], tmp_path / "out", progress=False)
    assert written(tmp_path / "out") == ["moving.mp4", "pages.jpg", "predictions.json", "still.jpg"]
    assert summary.images == 5 + 1 + 1
    assert "1 x picture with several frames or pages: the first one is used" in str(summary)


def test_a_file_without_a_known_ending_is_known_by_its_content(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", frames=3).rename(tmp_path / "recording.bin")
    write_image(tmp_path / "a.jpg").rename(tmp_path / "photo")
    found = find_sources([tmp_path / "recording.bin", tmp_path / "photo"])
    assert [source.kind for source in found] == ["video", "image"]
    assert len([frame for frame in read_frames(found) if frame.image is not None]) == 4


def test_the_clock_of_a_stream_that_starts_again() -> None:
    video = _Video(Source("stream", "rtsp://host", "a"))
    video.rate = 10.0
    times = []
    for given in (0.5, 0.6, 0.7, 0.0, 0.1, 0.1, None, 0.3, 5.0):
        times.append(video._time(given))
        video.index += 1
    assert times == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 5.9])


@pytest.mark.parametrize(("given", "used"), [(0, 25), (1e6, 25), (29.97, 29.97), (0.5, 0.5), (1e-4, 25)])
def test_rates_that_cannot_be_meant_are_not_used(given: float, used: float) -> None:
    class Stream:
        average_rate = guessed_rate = given

    video = _Video(Source("video", "a.mp4", "a.mp4"))
    video._set_rate(Stream())  # type: ignore[arg-type]
    assert video.rate == used


def test_frames_that_change_their_size(tmp_path: Path) -> None:
    """As in a recording of several MJPEG pictures: results are in each frame's own pixels, the video has one size."""
    jpegs = [save(tmp_path / f"{n}.jpg", paint((96, 128 * n), [RED])).read_bytes() for n in (1, 2)]
    (tmp_path / "a.mjpeg").write_bytes(b"".join([jpegs[0], jpegs[1], jpegs[0]]))
    summary = predict_sources(FakeModel().eval(), [tmp_path / "a.mjpeg"], tmp_path / "out", progress=False)
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["frame"] for entry in entries] == [0, 1, 2]
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        assert [(f.height, f.width) for f in container.decode(video=0)] == [(96, 128)] * 3
    assert "1 of its frames have another size than the first; they are drawn at that size" in str(summary)


def test_frames_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.mp4", frames=2)
    monkeypatch.setenv("MVISION_MAX_IMAGE_BYTES", str(48 * 64 * 24 - 1))
    with pytest.raises(UserError, match=r"64 x 48 pixels .* MVISION_MAX_IMAGE_BYTES"):
        read(tmp_path / "a.mp4")
    monkeypatch.setenv("MVISION_MAX_IMAGE_BYTES", str(48 * 64 * 24))
    assert len(read(tmp_path / "a.mp4")[0]) == 2

"""Finding and reading images, folders, globs, videos and cameras."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from mvision.errors import UserError
from mvision.inference import reading as module
from mvision.inference.pipeline import background, ordered_map
from mvision.inference.reading import read_frames
from mvision.inference.sources import find_sources


def write_image(path: Path, value: int = 100, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), value, np.uint8))
    return path


def write_video(path: Path, frames: int = 10, size: tuple[int, int] = (48, 64), rotation: int = 0) -> Path:
    """Frame i has brightness 20 i, and its left half is red."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            picture = np.full((*size, 3), 20 * index % 256, np.uint8)
            picture[:, : size[1] // 2] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def names(*sources: str | Path, leave_out: Path | None = None) -> list[str]:
    return [source.name for source in find_sources(sources, leave_out)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("img10.jpg", "img9.jpg", "sub/a.PNG", ".hidden.jpg", ".cache/b.jpg", "sub/deep/c.jpg"):
        write_image(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_order_and_names(folder: Path) -> None:
    assert names(folder) == ["img9.jpg", "img10.jpg", "sub/a.PNG", "sub/deep/c.jpg"]
    assert names(folder / "img10.jpg", folder / "sub", folder / "img9.jpg") == [
        "img10.jpg",
        "a.PNG",
        "deep/c.jpg",
        "img9.jpg",
    ]
    assert names(f"{folder}/*.jpg") == ["img9.jpg", "img10.jpg"]
    assert names(f"{folder}/**/*.*") == ["img9.jpg", "img10.jpg", "sub/a.PNG", "sub/deep/c.jpg"]
    assert names(f"{folder}/sub/*") == ["a.PNG"]


def test_the_output_of_an_earlier_run_is_not_a_source(folder: Path) -> None:
    assert names(folder, leave_out=folder / "sub") == ["img9.jpg", "img10.jpg"]
    assert names(folder, leave_out=folder / "su") == names(folder)
    assert names(folder, leave_out=folder) == names(folder)
    assert names(f"{folder}/**", leave_out=folder / "sub") == ["img9.jpg", "img10.jpg"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a[1]*.jpg")
    assert names(path) == ["a[1]*.jpg"]


def test_relative_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert names("*.jpg", "sub") == ["img9.jpg", "img10.jpg", "a.PNG", "deep/c.jpg"]
    assert [f.image.shape for f in read_frames(find_sources(["."]))] == [(20, 30, 3)] * 4  # type: ignore[union-attr]


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "clip.MP4").touch()
    write_image(tmp_path / "a.jpg")
    found = find_sources([tmp_path, "3"])
    assert [(s.kind, s.required) for s in found] == [("image", False), ("video", False), ("camera", True)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jpg", "missing.jpg: no such file"),
        ("empty", "empty: no image or video in this folder"),
        ("*.png", r"\*.png: matches no image"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        find_sources([str(tmp_path / source)])
    with pytest.raises(UserError, match="no source"):
        find_sources([])


@pytest.mark.parametrize("live", ["0", "rtsp://user:secret@127.0.0.1:9/street"])
def test_nothing_stands_behind_a_live_source(live: str, tmp_path: Path) -> None:
    picture = str(write_image(tmp_path / "a.png"))
    assert len(find_sources([picture, live])) == 2
    for behind in ("1", picture, "rtsp://127.0.0.1:9/other"):
        with pytest.raises(UserError, match=f"never ends, so that {behind} would never be read") as caught:
            find_sources([live, behind])
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_images_come_in_order(tmp_path: Path) -> None:
    for index in range(25):
        write_image(tmp_path / f"{index}.png", value=10 * index, size=(400, 400) if index % 5 == 0 else (9, 9))
    values = [int(frame.image[0, 0, 0]) for frame in read_frames(find_sources([tmp_path]))]  # type: ignore[index]
    assert values == [10 * index for index in range(25)]


def test_a_large_jpeg_that_is_not_drawn_is_decoded_at_a_part_of_its_size(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 400 * 600 * 3).reshape(400, 600, 3).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), gradient)
    source = find_sources([tmp_path / "a.jpg"])[0]
    (kept,) = read_frames([source])
    assert kept.image is not None
    expected = module.resize_image(kept.image, (100, 150))
    (exact,) = read_frames([replace(source, size=(400, 600))], input_size=(100, 150), keep=False)
    assert exact.model_input is not None
    assert np.array_equal(exact.model_input, expected)
    (frame,) = read_frames([source], input_size=(100, 150), keep=False)
    assert frame.image is None
    assert frame.size == (400, 600)
    assert frame.model_input is not None
    assert not np.array_equal(frame.model_input, expected)
    assert np.abs(frame.model_input.astype(int) - expected).max() <= 4


def test_few_images_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_image(tmp_path / f"{index}.png") for index in range(40)]
    read: list[str] = []

    def counting(path: str, **options: object) -> np.ndarray:
        read.append(path)
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(module, "read_image", counting)
    frames = read_frames(find_sources(paths), ahead=5)
    for taken in range(1, 20):
        next(frames)
        assert len(read) <= taken + 5 + module.DECODERS
    frames.close()  # type: ignore[attr-defined]
    assert len(read) < 40


def test_a_broken_file_in_a_folder_is_reported_in_its_place(folder: Path) -> None:
    (folder / "img9.jpg").write_bytes(b"not an image")
    frames = list(read_frames(find_sources([folder])))
    assert [frame.image is None for frame in frames] == [True, False, False, False]
    assert frames[0].problem
    with pytest.raises(UserError, match=r"img9.jpg"):
        list(read_frames(find_sources([folder / "img9.jpg"])))


def test_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    image = write_image(tmp_path / "a.jpg")
    frames = list(read_frames(find_sources([path, image])))
    assert [frame.index for frame in frames] == [*range(10), None]
    assert [frame.time for frame in frames[:10]] == pytest.approx([i / 10 for i in range(10)])
    assert frames[3].rate == pytest.approx(10)
    picture = frames[3].image
    assert picture is not None
    assert picture.shape == (48, 64, 3)
    assert picture[24, 50].tolist() == pytest.approx([60, 60, 60], abs=6)
    assert picture[24, 10, 0] > 200  # red comes first
    assert picture[24, 10, 2] < 60


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV cannot write it")
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_turned_video_is_upright(tmp_path: Path, rotation: int) -> None:
    frame = next(read_frames(find_sources([write_video(tmp_path / "clip.mp4", rotation=rotation)])))
    assert frame.image is not None
    red = frame.image[..., 0].astype(int) - frame.image[..., 2] > 100
    expected = np.zeros((48, 64), bool)
    expected[:, :32] = True
    turned = np.rot90(expected, rotation // 90)
    assert red.shape == turned.shape
    assert (red == turned).mean() > 0.9


def test_broken_videos(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.avi", frames=60).read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"nothing")
    frames = list(read_frames(find_sources([tmp_path / "bad"])))
    assert len(frames) == 1
    assert frames[0].image is None
    assert "not a video" in frames[0].problem
    with pytest.raises(UserError, match=r"a.mp4: not a video"):
        list(read_frames(find_sources([tmp_path / "bad" / "a.mp4"])))
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    *frames, last = read_frames(find_sources([tmp_path / "cut.avi"]))
    assert all(frame.image is not None for frame in frames)
    assert 0 < len(frames) < 60
    assert last.image is None
    assert f"after {len(frames)}" in last.problem


class Camera:
    """Stands in for cv2.VideoCapture: BGR pictures, as many as there are."""

    released = 0

    def __init__(self, index: int) -> None:
        self.left = {0: 5}.get(index, 0)

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.full((4, 6, 3), (250, 0, 0), np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        Camera.released += 1


def test_camera(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    Camera.released = 0
    frames = list(read_frames(find_sources(["0"])))
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[0].image is not None
    assert frames[0].image[0, 0].tolist() == [0, 0, 250]
    assert frames[0].rate == 25
    assert Camera.released == 1
    with pytest.raises(UserError, match="source 7: no camera"):
        list(read_frames(find_sources(["7"])))


@pytest.mark.parametrize(
    ("given", "used"), [(30.0, 30), (0.0, 25), (-1.0, 25), (float("nan"), 25), (1e9, 25), (1e-9, 25)]
)
def test_the_clock_of_a_camera_is_that_of_the_machine(
    given: float, used: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pictures come when the model has time for them, whatever rate the camera gives; a clock may stand still."""
    clock = iter([7.0, 7.04, 7.04, 7.5, 9.0, 9.0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "get", lambda *_: given)
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    frames = list(read_frames(find_sources(["0"])))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.04, 0.041, 0.5, 2.0])
    assert {frame.rate for frame in frames} == {used}
    notes = [note for frame in frames for note in frame.notes]
    assert notes == ([] if given == used else [f"camera-0 gives no frame rate ({given:g}); 25 is taken for it"])


def test_pictures_of_a_camera_are_not_stored_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[Camera] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: opened.append(Camera(number)) or opened[0])
    frames = read_frames(find_sources(["0"]))
    next(frames)
    time.sleep(0.1)
    assert opened[0].left >= 3  # of 5
    frames.close()


def test_ordered_map_works_in_parallel_and_in_order() -> None:
    together = threading.Barrier(3, timeout=10)

    def slow(value: int) -> int:
        together.wait()
        return value * value

    assert list(ordered_map(slow, range(9), workers=3)) == [v * v for v in range(9)]


def test_errors_in_threads_reach_the_caller_and_close_the_input() -> None:
    closed = []

    def numbers() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    def fails(value: int) -> int:
        if value == 3:
            raise UserError("three")
        return value

    squares = ordered_map(fails, numbers(), workers=2)
    assert [next(squares) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="three"):
        next(squares)
    assert closed == [True]
    threads = threading.active_count()
    stream = background(numbers())
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert closed == [True, True]
    assert threading.active_count() == threads
    with pytest.raises(UserError, match="three"):
        list(background(fails(value) for value in range(5)))


def test_background_reads_ahead() -> None:
    produced: list[int] = []

    def numbers() -> Iterator[int]:
        for value in range(10):
            produced.append(value)
            yield value

    stream = background(numbers(), ahead=3)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(produced) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert produced == [0, 1, 2, 3]
    assert list(stream) == list(range(1, 10))

"""``mvision predict --track``: what it writes, and what it answers mistakes with."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from mvision.errors import UserError
from mvision.inference import mot, tracking
from mvision.inference.predict_sources import predict_sources
from tests.fake_model import FakeModel, paint, save, written
from tests.test_inference_sources import Camera
from tests.test_predict_output import fill_the_disk_under
from tests.tracked_videos import (
    FRAMES,
    GREEN,
    RED,
    TrackingModel,
    crossing,
    entries,
    lose_frames,
    predict_by_command,
    write_crossing,
)

needs_trackers = pytest.mark.usefixtures("trackers")


@pytest.fixture(scope="module")
def trackers() -> None:
    pytest.importorskip("trackers")


def ids_of_classes(found: list[dict]) -> dict[str, set[int | None]]:
    ids = defaultdict(set)
    for entry in found:
        ids[entry["category_name"]].add(entry.get("track_id"))
    return dict(ids)


@needs_trackers
def test_ids_in_json_text_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trackers

    for name in ("a", "b"):
        write_crossing(tmp_path / "in" / f"{name}.mp4")
    given = [tmp_path / "in", "--track", "--output", tmp_path / "out"]
    assert predict_by_command(monkeypatch, given) == 0
    assert "tracks: 2 red, 2 green" in capsys.readouterr().out
    assert written(tmp_path / "out") == ["a.mp4", "a.txt", "b.mp4", "b.txt", "predictions.json"]
    found = entries(tmp_path / "out")
    for name in ("a", "b"):  # each with a tracker of its own
        of_video = [entry for entry in found if entry["file_name"] == f"{name}.mp4"]
        assert ids_of_classes([e for e in of_video if e["frame"] > 0]) == {"red": {1}, "green": {2}}
        assert {(e["frame"], e["category_name"]) for e in of_video} >= {
            (frame, colour) for frame in range(FRAMES) for colour in ("red", "green")
        }  # also where the red one is half hidden and its score is below the threshold
        assert min(e["score"] for e in of_video) < 0.5
        read = trackers.load_mot_file(tmp_path / "out" / f"{name}.txt")
        assert sorted(read) == list(range(2, FRAMES + 1))
        for e in of_video:
            if "track_id" in e:
                at = read[e["frame"] + 1]
                (row,) = np.flatnonzero(at.ids == e["track_id"])
                assert at.boxes[row].tolist() == pytest.approx(e["bbox"], abs=0.011)
                assert at.confidences[row] == pytest.approx(e["score"])
    again = [tmp_path / "in", "--track", "bytetrack", "--output", tmp_path / "again"]
    assert predict_by_command(monkeypatch, again) == 0
    for name in ("predictions.json", "a.txt", "b.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@needs_trackers
def test_tracking_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_crossing(tmp_path / "a.mp4")
    for more in ([], ["--track"], ["--track", "sort"]):
        folder = tmp_path / f"out{len(more)}"
        assert predict_by_command(monkeypatch, [video, *more, "--no-pictures", "--output", folder]) == 0
    plain, weak, strong = ({(e["frame"], tuple(e["bbox"])) for e in entries(tmp_path / f"out{n}")} for n in (0, 1, 2))
    assert plain == strong
    assert plain < weak
    assert written(tmp_path / "out1") == ["a.txt", "predictions.json"]


@needs_trackers
@pytest.mark.parametrize("method", tracking.METHODS)
def test_other_methods_by_their_names(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_crossing(tmp_path / "a.mp4")
    assert predict_by_command(monkeypatch, [video, "--track", method, "--output", tmp_path / "out"]) == 0
    last = [entry for entry in entries(tmp_path / "out") if entry["frame"] > FRAMES - 4]
    found = ids_of_classes(last)
    assert found["green"] == {2}
    assert all(len(ids) == 1 for ids in found.values())


@needs_trackers
def test_the_video_has_trails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_crossing(tmp_path / "a.mp4")
    drawn = {}
    for more in ([], ["--track"]):
        folder = tmp_path / f"out{len(more)}"
        assert predict_by_command(monkeypatch, [video, *more, "--output", folder]) == 0
        with av.open(str(folder / "a.mp4")) as container:
            drawn[len(more)] = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][-1].astype(int)
    # Where the red square came from there is grey, and the line of its track.
    assert abs(drawn[0][20, 24:45] - 128).max() < 30
    assert abs(drawn[1][20, 24:45] - 128).max(axis=1).min() > 30


@needs_trackers
def test_pictures_among_the_videos_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crossing(tmp_path / "in" / "a.mp4")
    weak = paint((96, 128), [(RED, (5, 5, 10, 30)), (GREEN, (40, 40, 70, 70))])
    save(tmp_path / "in" / "b.png", weak)
    assert predict_by_command(monkeypatch, [tmp_path / "in", "--track", "--output", tmp_path / "out"]) == 0
    assert "1 of the sources are pictures, no videos: their objects are not tracked" in capsys.readouterr().out
    of_picture = [entry for entry in entries(tmp_path / "out") if entry["file_name"] == "b.png"]
    assert [(e["category_name"], "track_id" in e) for e in of_picture] == [("green", False)]
    assert "b.txt" not in written(tmp_path / "out")


@needs_trackers
def test_frames_that_cannot_be_decoded_cost_no_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lose_frames(monkeypatch, range(8, 12))
    video = write_crossing(tmp_path / "a.mp4")
    assert predict_by_command(monkeypatch, [video, "--track", "--output", tmp_path / "out"]) == 0
    assert "4 damaged packets left out" in capsys.readouterr().out
    found = entries(tmp_path / "out")
    assert max(entry["frame"] for entry in found) == FRAMES - 5
    assert ids_of_classes([e for e in found if e["frame"] > 0]) == {"red": {1}, "green": {2}}


@needs_trackers
def test_ctrl_c_ends_a_camera_whose_tracks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Street(Camera):
        frame = 0

        def read(self) -> tuple[bool, np.ndarray | None]:
            Street.frame += 1
            return True, crossing(Street.frame)[..., ::-1].copy()

    forward = FakeModel.forward

    def interrupted(self: FakeModel, images: torch.Tensor) -> dict:
        if len(self.batch_sizes) == 15:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "VideoCapture", Street)
    monkeypatch.setattr(FakeModel, "forward", interrupted)
    assert predict_by_command(monkeypatch, ["0", "--track", "--output", "out"]) == 0
    assert written(tmp_path / "out") == ["camera-0.mp4", "camera-0.txt", "predictions.json"]
    assert {1, 2} <= {entry.get("track_id") for entry in entries(tmp_path / "out")}


@needs_trackers
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_leaves_no_half_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk_under(monkeypatch, "a.txt")
    from mvision.inference import output

    monkeypatch.setattr(mot, "whole_file", output.whole_file)
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(No space left"):
        predict_sources(
            FakeModel(), [write_crossing(tmp_path / "a.mp4")], tmp_path / "out", progress=False, track="sort"
        )
    assert "predictions.json" not in written(tmp_path / "out")
    assert not [name for name in written(tmp_path / "out") if "partial" in name or name.endswith(".txt")]


@needs_trackers
def test_an_error_removes_the_unfinished_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FakeModel.forward

    def failing(self: FakeModel, images: torch.Tensor) -> dict:
        if len(self.batch_sizes) == 12:
            raise RuntimeError("broken")
        return forward(self, images)

    monkeypatch.setattr(FakeModel, "forward", failing)
    with pytest.raises(RuntimeError, match="broken"):
        predict_sources(
            FakeModel(), [write_crossing(tmp_path / "a.mp4")], tmp_path / "out", progress=False, track="sort"
        )
    assert written(tmp_path / "out") == []


@needs_trackers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["still.png", "--track"], "source still.png: --track follows objects through a video"),
        (["pictures", "--track"], "source pictures/1.png: --track follows objects through a video"),
        (["--track"], "--track: name a video, a stream or a camera"),
        (["--data", "pictures", "--track"], "--track: name a video"),
        (["a.mp4", "--track", "bytetrak"], "tracker 'bytetrak': did you mean 'bytetrack'?"),
        (["--track", "a.mp4"], "tracker 'a.mp4': choose one of botsort, bytetrack"),
        (["empty.mp4", "--track"], "source empty.mp4: not a video that can be read"),
        (["a.mp4", "--track", "--output", "still.png"], "still.png"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "still.png", crossing(0))
    save(tmp_path / "pictures" / "1.png", crossing(0))
    write_crossing(tmp_path / "a.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    before = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert predict_by_command(monkeypatch, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert written(tmp_path) == before


@needs_trackers
def test_a_video_without_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    monkeypatch.chdir(tmp_path)
    assert predict_by_command(monkeypatch, ["a.mp4", "--track"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "source a.mp4: " in line
    assert written(tmp_path) == ["a.mp4"]


def test_a_missing_package_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    write_crossing(tmp_path / "a.mp4")
    assert predict_by_command(monkeypatch, ["a.mp4", "--track"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the package trackers is missing: pip install" in line
    assert written(tmp_path) == ["a.mp4"]
    with pytest.raises(UserError, match="the package trackers is missing"):
        TrackingModel().track("a.mp4")


def test_a_text_never_replaces_a_source(tmp_path: Path) -> None:
    pytest.importorskip("trackers")
    video = write_crossing(tmp_path / "in" / "a.mp4")
    os.link(video, tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt would replace a source"):
        predict_sources(FakeModel(), [tmp_path / "a.txt"], tmp_path, progress=False, track="sort")


def test_regions_are_no_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackers")
    model = FakeModel()
    model.tasks = ["semantic-seg"]
    video = write_crossing(tmp_path / "a.mp4")
    assert predict_by_command(monkeypatch, [video, "--track", "--output", tmp_path / "out"], model) == 2
    assert "--track: semantic-seg finds regions of a class" in capsys.readouterr().err
    assert written(tmp_path) == ["a.mp4"]

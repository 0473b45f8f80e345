"""Which object of a video each detection is: the tracker of a loop of one's own, and ``Model.track``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvision.drawing import draw_instances
from mvision.errors import UserError
from mvision.inference import tracking
from mvision.inference.tiled import predict_tiled
from mvision.inference.tiles import Tiling
from mvision.inference.tracking import METHODS, Tracker
from mvision.structures.tracks import Tracks
from tests.fake_model import SIZE, paint, save
from tests.test_weights import make_model
from tests.tracked_videos import (
    FRAMES,
    GREEN,
    RATE,
    RED,
    TrackingModel,
    crossing,
    lose_frames,
    squares,
    write,
    write_crossing,
)

needs_trackers = pytest.mark.usefixtures("trackers")


@pytest.fixture(scope="module")
def trackers() -> None:
    pytest.importorskip("trackers")


def ids(tracker: Tracker, places: list[tuple[float, float]], **more: object) -> list[int]:
    found = tracker.update(squares(places), **more)  # type: ignore[arg-type]
    assert found.track_ids is not None
    return found.track_ids.tolist()


@needs_trackers
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_ids_and_gives_the_same_again(method: str) -> None:
    pictures = [crossing(frame) for frame in range(10)]
    runs = []
    for _ in range(2):
        tracker = Tracker(method, rate=RATE)
        runs.append([ids(tracker, [(5 + 2 * f, 10), (90 - 2 * f, 60)], picture=pictures[f]) for f in range(10)])
    assert runs[0] == runs[1]
    assert set(map(tuple, runs[0][3:])) == {(1, 2)}
    assert tracker.counts == {"red": 2}


@needs_trackers
def test_classes_are_kept_apart() -> None:
    """Two objects of one place and a class each are two tracks, and a track never changes its class."""
    tracker = Tracker(rate=RATE)
    for frame in range(4):
        both = tracker.update(squares([(10 + frame, 10), (10 + frame, 10)], labels=[0, 1]))
    assert both.track_ids.tolist() == [1, 2]
    for _ in range(2):
        other = tracker.update(squares([(14, 10)], labels=[2]))
    assert other.track_ids.tolist() == [3]
    assert tracker.counts == {"red": 1, "green": 1, "blue": 1}


@needs_trackers
def test_masks_keypoints_and_scores_stay_with_their_ids() -> None:
    rng = np.random.default_rng(0)
    places = [(5.0, 5.0), (60.0, 5.0), (100.0, 60.0), (30.0, 60.0)]
    tracker = Tracker(rate=RATE)
    known: dict[int, int] = {}
    for frame in range(6):
        order = rng.permutation(4)
        found = squares([places[i] for i in order], labels=[int(i) % 2 for i in order])
        masks = np.zeros((4, *SIZE), bool)
        keypoints = np.zeros((4, 2, 3), np.float32)
        for row, i in enumerate(order):
            masks[row, : int(i) + 1] = True
            keypoints[row] = i
        found = tracker.update(replace(found, masks=masks, keypoints=keypoints))
        assert found.track_ids is not None
        rows = zip(order.tolist(), found.track_ids.tolist(), found.boxes, found.masks, found.keypoints)
        for i, number, box, mask, points in rows:
            assert box[:2].tolist() == list(places[i])
            assert mask.sum() == (i + 1) * SIZE[1]
            assert (points == i).all()
            if frame:
                assert known.setdefault(i, number) == number
    assert sorted(known.values()) == [1, 2, 3, 4]


@needs_trackers
def test_weak_detections_continue_a_track_and_start_none() -> None:
    tracker = Tracker(rate=RATE)
    assert tracker.threshold_of_detections == tracking.WEAK
    for _ in range(3):
        found = tracker.update(squares([(10, 10)]))
    found = tracker.update(squares([(11, 10), (80, 60)], scores=[0.2, 0.2]))
    assert found.track_ids.tolist() == [1]
    assert found.boxes[0].tolist() == [11, 10, 31, 30]
    sort = Tracker("sort", rate=RATE)
    assert sort.threshold_of_detections == 0.5  # it takes every detection that it is given


@needs_trackers
def test_thresholds_of_classes() -> None:
    given = {"red": 0.3, "green": 0.95}
    tracker = Tracker(threshold=given, rate=RATE)
    assert tracker.threshold_of_detections == {"*": 0.1, "red": 0.1, "green": 0.1}
    for _ in range(3):
        found = tracker.update(squares([(10, 10), (60, 10), (60, 60)], labels=[0, 1, 2], scores=[0.35, 0.9, 0.45]))
    assert found.class_names == ["red"]
    assert found.track_ids.tolist() == [1]
    assert Tracker(threshold={"*": 0.05}).threshold_of_detections == {"*": 0.05}


@needs_trackers
def test_nothing_that_reaches_the_threshold_is_lost() -> None:
    tracker = Tracker(rate=RATE)
    found = tracker.update(squares([(10, 10), (60, 60)], scores=[0.8, 0.3]))
    assert (found.scores.tolist(), found.track_ids.tolist()) == ([pytest.approx(0.8)], [-1])
    (entry,) = found.to_coco(1)
    assert "track_id" not in entry
    assert tracker.update(squares([])).track_ids.tolist() == []


@needs_trackers
def test_the_time_between_frames_counts() -> None:
    """After a second without frames an object is where its speed has brought it; without times, where it was."""
    found = {}
    for timed in (True, False):
        tracker = Tracker(rate=RATE)
        for frame in range(12):
            ids(tracker, [(2 * frame, 10)], seconds=frame / RATE if timed else None)
        after = [ids(tracker, [(2 * f, 10)], seconds=f / RATE if timed else None) for f in range(36, 39)]
        found[timed] = after[-1]
    assert found == {True: [1], False: [2]}


@needs_trackers
def test_what_has_ended_is_forgotten_and_its_id_not_given_again() -> None:
    tracker = Tracker(rate=RATE)
    for frame in range(3):
        ids(tracker, [(10, 10)], seconds=frame / RATE)
    assert len(tracker._trails) == 1
    ids(tracker, [], seconds=10)
    ids(tracker, [], seconds=11)
    assert (len(tracker._trails), tracker._ids[0]) == (0, {})
    assert [ids(tracker, [(10, 10)], seconds=12 + frame / RATE) for frame in range(2)] == [[-1], [2]]


@needs_trackers
@pytest.mark.parametrize("method", METHODS)
def test_a_frame_of_another_size_starts_anew(method: str) -> None:
    tracker = Tracker(method, rate=RATE)
    for frame in range(4):
        ids(tracker, [(10, 10)], picture=crossing(frame))
    other = replace(squares([(10, 10)]), size=(200, 300))
    for _ in range(4):
        found = tracker.update(other, np.zeros((200, 300, 3), np.uint8))
    assert found.track_ids.tolist() == [2]


@needs_trackers
def test_trails_are_drawn_and_follow_the_size_of_the_picture() -> None:
    tracker = Tracker(rate=RATE)
    for frame in range(40):
        found = tracker.update(squares([(2 * frame, 10)]))
    trail = found.tracks.trails[0]
    assert trail.shape == (tracking.TRAIL, 2)
    assert trail[-1].tolist() == [2 * 39 + 10, 20]
    larger = found.resized((2 * SIZE[0], 2 * SIZE[1]))
    assert np.array_equal(larger.tracks.trails[0], 2 * trail)
    grey = np.full((*SIZE, 3), 90, np.uint8)
    without = replace(found, tracks=None).draw(grey)
    drawn = found.draw(grey)
    x, y = trail[0].astype(int).tolist()
    assert (without[y, x] == 90).all()
    assert (drawn[y, x] != 90).any()


def test_the_colour_of_a_track_is_its_own_in_all_frames_and_its_number_is_written() -> None:
    grey = np.full((400, 400, 3), 90, np.uint8)
    found = replace(squares([(200, 200)]), size=(400, 400))
    first, again, other, none = (
        draw_instances(grey, replace(found, tracks=Tracks(np.array([number]), [np.zeros((0, 2), np.float32)])))
        for number in (7, 7, 8, -1)
    )
    assert np.array_equal(first, again)
    assert tuple(first[210, 200]) != tuple(other[210, 200])
    assert np.array_equal(none, found.draw(grey))
    label = [(picture[:200] != 90).any(axis=2).any(axis=0).sum() for picture in (first, none)]
    assert label[0] > label[1]  # wider by the number


def test_ids_reach_other_forms() -> None:
    tracks = Tracks(np.array([4, -1]), [np.ones((2, 2), np.float32), np.zeros((0, 2), np.float32)])
    found = replace(squares([(0, 0), (50, 50)]), tracks=tracks)
    assert found.to_supervision().tracker_id.tolist() == [4, -1]
    assert [entry.get("track_id") for entry in found.to_coco(1)] == [4, None]
    kept = found.filter(np.array([False, True]))
    assert (kept.track_ids.tolist(), len(kept.tracks.trails)) == ([-1], 1)
    assert squares([(0, 0)]).track_ids is None
    assert squares([(0, 0)]).to_supervision().tracker_id is None


@needs_trackers
def test_a_loop_over_a_video_over_pictures_and_over_what_comes_in(tmp_path: Path) -> None:
    pictures = [crossing(frame) for frame in range(FRAMES)]
    files = [str(save(tmp_path / f"{index:02}.png", picture)) for index, picture in enumerate(pictures)]
    model = TrackingModel()
    by_source = {
        "video": write_crossing(tmp_path / "a.mp4"),
        "list": pictures,
        "generator": iter(pictures),
        "files": files,
        "PIL": map(Image.fromarray, pictures),
    }
    for name, source in by_source.items():
        frames = list(model.track(source))
        assert len(frames) == FRAMES, name
        last = frames[-1]
        of_class = [dict(zip(frame.instances.class_names, frame.instances.track_ids.tolist())) for frame in frames]
        assert of_class[1:] == [{"red": 1, "green": 2}] * (FRAMES - 1), name
        assert last.image.shape == (*SIZE, 3), name
        assert last.seconds == pytest.approx((FRAMES - 1) / RATE, abs=1e-3), name
    assert model.training  # as it was


@needs_trackers
def test_the_body_of_the_loop_has_its_own_settings(tmp_path: Path) -> None:
    model = TrackingModel()
    for count, _ in enumerate(model.track([crossing(frame) for frame in range(6)])):
        assert torch.is_grad_enabled()
        if count == 2:
            break
    with torch.no_grad():
        frames = model.track([crossing(frame) for frame in range(6)])
        next(frames)
        frames.close()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert model.training


@needs_trackers
def test_a_frame_is_asked_for_when_it_is_needed() -> None:
    """Of a camera that a program reads itself, no more than two frames are taken before the first result."""
    taken = []

    def camera() -> object:
        for frame in range(10):
            taken.append(frame)
            yield crossing(frame)

    frames = TrackingModel().track(camera())  # type: ignore[arg-type]
    next(frames)
    assert len(taken) <= 2
    frames.close()


def wide(frame: int) -> np.ndarray:
    """Four times the model's input: two squares that are too small in it to be found, on their way across tiles."""
    x = 6 + 8 * frame
    return paint((2 * SIZE[0], 2 * SIZE[1]), [(RED, (x, 84, x + 28, 112)), (GREEN, (220 - x, 20, 248 - x, 48))])


@needs_trackers
@pytest.mark.parametrize("live", [False, True])
def test_tiles_are_tracked_like_whole_pictures(live: bool, tmp_path: Path) -> None:
    pictures, model = [wide(frame) for frame in range(20)], TrackingModel()
    assert not any(len(one.instances) for one in model.track(pictures))
    tiled = list(model.track(iter(pictures) if live else pictures, tile=SIZE, overlap=0.3))
    assert len(tiled) == 20
    for frame, (image, found, seconds) in enumerate(tiled):
        assert np.array_equal(image, pictures[frame])
        assert seconds == pytest.approx(frame / RATE)
        x = 6 + 8 * frame
        boxes = dict(zip(found.class_names, found.boxes))
        np.testing.assert_allclose(boxes["red"], (x, 84, x + 28, 112), atol=2)
        np.testing.assert_allclose(boxes["green"], (220 - x, 20, 248 - x, 48), atol=2)
        if frame:
            assert dict(zip(found.class_names, found.track_ids.tolist())) == {"red": 1, "green": 2}
    if not live:
        of_video = [one.instances for one in model.track(write(tmp_path / "a.mp4", pictures), tile=SIZE, overlap=0.3)]
        assert [found.class_names for found in of_video] == [one.instances.class_names for one in tiled]
        assert of_video[-1].track_ids.tolist() == tiled[-1].instances.track_ids.tolist()
        (last,) = predict_tiled(model, pictures[-1:], Tiling(SIZE, 0.3))
        np.testing.assert_array_equal(last.boxes, tiled[-1].instances.boxes)


@needs_trackers
def test_a_live_frame_on_tiles_waits_for_no_other() -> None:
    taken = []

    def camera() -> Iterator[np.ndarray]:
        for frame in range(10):
            taken.append(frame)
            yield wide(frame)

    frames = TrackingModel().track(
        camera(), tile=SIZE, batch_size=4
    )  # its nine tiles and the whole are no full batches
    for count in range(1, 4):
        next(frames)
        assert len(taken) == count
    frames.close()


@needs_trackers
def test_a_trained_model_in_a_loop() -> None:
    model = make_model()
    pictures = [crossing(frame) for frame in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        found = list(model.track(pictures, threshold=0.0, precision="fp32", rate=5))
        assert torch.is_autocast_enabled("cpu")
    assert [entry.seconds for entry in found] == pytest.approx([0, 0.2, 0.4, 0.6])
    expected = model.predict(pictures, threshold=0.0, precision="fp32")
    for entry, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(entry.instances.boxes, one.boxes, atol=1e-3)
    assert (found[-1].instances.track_ids > 0).any()


@needs_trackers
def test_frames_that_cannot_be_decoded_are_said_and_cost_no_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lose_frames(monkeypatch, range(8, 12))
    with caplog.at_level(logging.WARNING, "mvision"):
        frames = list(TrackingModel().track(write_crossing(tmp_path / "a.mp4")))
    assert len(frames) == FRAMES - 4
    assert sorted(frames[-1].instances.track_ids.tolist()) == [1, 2]
    (line,) = caplog.messages
    assert "a.mp4: " in line
    assert "4 damaged packets left out" in line


@needs_trackers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "a.png"}, "a.png is a picture, not a video"),
        ({"source": "pictures"}, "pictures is 2 files, not a video"),
        ({"source": "nothing.mp4"}, "no such file"),
        ({"source": 3.5}, "a float; give a video"),
        ({"source": np.zeros((96, 128, 3), np.uint8)}, r"one picture \(an array of shape \(96, 128, 3\)\), no video"),
        ({"source": np.zeros((96, 128), np.uint8)}, r"one picture \(an array of shape \(96, 128\)\), no video"),
        ({"source": "a.mp4", "rate": 30}, "has a frame rate of its own"),
        ({"source": [], "rate": 0}, "rate 0: frames per second"),
        ({"source": [], "tracker": "bytetrak"}, "did you mean 'bytetrack'"),
        ({"source": [], "threshold": 2}, "threshold 2: has to be between 0 and 1"),
        ({"source": [], "threshold": {"rde": 0.5}}, "did you mean 'red'"),
        ({"source": [], "tile": 5}, "tile 5x5: sides of 32"),
        ({"source": [], "overlap": 0.2}, "has no meaning without --tile"),
    ],
)
def test_mistakes_are_said_before_the_first_frame(
    arguments: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "pictures/1.png", "pictures/2.png"):
        save(tmp_path / name, crossing(0))
    write_crossing(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        TrackingModel().track(**arguments)


@needs_trackers
def test_a_method_that_compares_pictures_needs_them() -> None:
    with pytest.raises(UserError, match="give update"):
        Tracker("botsort").update(squares([(10, 10)]))

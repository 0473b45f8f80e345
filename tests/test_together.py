"""Features of prediction that were made apart: what two of them do in one command, or the line that refuses them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvision.cli.main import run
from mvision.commands import predict
from mvision.config import load_config
from mvision.errors import UserError
from tests.fake_model import FakeModel, paint, save
from tests.label_model import LabelModel, label, photos
from tests.tracked_videos import GREEN, RED, TrackingModel, entries, predict_by_command, write, write_crossing

LARGE = (96, 256)  # height and width of pictures that are two tiles of 96 x 128 and a bit
TILES = ("--tile", "96x128")


def with_thresholds(model: FakeModel, **thresholds: float) -> FakeModel:
    model.best_thresholds = thresholds
    return model


def test_the_best_thresholds_select_what_tiles_have_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small rectangle has a low score: green ones are below 0.5, and above the threshold that is theirs."""
    picture = paint(LARGE, [(RED, (10, 10, 60, 60)), (GREEN, (190, 60, 208, 75))])
    save(tmp_path / "in" / "a.png", picture)
    given = [tmp_path / "in", *TILES, "--no-whole", "--output", tmp_path / "out"]
    assert predict_by_command(monkeypatch, given, with_thresholds(FakeModel(), green=0.4)) == 0
    assert [entry["category_name"] for entry in entries(tmp_path / "out")] == ["red"]
    assert (
        predict_by_command(monkeypatch, [*given, "--threshold", "best"], with_thresholds(FakeModel(), green=0.4)) == 0
    )
    assert [entry["category_name"] for entry in entries(tmp_path / "out")] == ["red", "green"]
    out = capsys.readouterr().out
    assert "on tiles of 128 x 96 pixels" in out
    assert "thresholds: green 0.4; 0.5 for 2 without one, such as red" in out


def moving(frame: int) -> np.ndarray:
    """A red square that walks over the border of two tiles."""
    x = 60 + 4 * frame
    return paint(LARGE, [(RED, (x, 20, x + 30, 50))])


def test_objects_are_followed_over_the_borders_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackers")
    write(tmp_path / "a.mp4", map(moving, range(20)))
    given = [tmp_path / "a.mp4", "--track", *TILES, "--output", tmp_path / "out"]
    assert predict_by_command(monkeypatch, given) == 0
    found = entries(tmp_path / "out")
    assert [entry["frame"] for entry in found] == list(range(20))  # one a frame: what two tiles see is one object
    assert {entry["track_id"] for entry in found[1:]} == {1}
    assert found[-1]["bbox"][0] == pytest.approx(60 + 4 * 19, abs=2)


def test_tracks_start_from_the_best_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackers")
    video = write_crossing(tmp_path / "a.mp4")
    given = [video, "--track", "--threshold", "best", "--no-pictures", "--output", tmp_path / "out"]
    assert predict_by_command(monkeypatch, given, with_thresholds(FakeModel(), red=0.05, green=1.0)) == 0
    followed = {entry["category_name"] for entry in entries(tmp_path / "out") if "track_id" in entry}
    model = with_thresholds(TrackingModel(), red=0.05, green=1.0)
    assert isinstance(model, TrackingModel)
    frames = list(model.eval().track(str(video), threshold="best"))
    assert followed == {name for _, found, _ in frames for name in np.array(found.names)[found.labels]} == {"red"}


def test_labels_are_written_from_the_best_thresholds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The green rectangle has a score of 0.435."""
    monkeypatch.setattr(LabelModel, "best_thresholds", {"green": 0.44, "red": 0.2})
    folder = photos(tmp_path / "in")
    given = ("--format", "coco", "--review", "best")
    assert label(monkeypatch, folder, tmp_path / "all", *given, tasks=["detection"]) == 0
    assert "to review: 1 of 3 objects" in capsys.readouterr().out
    assert label(monkeypatch, folder, tmp_path / "best", *given, "--threshold", "best", tasks=["detection"]) == 0
    names = {"all": [3, 9, 10], "best": [3, 10]}
    for output, ids in names.items():
        content = json.loads((tmp_path / output / "annotations" / "instances_train.json").read_text())
        assert sorted(one["category_id"] for one in content["annotations"]) == ids


@pytest.mark.parametrize(
    "options",
    [("--tile", "640"), ("--overlap", "0.3"), ("--no-whole",), ("--track",), ("--track", "sort"), ("--data", "d")],
)
def test_what_ray_does_not_have_is_refused(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["predict", "photos", "--engine", "ray", "--weights", "w", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"{options[0]} is not for --engine ray" in line
    assert not list(tmp_path.iterdir())


def test_one_batch_size_for_pictures_tiles_and_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int | None] = []
    monkeypatch.setattr(predict, "predict_job", lambda *_, batch_size, **__: calls.append(batch_size))
    from mvision.commands import predict_ray

    monkeypatch.setattr(predict_ray, "predict_ray_job", lambda *_, batch_size, **__: calls.append(batch_size))
    for more in ([], ["--tile", "64"], ["--engine", "ray"]):
        assert run(["predict", "photos", "--batch-size", "3", *more]) == 0
    assert calls == [3, 3, 3]


def test_repeat_factors_count_no_tiles() -> None:
    with pytest.raises(UserError, match=r"data\.repeat_threshold counts whole images, not tiles"):
        load_config("tiny", overrides={"data.tile": 96, "data.repeat_threshold": 0.1})

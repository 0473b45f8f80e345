"""What a prediction leaves out is counted and named, and one picture costs itself alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvision.errors import UserError
from mvision.inference import reading
from mvision.inference.predict_sources import predict_sources
from mvision.inference.sources import Source, Sources, find_sources
from mvision.storage import atomic
from tests.fake_model import SIZE, FakeModel, paint, save, written
from tests.test_inference_sources import write_image

RED = (0, (30, 20, 60, 60))


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().eval()


def test_what_a_folder_leaves_out_is_counted(model: FakeModel, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("a.png", "sub/b.png", ".hidden.png", "sub/._b.png", ".ipynb_checkpoints/a.png", "out/old.png"):
        write_image(root / name)
    for name in ("notes.txt", "labels.txt", "sub/IMG_1.HEIC", "README", "Thumbs.db"):
        (root / name).write_bytes(b"x")
    os.mkfifo(root / "pipe.jpg")
    found = find_sources([root], leave_out=root / "out")
    assert [source.name for source in found] == ["a.png", "sub/b.png"]
    assert found.left_out == {
        ".txt": 2,
        ".heic": 1,
        ".db": 1,
        "without ending": 1,
        "hidden": 2,
        "hidden folders": 1,
        "in the output folder": 1,
        "neither file nor folder": 1,
    }
    text = str(predict_sources(model, found, root / "out", progress=False))
    assert "left out 10 files: 2 " in text
    assert "2 .txt" in text
    assert "no decoder for some of them, such as sub/IMG_1.HEIC: convert them to PNG or JPEG" in text


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path) -> None:
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image or video in this folder \(.*\); there are 2 \.heic, 1 \.txt"):
        find_sources([tmp_path])


def test_links_are_followed_and_counted(model: FakeModel, tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "deep" / "x.png")
    write_image(tmp_path / "elsewhere" / "y.png")
    root = tmp_path / "photos"
    write_image(root / "inner" / "a.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")  # the same pictures a second time
    (root / "inside").symlink_to(root / "inner")
    (root / "up").symlink_to(tmp_path)
    (root / "b.png").symlink_to(tmp_path / "elsewhere" / "y.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = find_sources([root])
    names = [source.name for source in found]
    assert sorted(name.rpartition("/")[2] for name in names) == ["a.png", "b.png", "gone.png", "x.png", "y.png"]
    assert found.outside == 4
    assert found.left_out == {"links to a folder above": 1}
    summary = predict_sources(model, found, tmp_path / "out", progress=False)
    assert summary.images == 4
    assert [(Path(name).name, reason) for name, reason in summary.skipped] == [
        ("gone.png", "No such file or directory")
    ]
    assert "4 sources lie outside the given folders, through links" in str(summary)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_costs_itself_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    found = find_sources([tmp_path])
    assert [source.name for source in found] == ["a.png"]
    assert found.skipped == [(str(tmp_path / "closed"), "cannot be read (Permission denied)")]


def test_a_source_that_is_named_twice_is_taken_once(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    found = find_sources([path, tmp_path, path])
    assert [source.required for source in found] == [True]
    assert found.left_out == {"named twice": 2}


def test_names_that_no_system_has(tmp_path: Path) -> None:
    for name in ("a\0b.jpg", "x" * 300, ""):
        with pytest.raises(UserError, match="^source"):
            find_sources([name])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_sources([tmp_path / "pipe"])


def test_a_picture_that_cannot_be_drawn_costs_its_picture_alone(model: FakeModel, tmp_path: Path) -> None:
    """JPEG ends at 65,535 pixels; PNG does not."""
    wide = np.full((4, 70_000, 3), 128, np.uint8)
    wide[:, 30_000:45_000] = (255, 0, 0)
    for name in ("in/wide.bmp", "in/wide2.png"):
        save(tmp_path / name, wide)
    save(tmp_path / "in/z.jpg", paint((96, 128), [RED]))
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", threshold=0.1, progress=False)
    assert written(tmp_path / "out") == ["predictions.json", "wide2.png", "z.jpg"]
    ((name, reason),) = summary.not_drawn
    assert name.endswith("wide.bmp")
    assert "70000 x 4" in reason
    assert f"not drawn {name}: " in str(summary)
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file_name"] for entry in entries] == ["wide2.png", "wide.bmp", "z.jpg"]


def test_a_damaged_picture_costs_itself_alone(model: FakeModel, tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", paint((96, 128), [RED]))
    whole = (tmp_path / "in/a.png").read_bytes()
    for name, content in {"cut.png": whole[:100], "empty.jpg": b"", "text.jpg": b"hello", "web.jpg": b"<html>"}.items():
        (tmp_path / "in" / name).write_bytes(content)
    summary = predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    assert summary.images == 1
    assert [Path(name).name for name, _ in summary.skipped] == ["cut.png", "empty.jpg", "text.jpg", "web.jpg"]
    with pytest.raises(UserError, match=r"none of 1 sources can be read|cut\.png"):
        predict_sources(model, [tmp_path / "in" / "cut.png"], tmp_path / "none", progress=False)


def test_many_damaged_pictures_are_not_a_page_each(model: FakeModel, tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", paint((96, 128), [RED]))
    for number in range(30):
        (tmp_path / "in" / f"b{number}.jpg").write_bytes(b"damaged")
    lines = str(predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)).splitlines()
    assert sum(line.startswith("skipped ") for line in lines) == 20
    assert "skipped: 10 more" in lines


def test_values_that_are_not_finite_are_said(model: FakeModel, tmp_path: Path) -> None:
    values = np.full((96, 128), 0.5, np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    text = str(predict_sources(model, [tmp_path / "a.tif"], tmp_path / "out", progress=False))
    assert "1 x picture with values that are NaN or infinite" in text


def test_an_earlier_predictions_json_goes_with_the_first_new_picture(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", paint((96, 128), [RED]))
    predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    old = (tmp_path / "out" / "predictions.json").read_bytes()
    forward = FakeModel.forward

    def interrupted(self: FakeModel, images: object) -> object:
        if len(self.batch_sizes) == self.last:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(FakeModel, "forward", interrupted)
    for last, is_left in ((0, True), (5, False)):
        model.last = last  # type: ignore[assignment]
        model.batch_sizes.clear()
        with pytest.raises(KeyboardInterrupt):
            predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
        assert (tmp_path / "out" / "predictions.json").exists() == is_left
        assert not is_left or (tmp_path / "out" / "predictions.json").read_bytes() == old


def test_what_a_killed_prediction_has_left_is_removed(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in" / "sub" / "a.png", paint((96, 128), [RED]))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        left = [(tmp_path / "out" / atomic._partial_name("predictions.json"))]
        left.append(tmp_path / "out" / "sub" / atomic._partial_name("a.png"))
    left[1].parent.mkdir(parents=True)
    for file in left:
        file.write_bytes(b"half")
    predict_sources(model, [tmp_path / "in"], tmp_path / "out", progress=False)
    assert written(tmp_path / "out") == ["predictions.json", "sub/a.png"]


def test_very_large_pictures_are_not_kept_but_read_again(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        save(tmp_path / "in" / f"{number}.png", paint((96 + number, 128), [RED]))
    predict_sources(model, [tmp_path / "in"], tmp_path / "kept", progress=False)
    monkeypatch.setattr(reading, "BIG", 96 * 128)
    kept = [frame.image is not None for frame in reading.read_frames(find_sources([tmp_path / "in"]), input_size=SIZE)]
    assert kept == [True, False, False, False]
    predict_sources(model, [tmp_path / "in"], tmp_path / "again", progress=False)
    assert written(tmp_path / "again") == written(tmp_path / "kept")
    for name in written(tmp_path / "kept"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_pictures_of_a_data_set_stay_in_the_output_folder(model: FakeModel, tmp_path: Path) -> None:

    path = save(tmp_path / "images" / "a.png", paint((96, 128), [RED]))
    sources = Sources([Source("image", str(path), "../../a.png", required=False)])
    predict_sources(model, sources, tmp_path / "x" / "out", progress=False)
    assert written(tmp_path / "x") == ["out/a.png", "out/predictions.json"]

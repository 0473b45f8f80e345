"""``mvision label``: what is written is read back as the same objects, and a run is complete or goes on."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mvision.cli.main import run
from mvision.data.formats import label_studio_writer
from mvision.data.formats.labelled import outlines
from mvision.data.formats.yolo_writer import joined, label_file
from mvision.data.tools import label as tool
from mvision.structures.masks import encode_mask
from tests.fake_model import FakeModel, paint, save, written
from tests.label_model import CLASSES, POINTS, LabelModel, label, photos, read

FORMATS = ("coco", "yolo", "cvat", "label-studio", "fiftyone")


@pytest.mark.parametrize("form", FORMATS)
def test_boxes_are_read_back(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert label(monkeypatch, photos(tmp_path / "in"), out, "--format", form, tasks=["detection"]) == 0
    assert not list(tmp_path.glob(".out*"))
    found = read(out)
    assert {name: [one["name"] for one in objects] for name, objects in found.items()} == {
        "a.png": ["red", "green"],
        "b.png": ["blue"],
        "empty.png": [],
    }
    for (x, y, w, h), one in zip([(20, 10, 50, 50), (90, 60, 18, 15)], found["a.png"]):
        np.testing.assert_allclose(one["bbox"], [x, y, w, h], atol=0.02)
    picture = next(out.rglob("a.png"))
    assert picture.samefile(tmp_path / "in" / "a.png")
    assert not picture.is_symlink()  # linked, not copied


@pytest.mark.parametrize(("form", "masks"), [(f, "polygon") for f in FORMATS] + [(f, "rle") for f in FORMATS[2:]])
def test_masks_are_read_back(form: str, masks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = photos(tmp_path / "in"), tmp_path / "out"
    assert label(monkeypatch, folder, out, "--format", form, "--masks", masks, tasks=["instance-seg"]) == 0
    one = read(out)["a.png"][0]
    expected = np.zeros((96, 128), bool)
    expected[10:35, 20:70] = expected[35:60, 20:45] = expected[55:60, 65:70] = True
    rle = one["segmentation"]
    if isinstance(rle, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(rle, 96, 128))
    got = coco_mask.decode(rle).astype(bool)
    assert (got & expected).sum() / (got | expected).sum() >= (1 if masks == "rle" else 0.98)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tasks", [["keypoints"], ["instance-seg", "keypoints"]])
def test_poses_are_read_back(form: str, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert label(monkeypatch, photos(tmp_path / "in"), out, "--format", form, tasks=tasks) == 0
    found = read(out)
    red, green = found["a.png"]
    # The third point has a score of 0.1.
    np.testing.assert_allclose(red["keypoints"], [22, 12, 2, 68, 12, 2, 0, 0, 0], atol=0.02)
    np.testing.assert_allclose(red["bbox"], [20, 10, 50, 50], atol=0.02)
    assert not any(green["keypoints"])
    assert len(found["b.png"]) == 1
    with_masks = "instance-seg" in tasks and form != "yolo"
    assert all(("segmentation" in one) == with_masks for one in (red, green))


def test_the_mark_for_review(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The green rectangle has a score of 0.435."""
    folder = photos(tmp_path / "in")
    for form in FORMATS:
        assert label(monkeypatch, folder, tmp_path / form, "--format", form, tasks=["detection"]) == 0
        assert "to review: 1 of 3 objects, in 1 pictures, have a score below 0.5" in capsys.readouterr().out
    for file in ("coco/annotations/instances_train.json", "fiftyone/labels.json"):
        annotations = json.loads((tmp_path / file).read_text())["annotations"]
        assert [one["attributes"]["review"] for one in annotations] == [False, True, False]
        assert annotations[1]["score"] == pytest.approx(0.435, abs=1e-3)
    boxes = list(ElementTree.parse(tmp_path / "cvat" / "annotations.xml").iter("box"))
    texts = [[attribute.text for attribute in box] for box in boxes]
    assert texts == [["false", "1.000"], ["true", "0.435"], ["false", "1.000"]]
    tasks = json.loads((tmp_path / "label-studio" / "tasks.json").read_text())
    assert [task["data"]["review"] for task in tasks] == [1, 0, 0]
    assert tasks[0]["predictions"][0]["score"] == pytest.approx(0.435, abs=1e-3)
    rows = list(csv.reader((tmp_path / "yolo" / "review.csv").open()))
    assert rows[1:] == [["images/train/a.png", "labels/train/a.txt", "2", "green", "0.435"]]


def test_thresholds_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = photos(tmp_path / "in")
    options = ("--format", "coco", "--threshold", "green=0.6", "--review", "red=1", "--review", "0")
    assert label(monkeypatch, folder, tmp_path / "out", *options, tasks=["detection"]) == 0
    assert [one["name"] for one in read(tmp_path / "out")["a.png"]] == ["red"]
    said = capsys.readouterr().out
    assert "left out: 1 objects with scores from 0.1 to that of their class" in said
    assert "to review" not in said


def test_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = photos(tmp_path / "in")
    save(folder / "a.bmp", paint((96, 128), []))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "clip.mp4").write_bytes(b"no video")
    assert label(monkeypatch, folder, tmp_path / "out", "--format", "yolo", tasks=["instance-seg", "keypoints"]) == 0
    said = capsys.readouterr().out
    assert "skipped" in said
    assert "broken.png" in said
    assert "1 videos or streams" in said
    assert "1 x pictures under another name" in said
    assert "3 x masks left out, because a line of YOLO" in said
    assert "1 x keypoints with a score below 0.3" in said
    assert "2 x objects of classes without keypoints" in said
    assert sorted(path.name for path in (tmp_path / "out" / "labels").rglob("*.txt")) == [
        "a-2.txt",
        "a.txt",
        "b.txt",
        "empty.txt",
    ]


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder, out, forward = tmp_path / "in", tmp_path / "out", FakeModel.forward
    for index in range(40):
        save(folder / f"{index}.png", paint((96, 128), [(index % 3, (20, 10, 70, 60))]))

    def interrupted(self: FakeModel, images: torch.Tensor) -> object:
        if len(self.batch_sizes) == 30:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(FakeModel, "forward", interrupted)
    assert label(monkeypatch, folder, out, "--format", "cvat", tasks=["detection"]) == 130
    assert "pictures are done; the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    journal = tmp_path / ".out.partial" / "predictions.jsonl"
    done = len(journal.read_text().splitlines()) - 1
    assert 0 < done < 40
    with journal.open("a") as file:
        file.write('{"stamp": [1')  # as a kill leaves it
    monkeypatch.setattr(FakeModel, "forward", forward)
    save(folder / "0.png", paint((96, 128), [(2, (20, 10, 71, 60))]))  # it has changed since
    (folder / "1.png").unlink()
    other = ("--format", "cvat", "--threshold", "0.2")
    assert label(monkeypatch, folder, out, *other, tasks=["detection"]) == 2
    assert "unfinished work of a run with --threshold 0.3, not 0.2" in capsys.readouterr().err
    assert label(monkeypatch, folder, out, "--format", "coco", tasks=["detection"]) == 0  # the format may be another
    said = capsys.readouterr().out
    assert f"39 pictures ({done - 2} of them by an earlier run)" in said
    assert "1 pictures of the earlier run are not in the folder any more" in said
    found = read(out)
    assert len(found) == 39
    assert [one["name"] for one in found["0.png"]] == ["blue"]
    assert all(len(objects) == 1 for objects in found.values())
    assert not journal.parent.exists()


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder, out = photos(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "corrected.xml").write_text("x")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    for where, target, options, message in [
        (tmp_path / "nothing", out, ("--format", "coco"), "no image or video in this folder"),
        (tmp_path / "gone", out, ("--format", "coco"), "no such file or folder"),
        (folder, tmp_path / "full", ("--format", "coco"), "not empty; choose a new folder"),
        (folder, out, ("--format", "cvatt"), "did you mean 'cvat'?"),
        (folder, out, (), "missing option '--format'"),
        (folder, out, ("--format", "coco", "--masks", "rle"), "the weights find no masks"),
        (folder, out, ("--format", "coco", "--image-url", "s3://b"), "only for --format label-studio"),
        (folder, out, ("--format", "coco", "--task", "tracking"), "unknown task 'tracking'"),
        (folder, out, ("--format", "coco", "--review", "cat=0.2"), "no such class"),
        (broken, out, ("--format", "coco"), "none of 1 pictures can be read"),
    ]:
        assert label(monkeypatch, where, target, *options, tasks=["detection"]) == 2, options
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))
    assert written(tmp_path / "full") == ["corrected.xml"]


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("cvat", "a\x07b", "a character that XML cannot hold"),
        ("cvat", "x" * 65, "65 characters, a label of CVAT has 64 at most"),
        ("cvat", "red pose", "two labels would be called 'red pose'"),
        ("label-studio", "a\x07b", "a character that XML cannot hold"),
        ("yolo", " ", "has no name"),
        ("coco", "half \ud83d", "half a character"),
        ("fiftyone", "red", "two classes of the weights are called 'red'"),
    ],
)
def test_names_that_a_format_cannot_hold(
    form: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tests.label_model.CLASSES", [CLASSES[0], CLASSES[1].model_copy(update={"name": name})])
    assert label(monkeypatch, photos(tmp_path / "in"), tmp_path / "out", "--format", form, tasks=["keypoints"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_without_the_task(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from mvision.weights import save_weights
    from tests.test_weights import make_model

    save_weights(make_model(), tmp_path / "best.safetensors")
    options = [
        "--weights",
        str(tmp_path / "best.safetensors"),
        "--task",
        "keypoints",
        "--output",
        str(tmp_path / "out"),
    ]
    assert run(["label", str(photos(tmp_path / "in")), "--format", "coco", *options]) == 2
    assert "keypoints" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_poses_of_two_kinds_are_no_yolo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        "tests.label_model.CLASSES", [CLASSES[0], CLASSES[1].model_copy(update={"keypoints": ["a"]}), CLASSES[2]]
    )
    assert label(monkeypatch, photos(tmp_path / "in"), tmp_path / "out", "--format", "yolo", tasks=["keypoints"]) == 2
    assert "those of 'red', 'green' differ" in capsys.readouterr().err


def test_outlines_have_few_points_and_the_area_of_their_mask() -> None:
    y, x = np.mgrid[:200, :300]
    mask = (x - 150) ** 2 / 100**2 + (y - 100) ** 2 / 70**2 < 1
    mask[95:105, 140:160] = False  # a hole
    mask[3:5, 3:5] = True  # a speck
    notes: tool.Counter = tool.Counter()
    (outline,) = outlines(encode_mask(mask), notes)
    assert len(outline) / 2 < 60
    got = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([outline], 200, 300))).astype(bool)
    mask[95:105, 140:160] = True
    assert (got & mask).sum() / (got | mask).sum() > 0.98
    assert sorted(notes.values()) == [1]  # the hole is less than a hundredth
    mask[80:120, 120:180] = False
    outlines(encode_mask(mask), notes)
    assert sorted(notes.values()) == [1, 2]


def test_parts_of_an_outline_become_one_line() -> None:
    one, other = [0, 0, 10, 0, 10, 10, 0, 10], [20, 0, 30, 0, 30, 10, 20, 10]
    whole = joined([one, other])
    alone = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([one, other], 20, 40)))
    assert (coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([whole], 20, 40))) == alone).mean() > 0.98


def test_label_files_lie_where_yolo_looks() -> None:
    assert label_file("images/train/a.jpg") == "labels/train/a.txt"
    assert label_file("images/train/images/a.b.jpg") == "images/train/labels/a.b.txt"


def test_tasks_are_divided_among_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio_writer, "MAX_BYTES", 800)
    out = tmp_path / "out"
    assert label(monkeypatch, photos(tmp_path / "in"), out, "--format", "label-studio", tasks=["detection"]) == 0
    assert sorted(path.name for path in out.glob("tasks*")) == ["tasks-2.json", "tasks.json"]
    assert len(read(out)) == 3


def test_only_the_pictures_path_is_linked_on_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refused(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    out = tmp_path / "out"
    assert label(monkeypatch, photos(tmp_path / "in"), out, "--format", "coco", tasks=["detection"]) == 0
    assert "3 x pictures linked by their path" in capsys.readouterr().out
    assert (out / "images" / "a.png").resolve() == (tmp_path / "in" / "a.png").resolve()


def test_memory_does_not_hold_the_pictures(tmp_path: Path) -> None:
    """The journal gives one picture at a time, as often as it is asked."""
    from mvision.data.formats.labelled import LabelledPicture
    from mvision.data.tools.label_journal import Journal

    with Journal(tmp_path / "out", {}) as journal:
        for index in range(3):
            journal.add(LabelledPicture(f"{index}.png", 4, 4), [index], {})
        journal.add(LabelledPicture("1.png", 8, 8), [7], {})
        assert [(p.name, p.height) for p, _ in journal.entries()] == [("0.png", 4), ("2.png", 4), ("1.png", 8)]
        assert journal.has("1.png", [7])
        assert not journal.has("1.png", [1])


def test_the_names_of_keypoints_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvision.data.formats.coco import CocoSplit
    from mvision.data.formats.layouts import find_layout

    for form in FORMATS:
        out = tmp_path / form
        assert label(monkeypatch, photos(tmp_path / "in"), out, "--format", form, tasks=["keypoints"]) == 0
        red = CocoSplit(find_layout(out).split("train", ("boxes", "keypoints")), ("keypoints",)).own[0]
        assert red.keypoints == POINTS, form
        if form not in ("yolo", "label-studio"):
            assert red.skeleton == [(0, 1), (1, 2)], form
    assert LabelModel().tasks == ["detection"]

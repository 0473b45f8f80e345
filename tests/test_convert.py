"""``mvision data convert``: what is copied, what is left out, and what an interruption leaves behind."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.formats.problems import Problems
from mvision.data.tools import convert as module
from mvision.data.tools.convert import convert
from mvision.errors import UserError
from tests.coco_files import annotation, coco, picture, write_picture, write_set


def two_pictures(root: Path, first: str = "1.png", second: str = "2.png") -> Path:
    tree = coco([annotation(1), annotation(2), annotation(2, [1, 2, 30, 20])], images=2)
    for entry, name in zip(tree["images"], (first, second)):
        entry["file_name"] = name
    write_set(root, tree, pictures=False)
    for number, name in enumerate((first, second)):
        write_picture(root / "images" / "new.png", picture(seed=number))
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / "new.png").rename(root / "images" / name)
    return root


def test_a_link_to_something_else_is_not_copied(tmp_path: Path) -> None:
    old = two_pictures(tmp_path / "old")
    (tmp_path / "secret").write_text("user:password\n")
    (old / "images" / "2.png").unlink()
    (old / "images" / "2.png").symlink_to(tmp_path / "secret")
    problems = Problems()
    layout = convert(find_layout(old), tmp_path / "new", problems=problems)
    assert [record.file for record in CocoSplit(layout.split("train"), FIELDS).records] == ["train/1.png"]
    assert "password" not in "".join(file.read_text("latin-1") for file in (tmp_path / "new").rglob("*.*"))
    outside, problem = problems
    assert "through links" in outside.kind
    assert problem.kind == "image that cannot be read: left out with its objects"
    assert problem.examples == ["train: 2.png: not an image that can be read, 2 objects"]


def test_what_the_annotations_lack_is_said(tmp_path: Path) -> None:
    old = two_pictures(tmp_path / "old")
    (old / "images" / "2.png").unlink()
    problems = Problems()
    layout = convert(find_layout(old), tmp_path / "new", problems=problems)
    assert len(CocoSplit(layout.split("train"), FIELDS)) == 1
    (problem,) = problems
    assert "not there" in problem.kind
    assert problem.examples == ["train: 2.png"]


def test_a_link_to_a_picture_is_copied(tmp_path: Path) -> None:
    old = two_pictures(tmp_path / "old")
    (old / "images" / "2.png").rename(tmp_path / "elsewhere.png")
    (old / "images" / "2.png").symlink_to(tmp_path / "elsewhere.png")
    convert(find_layout(old), tmp_path / "new")
    copy = tmp_path / "new" / "images" / "train" / "2.png"
    assert copy.read_bytes() == (tmp_path / "elsewhere.png").read_bytes()
    assert not copy.is_symlink()


def test_without_any_picture_nothing_is_made(tmp_path: Path) -> None:
    old = two_pictures(tmp_path / "old")
    for name in ("1.png", "2.png"):
        (old / "images" / name).write_text("no picture")
    with pytest.raises(UserError, match=r"train\.json: none of its 2 images can be read: not an image"):
        convert(find_layout(old), tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("empty_folder", [True, False])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_folder: bool) -> None:
    old = two_pictures(tmp_path / "old")
    if empty_folder:
        (tmp_path / "new").mkdir()

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"new: cannot be written \(No space left on device\)"):
        convert(find_layout(old), tmp_path / "new")
    assert [file.name for file in tmp_path.rglob("*") if "old" not in file.parts] == ["new"] * empty_folder


def test_what_a_kill_leaves_is_hidden_and_named_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = two_pictures(tmp_path / "old")
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # a killed process does not tidy up
    monkeypatch.setattr(module.json, "dumps", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(find_layout(old), tmp_path / "new")
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    problems = Problems()
    convert(find_layout(old), tmp_path / "new", problems=problems)
    assert [problem.kind for problem in problems] == ["folder that a conversion left when it was killed: delete it"]
    assert len(CocoSplit(find_layout(tmp_path / "new").split("train"), FIELDS)) == 2


def test_a_link_is_no_destination(tmp_path: Path) -> None:
    old = two_pictures(tmp_path / "old")
    (tmp_path / "new").symlink_to(tmp_path / "somewhere")
    with pytest.raises(UserError, match="not empty"):
        convert(find_layout(old), tmp_path / "new")
    assert not (tmp_path / "somewhere").exists()


def test_equal_names_in_different_case_and_folders(tmp_path: Path) -> None:
    problems = Problems()
    convert(find_layout(two_pictures(tmp_path / "old", "a/x.png", "b/x.png")), tmp_path / "one", problems=problems)
    assert (tmp_path / "one" / "images" / "train" / "b" / "x.png").is_file()
    assert len(problems) == 0
    convert(find_layout(two_pictures(tmp_path / "other", "x.png", "X.png")), tmp_path / "two", problems=problems)
    split = CocoSplit(find_layout(tmp_path / "two").split("train"), FIELDS)
    assert [record.file for record in split.records] == ["train/x.png", "train/X-2.png"]
    assert str(problems) == "1 x image copied under another name (train: X.png as X-2.png)"


@pytest.mark.skipif(os.name == "nt", reason="such names are not possible there")
def test_odd_names(tmp_path: Path) -> None:
    """A line break, and a byte that is no UTF-8, in names of a YOLO set, which come from the file system."""
    (tmp_path / "old" / "images").mkdir(parents=True)
    (tmp_path / "old" / "labels").mkdir()
    (tmp_path / "old" / "data.yaml").write_text("names: [cat]\ntrain: images\nval: images\n")
    for name in ("a\nb", "c\udcffd", "Größe 1"):
        try:
            Image.fromarray(picture()).save(tmp_path / "old" / "images" / f"{name}.png")
        except (OSError, UnicodeEncodeError):
            pytest.skip("this file system takes no such name")
        (tmp_path / "old" / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    layout = convert(find_layout(tmp_path / "old"), tmp_path / "new", ["train"])
    split = CocoSplit(layout.split("train"), FIELDS)
    assert sorted(record.file for record in split.records) == ["train/Größe 1.png", "train/a_b.png", "train/c_d.png"]
    assert len(split.labels) == 3


def test_masks_points_and_sigmas_are_kept(tmp_path: Path) -> None:
    people = [{"id": 5, "name": "pose", "keypoints": ["a", "b"], "skeleton": [[1, 2]], "sigmas": [0.1, 0.2]}]
    outline = [[10.5, 10, 20, 10, 20, 20.25]]
    entry = annotation(category_id=5, segmentation=outline, keypoints=[9, 9, 2, 12, 12, 1], area=77.5)
    crowd = annotation(category_id=5, bbox=[0, 0, 8, 8], segmentation={"counts": [0, 384, 2688], "size": [48, 64]})
    old = write_set(tmp_path / "old", coco([entry, {**crowd, "iscrowd": 1}], people))
    before = CocoSplit(find_layout(old).split("train", FIELDS), FIELDS)
    after = CocoSplit(convert(find_layout(old), tmp_path / "new").split("train", FIELDS), FIELDS)
    assert after.categories == before.categories
    assert after.coco_dict["annotations"] == before.coco_dict["annotations"]
    np.testing.assert_array_equal(after.labels.keypoints, before.labels.keypoints)
    written = json.loads((tmp_path / "new" / "annotations" / "train.json").read_text())["annotations"][0]
    assert written["segmentation"] == outline
    assert written["area"] == 77.5

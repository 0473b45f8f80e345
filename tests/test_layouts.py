"""Every layout that is recognised, and what is said about the others."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from mvision.builtin import ensure_builtin
from mvision.config import DataConfig
from mvision.data import read_data_sources, read_validation
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.errors import UserError
from tests.coco_files import CATEGORIES, PEOPLE, annotation, coco, picture, write_picture, write_set


def test_images_and_annotations(tmp_path: Path) -> None:
    for split in ("train", "val", "train_permissive"):
        write_set(tmp_path, coco([annotation()]), split)
    layout = find_layout(tmp_path)
    assert list(layout.splits) == ["train", "val", "train_permissive"]
    assert str(tmp_path) in layout.description
    assert "\n" not in layout.description
    assert layout.split("train_permissive").annotations.name == "train_permissive.json"
    assert CocoSplit(layout.split()).split.name == "val"


def test_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    write_set(tmp_path, coco([annotation()]), "train_permissive")
    with pytest.raises(UserError, match="did you mean 'train_permissive'"):
        find_layout(tmp_path).split("train_permisive")
    with pytest.raises(UserError, match=r"no split 'val': choose one of train, train_permissive"):
        find_layout(tmp_path).split("val")


def test_images_one_level_deeper(tmp_path: Path) -> None:
    write_set(tmp_path, coco([annotation()]))
    deeper = tmp_path / "images" / "train"
    deeper.mkdir()
    shutil.move(tmp_path / "images" / "1.png", deeper / "1.png")
    assert CocoSplit(find_layout(tmp_path).split("train")).folder == deeper


def _coco_original(root: Path) -> Path:
    """Two files for the same images, as COCO has them: all objects, and people with keypoints."""
    classes = [{"id": 1, "name": "person"}, {"id": 7, "name": "dog"}]
    everything = coco([annotation(1, category_id=1), annotation(1, category_id=7)], classes)
    people = coco([annotation(1, category_id=1, keypoints=[10, 10, 2, 12, 10, 2, 0, 0, 0], num_keypoints=2)], PEOPLE)
    (root / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(everything))
        (root / "annotations" / f"person_keypoints_{part}.json").write_text(json.dumps(people))
        write_picture(root / part / "1.png", picture())
    return root


def test_coco_original_picks_the_file_by_task(tmp_path: Path) -> None:
    layout = find_layout(_coco_original(tmp_path))
    assert {"train", "val"} <= set(layout.splits)
    fields = ("boxes", "keypoints")

    boxes = CocoSplit(layout.split("train", ["boxes"]))
    assert [category.name for category in boxes.categories] == ["person", "dog"]
    assert len(boxes.labels) == 2

    people = CocoSplit(layout.split("train", fields, poses_only=True), fields)
    assert [category.name for category in people.categories] == ["person"]
    assert people.split.images == tmp_path / "train2017"

    joint = CocoSplit(layout.split("train", fields), fields)
    assert [len(category.keypoints) for category in joint.categories] == [3, 0]
    assert joint.labels.keypoints is not None
    assert (joint.labels.keypoints[..., 2] > 0).sum(axis=1).tolist() == [2, 0]


def test_the_tasks_of_a_run_decide_on_the_file_of_cocos_layout(tmp_path: Path) -> None:
    config = DataConfig(root=str(_coco_original(tmp_path)))
    for tasks, classes in ((["detection"], 2), (["keypoints"], 1), (["keypoints", "detection"], 2)):
        (source,) = read_data_sources(config, tasks, 0, lambda _: None)
        _, ((_, _, val),) = read_validation(config, None, tasks)
        for split in (source.train, source.val, val):
            assert len(split.categories) == classes
            assert ("keypoints" in split.fields & split.available) == ("keypoints" in tasks)


def test_roboflow_export(tmp_path: Path) -> None:
    tree = coco(
        [annotation(1, category_id=1)],
        [
            {"id": 0, "name": "animals", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "animals"},
            {"id": 2, "name": "dog", "supercategory": "animals"},
        ],
    )
    for folder in ("train", "valid", "test"):
        write_picture(tmp_path / folder / "1.png", picture())
        (tmp_path / folder / "_annotations.coco.json").write_text(json.dumps(tree))
    layout = find_layout(tmp_path)
    assert list(layout.splits) == ["train", "val", "test"]
    assert "Roboflow" in layout.description
    split = CocoSplit(layout.split("val"))
    assert split.folder == tmp_path / "valid"
    assert [category.name for category in split.categories] == ["cat", "dog"]  # the unused parent is no class


def test_what_is_not_recognised_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_layout(tmp_path / "nowhere")
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "stray.csv").touch()
    with pytest.raises(UserError, match=r"found: JPEGImages/, stray\.csv.*Pascal VOC"):
        find_layout(tmp_path)
    with pytest.raises(UserError, match=r"stray\.csv: a folder or a YOLO data\.yaml"):
        find_layout(tmp_path / "stray.csv")


def test_none_is_the_built_in_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, coco([annotation()], CATEGORIES))
    monkeypatch.setattr("mvision.builtin.ensure_builtin", lambda progress, log: tmp_path)
    assert find_layout(None).root == tmp_path


def test_more_pictures_of_the_built_in_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin with the same pictures, and their numbers are checked before anything is drawn."""
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path))
    monkeypatch.setattr("mvision.builtin.ensure_builtin", partial(ensure_builtin, val=2))
    few, more = (CocoSplit(find_layout(f"builtin:{count}").split("train")) for count in (3, 5))
    assert [record.file for record in more.records][:3] == [record.file for record in few.records]
    assert len(more.records) == 5
    first = few.records[0].file
    assert (few.folder / first).read_bytes() == (more.folder / first).read_bytes()
    for number in (0, 100_001):
        with pytest.raises(UserError, match=rf"--data builtin:{number}: give a number of training images"):
            find_layout(f"builtin:{number}")
    with pytest.raises(UserError, match="builtin:many: no such folder"):
        find_layout("builtin:many")

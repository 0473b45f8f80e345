"""Exports of other tools as they come out of their archives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout, usual_splits
from mvision.errors import UserError
from tests.coco_files import annotation, coco, picture, write_picture
from tests.yolo_files import BOXES, read, said, yolo_set


def _file(path: Path, names: Sequence[str]) -> None:
    """A COCO file of pictures with these names, with an object in each."""
    tree: dict[str, Any] = coco([annotation(number) for number in range(1, len(names) + 1)], images=len(names))
    for entry, name in zip(tree["images"], names, strict=True):
        entry["file_name"] = name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def _pictures(folder: Path, names: Sequence[str] = ("1.png", "2.png")) -> None:
    for name in names:
        write_picture(folder / name, picture())


def _objects(root: Path, split: str = "train") -> int:
    return len(CocoSplit(find_layout(root).split(split)).labels)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("annotations/{}.json", "Images/{}"),
        ("annotations/{}.json", "images"),
        ("annotations/{}.json", "{}"),
        ("Annotations/{}.JSON", "{}"),
        ("annotations/project_{}_v2.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}/labels.json", "{}/data"),
        ("{}/annotations.json", "{}/images"),
        ("{}.json", "{}"),
        ("{}.json", "images/{}"),
        ("{}.json", "."),
    ],
)
@pytest.mark.parametrize(("train", "val"), [("Train", "Validation"), ("train", "val"), ("training", "Valid")])
def test_names_of_splits_and_places_of_files(tmp_path: Path, file: str, images: str, train: str, val: str) -> None:
    for split, names in ((train, ["1.png", "2.png"]), (val, ["3.png"])):
        _file(tmp_path / file.format(split), names)
        _pictures(tmp_path / images.format(split), names)
    assert usual_splits(find_layout(tmp_path)) == ["train", "val"]
    assert (_objects(tmp_path), _objects(tmp_path, "val")) == (2, 1)


def test_folders_may_have_another_word_for_their_split_than_the_files(tmp_path: Path) -> None:
    for file, folder in (("train", "Train"), ("val", "Validation")):
        _file(tmp_path / "annotations" / f"instances_{file}.json", ["1.png"])
        _pictures(tmp_path / "images" / folder, ["1.png"])
    assert (_objects(tmp_path), _objects(tmp_path, "val")) == (1, 1)


@pytest.mark.parametrize(
    ("file", "form", "folder"),
    [
        ("result.json", "images/{}", "images"),
        ("annotations.json", "JPEGImages/{}", "JPEGImages"),
        ("coco.json", "{}", "."),
        ("labels.json", "{}", "data"),
        ("annotations/instances_default.json", "{}", "images/default"),
        ("annotations/instances_default.json", "{}", "images"),
        ("annotations/result.json", "images/{}", "images"),
    ],
)
def test_a_single_file_serves_as_train_and_val_is_asked_for(tmp_path: Path, file: str, form: str, folder: str) -> None:
    names = ["1.png", "2.png"]
    _file(tmp_path / file, [form.format(name) for name in names])
    _pictures(tmp_path / folder, names)
    layout = find_layout(tmp_path)
    assert f"{Path(file).name} serves as 'train'" in layout.description
    assert usual_splits(layout) == ["train"]
    assert _objects(tmp_path) == 2
    with pytest.raises(UserError, match="no split 'val'"):
        layout.split("val")


def test_a_file_is_no_train_where_another_could_be(tmp_path: Path) -> None:
    _file(tmp_path / "annotations" / "val.json", ["1.png"])
    _pictures(tmp_path / "images")
    assert list(find_layout(tmp_path).splits) == ["val"]
    for name in ("cats", "dogs"):
        _file(tmp_path / "annotations" / f"{name}.json", ["1.png"])
    assert list(find_layout(tmp_path).splits) == ["val", "cats", "dogs"]


def test_of_two_files_for_a_split_the_other_is_said(tmp_path: Path) -> None:
    for year in (2014, 2017):
        _file(tmp_path / "annotations" / f"instances_train{year}.json", ["1.png"] * (year - 2013))
        _pictures(tmp_path / f"train{year}")
    layout = find_layout(tmp_path)
    assert layout.split("train").annotations.name == "instances_train2017.json"
    assert "'train' is instances_train2017.json, not instances_train2014.json" in layout.description
    _file(tmp_path / "train" / "a.json", ["1.png"])
    (tmp_path / "annotations").rename(tmp_path / "train" / "old")
    _file(tmp_path / "train" / "b.json", ["1.png"])
    with pytest.raises(UserError, match=r"train: several COCO files \(a\.json, b\.json\)"):
        find_layout(tmp_path)


def test_hidden_and_foreign_json_files_are_left_out_and_said(tmp_path: Path) -> None:
    for name in ("train", "val", "..", ".backup"):
        _file(tmp_path / "annotations" / f"{name}.json", ["1.png"])
    (tmp_path / "annotations" / "label_map.json").write_text('{"1": "cat"}')
    _pictures(tmp_path / "images")
    layout = find_layout(tmp_path)
    assert list(layout.splits) == ["train", "val"]
    assert layout.description.endswith("hidden files are left out: ...json, .backup.json; not read: label_map.json")
    # A file called like a split is not left out, so that its fault is named.
    (tmp_path / "annotations" / "train.json").write_text("{")
    with pytest.raises(UserError, match=r"train\.json: not valid JSON"):
        CocoSplit(find_layout(tmp_path).split("train"))


def test_labelme_files_are_no_data_set(tmp_path: Path) -> None:
    _pictures(tmp_path)
    for name in ("1", "2"):
        (tmp_path / f"{name}.json").write_text('{"shapes": [], "imagePath": "1.png"}')
    with pytest.raises(UserError, match="no data set recognised"):
        find_layout(tmp_path)


def test_annotations_without_their_images_are_said(tmp_path: Path) -> None:
    _file(tmp_path / "annotations" / "instances_train.json", ["1.png"])
    with pytest.raises(UserError, match=r"instances_train\.json is there, its images are not: neither train/ nor"):
        find_layout(tmp_path)
    _file(tmp_path / "annotations" / "instances_val.json", ["1.png"])
    _pictures(tmp_path / "val")
    layout = find_layout(tmp_path)
    assert "without train: instances_train.json is there" in layout.description
    with pytest.raises(UserError, match=r"no split 'train' \(instances_train\.json is there"):
        layout.split("train")


def test_a_folder_in_a_folder(tmp_path: Path) -> None:
    yolo_set(tmp_path / "unpacked" / "pets")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".DS_Store").touch()
    assert len(read(tmp_path).labels) == 6
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match=r"found: \.DS_Store, __MACOSX/, more/, unpacked/"):
        find_layout(tmp_path)


@pytest.mark.parametrize("name", ["classes.txt", "obj.names"])
def test_yolo_without_data_yaml(tmp_path: Path, name: str) -> None:
    yolo_set(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {}}')
    (tmp_path / name).write_bytes("Käfer\r\nno\r\n".encode("utf-8-sig"))
    train = read(tmp_path)
    assert [category.name for category in train.categories] == ["Käfer", "no"]
    assert (len(train.labels), len(read(tmp_path, "val").labels)) == (6, 4)
    assert list(said(train)) == ["there is no data.yaml: the classes are the lines of a text file"]


def test_cvats_yolo(tmp_path: Path) -> None:
    _pictures(tmp_path / "obj_train_data")
    for stem in ("1", "2"):
        (tmp_path / "obj_train_data" / f"{stem}.txt").write_text("\n".join(BOXES))
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/1.png\ndata/obj_train_data/2.png\n")
    train = read(tmp_path)
    assert len(train.labels) == 4
    assert [count for count, _ in said(train).values()] == [1, 2]


def test_other_yaml_files_beside_are_said(tmp_path: Path) -> None:
    root = yolo_set(tmp_path)
    (root / "old.yaml").write_text((root / "data.yaml").read_text())
    (root / "config.yaml").write_text("train: {lr: 1}\nmodel: {}\n")
    assert find_layout(root).description.endswith("train, val; not read: old.yaml")
    assert find_layout(root / "old.yaml").split("train").annotations.name == "old.yaml"


def test_archives_and_json_files_as_data(tmp_path: Path) -> None:
    for name, way in (
        ("set.zip", "unpack it"),
        ("set.json", "give the folder that it lies in"),
        ("a.csv", "this file"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=way):
            find_layout(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["..\\..\\media\\upload\\4\\2.png", "../../2.png", "/etc/passwd", "..", "/", "a/../../2.png"]
)
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    _file(tmp_path / "set" / "annotations" / "train.json", ["1.png", name])
    _pictures(tmp_path / "set" / "images")
    with pytest.raises(UserError, match="leaves the folder of the images"):
        CocoSplit(find_layout(tmp_path / "set").split("train"))

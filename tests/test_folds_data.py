"""K-fold in the data layer: every image is in one fold, each fold has its share of every class, for every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvision import UserError
from mvision.commands.predict import images_of_split
from mvision.config import DataConfig, MoreDataConfig, parse_config
from mvision.data import CocoSplit, Dataset, find_layout, read_data_sources, read_validation
from mvision.data.formats.folds import draw_folds
from mvision.data.loading.folders import open_folders
from tests.conftest import write_squares
from tests.yolo_files import yolo_set


def sources(root: Path, number: int, of: int, tasks: tuple[str, ...] = ("detection",), seed: int = 0) -> Any:
    lines: list[str] = []
    config = DataConfig(root=str(root), fold=(number, of))
    (source,) = read_data_sources(config, list(tasks), seed, lines.append)
    return source, lines


def counts(split: CocoSplit) -> list[int]:
    return np.bincount(split.labels.labels, minlength=len(split.categories)).tolist()


def test_folds_have_equal_sizes_and_their_share_of_every_class() -> None:
    rng = np.random.default_rng(0)
    objects = (rng.random((53, 4)) < (0.9, 0.4, 0.2, 0.1)) * rng.integers(1, 4, (53, 4))
    objects[40:] = 0  # and pictures without objects
    folds = draw_folds(objects, 5, 0)
    assert sorted(np.bincount(folds).tolist()) == [10, 10, 11, 11, 11]
    empty = np.bincount(folds[objects.sum(axis=1) == 0], minlength=5)
    assert empty.max() - empty.min() <= 2
    for label in range(4):
        inside = np.array([objects[folds == fold, label].sum() for fold in range(5)])
        assert abs(inside - objects[:, label].sum() / 5).max() <= max(2, 0.15 * objects[:, label].sum()), inside
    pictures = np.array([(objects[folds == fold] > 0).sum(axis=0) for fold in range(5)])
    assert (pictures.min(axis=0) > 0).all()  # a plain draw of these leaves folds without the rarest class
    assert (draw_folds(objects, 5, 0) == folds).all()
    assert (draw_folds(objects, 5, 1) != folds).any()


def test_every_image_of_both_splits_is_held_out_once(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "data", images=7)
    held = []
    for number in (1, 2, 3):
        source, lines = sources(root, number, 3)
        train, val = set(source.train.real_files), set(source.val.real_files)
        assert not train & val
        assert len(train | val) == 14
        assert abs(len(val) - 14 / 3) < 1
        assert len({record.id for record in source.val.records}) == len(source.val)  # both files count from 1
        held += source.val.real_files
        assert f"fold {number} of 3: validation on one part of the images of train and val" in lines
    assert len(held) == len(set(held)) == 14


def test_labels_and_annotations_stay_with_their_images(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "data", images=5)
    file = root / "annotations" / "val.json"
    content = json.loads(file.read_text())
    content["categories"] = [
        {"id": 1, "name": "red"},
        {"id": 2, "name": "green"},
    ]  # other ids, another order, a new one
    for entry in content["annotations"]:
        entry["category_id"] = 1 if entry["category_id"] == 5 else 2
    file.write_text(json.dumps(content))
    wanted: dict[str, list[Any]] = {}
    for name in ("train", "val"):
        split = CocoSplit(find_layout(root).split(name), ("masks",))
        for index, record in enumerate(split.records):
            labels = split.labels.picture(split.rows(index))
            names = [split.categories[label].name for label in labels.labels]
            wanted[Path(record.file).name] = [(name, *box) for name, box in zip(names, labels.boxes.tolist())]
    for number in (1, 2):
        source, _ = sources(root, number, 2, ("instance-seg",))
        assert [category.name for category in source.val.categories] == ["blue", "red", "green"]
        for split in (source.train, source.val):
            dataset = Dataset(split, validate=False)
            for index, record in enumerate(split.records):
                image, found = dataset.truth(index)
                assert image.shape == (64, 64, 3)
                names = [found.names[label] for label in found.labels]
                boxes = (found.boxes / 64).tolist()
                assert [(n, *map(pytest.approx, b)) for n, b in zip(names, boxes)] == wanted[Path(record.file).name]
                assert found.masks is not None
        coco = source.val.coco_dict
        assert {entry["image_id"] for entry in coco["annotations"]} <= {entry["id"] for entry in coco["images"]}
        assert len({entry["id"] for entry in coco["annotations"]}) == len(coco["annotations"]) == len(source.val.labels)


def roboflow(root: Path, folder: Path) -> Path:
    """The same pictures in a folder for each split, with the same names in both."""
    for name, place in (("train", "train"), ("val", "valid")):
        (folder / place).mkdir(parents=True)
        content = json.loads((root / "annotations" / f"{name}.json").read_text())
        for entry in content["images"]:
            picture = (root / "images" / entry["file_name"]).read_bytes()
            entry["file_name"] = entry["file_name"].removeprefix(f"{name}_")
            (folder / place / entry["file_name"]).write_bytes(picture)
        (folder / place / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_layouts_with_a_folder_for_each_split(tmp_path: Path) -> None:
    names = roboflow(write_squares(tmp_path / "squares", images=4), tmp_path / "roboflow")
    for data, sizes in ((names, (4, 4)), (yolo_set(tmp_path / "yolo"), (2, 3))):
        seen = []
        for number in (1, 2):
            source, _ = sources(data, number, 2)
            assert sorted((len(source.train), len(source.val))) == list(sizes)
            assert all(counts(source.val))
            seen += source.val.real_files
            for index, record in enumerate(source.val.records):
                assert source.val.real_files[index] == str((source.val.folder / record.file).resolve())
                assert source.val.folder.is_relative_to(data)
        assert len(set(seen)) == sum(sizes)


def test_a_set_with_one_split(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "data", images=6, splits=("train",))
    source, lines = sources(root, 1, 3)
    assert (len(source.train), len(source.val)) == (4, 2)
    assert any(line.endswith("one part of the images of train") for line in lines)
    with pytest.raises(UserError, match="no split 'vall'"):
        read_data_sources(DataConfig(root=str(root), val="vall", fold=(1, 3)), ["detection"], 0, lines.append)


def test_one_picture_in_both_splits_stays_in_one_fold(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "data", images=4)
    file = root / "annotations" / "val.json"
    content = json.loads(file.read_text())
    for entry in content["images"][:2]:
        entry["file_name"] = entry["file_name"].replace("val", "train")
    file.write_text(json.dumps(content))
    for number in (1, 2, 3):
        source, _ = sources(root, number, 3)
        assert not set(source.train.real_files) & set(source.val.real_files)


def test_the_folds_do_not_depend_on_what_is_read(tmp_path: Path) -> None:
    """Weights with masks are evaluated on boxes alone, by another command: no picture of the training comes in."""
    root = write_squares(tmp_path / "data", images=6)
    file = root / "annotations" / "train.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"][::2]:
        entry["segmentation"] = [[1, 2]]  # unusable
    file.write_text(json.dumps(content))
    config = DataConfig(root=str(root), fold=(2, 3))
    source, _ = sources(root, 2, 3, ("instance-seg",), seed=5)
    _, ((_, _, val),) = read_validation(config, None, ["detection"], seed=5)
    assert val.real_files == source.val.real_files
    pictures, _ = images_of_split(open_folders(config, 5)[0], None, ["detection"])
    assert len(list(pictures)) == len(val)
    _, ((_, _, train),) = read_validation(config, "train", ["detection"], seed=5)
    assert len(train) == 6  # a split by its name is the file


def test_every_data_set_of_a_run_is_divided(tmp_path: Path) -> None:
    first, second = (write_squares(tmp_path / name, images=3, seed=seed) for seed, name in enumerate("ab"))
    config = DataConfig(root=str(first), more=[MoreDataConfig(root=str(second))], fold=(1, 3))
    found = read_data_sources(config, ["detection"], 0, lambda _: None)
    assert [(len(source.train), len(source.val)) for source in found] == [(4, 2), (4, 2)]


def test_a_class_that_is_too_rare_is_named(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "data", images=6, splits=("train",))
    file = root / "annotations" / "train.json"
    content = json.loads(file.read_text())
    for number, entry in enumerate(content["annotations"]):
        entry["category_id"] = 5 if number in (0, 1, 4) else 2  # pictures 1 and 3
    file.write_text(json.dumps(content))
    _, lines = sources(root, 1, 3)
    (line,) = (line for line in lines if "some folds do not have" in line)
    assert "1 x class that some folds do not have" in line
    assert "red: 3 objects in 2 of 6 pictures, none in fold " in line


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "data", images=2)
    with pytest.raises(UserError, match=r"train.json: there are 4 pictures, too few for 5 folds; choose fewer"):
        sources(root, 1, 5)
    for fold, message in (([0, 5], "such as"), ([6, 5], "such as"), ([1, 1], "2 to 1000"), ([1, 2, 3], "data.fold")):
        with pytest.raises(UserError, match=message):
            parse_config({"data": {"fold": fold}})
    for key in ("fraction", "val_fraction"):
        with pytest.raises(
            UserError, match=f"^data.fold: folds decide which images are trained on; leave data.{key} out$"
        ):
            parse_config({"data": {"fold": [1, 5], key: 0.5}})

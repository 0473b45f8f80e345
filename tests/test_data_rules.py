"""``mvision data check`` and ``mvision train`` accept and refuse the same data, with the same lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvision.commands.data import check
from mvision.commands.val import validate
from mvision.config import load_config
from mvision.data import read_data_sources, read_validation
from mvision.data.loading.sources import DataSource
from mvision.data.tools import check as checking
from mvision.engine.train import train
from mvision.errors import UserError
from tests.coco_files import CATEGORIES, annotation, coco, write_set
from tests.small_runs import FAST

SQUARE = [[8.0, 8.0, 28.0, 8.0, 28.0, 24.0, 8.0, 24.0]]
POINTS = ["nose", "tail"]


def tree(first: int, count: int = 3, **more: Any) -> dict[str, Any]:
    """Images with two objects each, which have everything that a task can need."""
    categories = [{**category, "keypoints": POINTS} for category in CATEGORIES]
    content = coco([], categories, images=count)
    for number, entry in enumerate(content["images"], start=first):
        entry |= {"id": number, "file_name": f"{number}.png"}
        for place in (0, 1):
            box = [8 + 16 * place, 8, 20, 16]
            full = {"segmentation": SQUARE, "keypoints": [10, 10, 2, 20, 20, 2], **more}
            content["annotations"].append(annotation(number, box, (3, 7)[place], id=2 * number + place, **full))  # type: ignore[arg-type]
    return content


def write(root: Path, change: Callable[[dict[str, dict[str, Any]]], Any] = lambda trees: None) -> Path:
    trees = {"train": tree(1), "val": tree(4)}
    for name, content in trees.items():
        write_set(root, content, name)
    change(trees)
    for name, content in trees.items():
        write_set(root, content, name, pictures=False)
    return root


def start(root: Path, *tasks: str, lines: list[str] | None = None, **options: Any) -> list[DataSource]:
    """What a training does before its first step."""
    overrides = {"data.root": str(root), **{f"data.{key}": value for key, value in options.items()}}
    config = load_config(tasks=list(tasks), overrides=overrides)
    log = ([] if lines is None else lines).append
    return read_data_sources(config.data, list(config.model.heads), 0, log, config.model.heads)


def each(key: str, value: Any, *splits: str) -> Callable[[dict[str, dict[str, Any]]], None]:
    def change(trees: dict[str, dict[str, Any]]) -> None:
        for name in splits or trees:
            for entry in trees[name]["annotations"]:
                entry[key] = value

    return change


def emptied(*splits: str) -> Callable[[dict[str, dict[str, Any]]], None]:
    return lambda trees: [trees[name].update(annotations=[]) for name in splits]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("detection", each("iscrowd", 1), r"train.json: no object .* all 6 are crowd .*-o data.ignore_iscrowd=true"),
        ("detection", each("iscrowd", 1, "val"), r"val.json: no object .* all 6 are crowd regions"),
        ("detection", emptied("train"), r"train.json: .* none of its 3 images has a label"),
        ("detection", each("bbox", [1, 1, 0, 0], "val"), None),  # the boxes are those of the segmentations
        ("instance-seg", each("segmentation", [], "val"), r"val.json: .* none of the 6 objects has a mask"),
        ("semantic-seg", each("segmentation", [[1, 2]]), r"train.json: .* 6 x segmentation that cannot be used"),
        ("keypoints", each("keypoints", [5, 5, 0, 9, 9, 0]), r"train.json: .* 6 x object .* visibility 0"),
        ("keypoints", each("keypoints", None, "val"), r"val.json: .* none of the 6 objects has a labelled keypoint"),
        ("detection", each("keypoints", None), None),
        ("detection", lambda t: t["val"].update(categories=[{"id": 3, "name": "owl"}, {"id": 7, "name": "bat"}]),
         r"val.json: none of its classes \(owl, bat\) is in"),
        ("detection", lambda t: t["train"]["images"][0].update(file_name="../x"), "leaves the folder"),
        ("detection", lambda t: t["val"].update(annotations={}), "no list 'annotations'"),
        *((task, emptied("val"), None) for task in ("detection", "instance-seg", "keypoints", "semantic-seg")),
    ],
)  # fmt: skip
def test_both_decide_alike(
    tmp_path: Path, task: str, change: Callable[[dict[str, dict[str, Any]]], None], message: str | None
) -> None:
    root = write(tmp_path, change)
    report = check(str(root), tasks=[task])
    lines: list[str] = []
    if message is None:
        start(root, task, lines=lines)
        assert report.usable
        assert report.tasks[task] is None
        said = [line.strip() for line in lines if line.strip().startswith("!")]
        assert {line.strip() for line in report.text().splitlines()} >= set(said)
        return
    with pytest.raises(UserError, match=message) as caught:
        start(root, task, lines=lines)
    assert report.refused == str(caught.value)
    assert report.verdict == f"not usable: {caught.value}"


def test_pictures_have_to_be_readable(tmp_path: Path) -> None:
    root = write(tmp_path)
    for number in (4, 5, 6):
        (root / "images" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"val.json: none of its 3 images can be read: .*4.png: not an image") as caught:
        start(root)
    assert check(str(root)).refused == str(caught.value)
    assert check(str(root), ["val"]).refused == str(caught.value)
    assert check(str(root), ["train"]).usable
    write_set(root, tree(6, 1), "unused")  # one picture that can be read
    assert start(root)
    assert check(str(root)).usable


def test_a_missing_split_is_named_with_the_ways_out(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "annotations" / "val.json").rename(root / "annotations" / "other.json")
    write_set(root, tree(4), "third")
    with pytest.raises(
        UserError, match=r"no split 'val' .*train, other, third; .*data.val=NAME.*data.val_fraction=0.2"
    ) as val:
        start(root)
    report = check(str(root))
    assert report.refused == str(val.value)
    assert report.splits["train"].objects == 6  # what is there is reported all the same
    assert check(str(root), assignments=["data.val=other"]).usable
    (root / "annotations" / "train.json").unlink()
    with pytest.raises(UserError, match="no split 'train' to train on: it has other, third; .* -o data.train=other"):
        start(root)
    assert not check(str(root)).usable


@pytest.mark.parametrize("content", ["{", json.dumps({"images": [], "categories": []}), None])
def test_the_test_split_is_reported_and_never_refused(tmp_path: Path, content: str | None) -> None:
    root = write(tmp_path)
    unlabelled = tree(4)
    del unlabelled["annotations"]
    (root / "annotations" / "test.json").write_text(content or json.dumps(unlabelled))
    report = check(str(root))
    assert report.usable
    assert start(root)
    if content is None:
        assert report.splits["test"].images == 3
        assert "file without a list 'annotations'" in report.text()
        assert not check(str(root), ["test"]).usable  # asked for by name, as `mvision val --split test` would be
    else:
        assert "training does not use it" in str(report.splits["test"].error)


def test_classes_are_matched_by_name_and_differences_are_said(tmp_path: Path) -> None:
    def change(trees: dict[str, dict[str, Any]]) -> None:
        trees["val"]["categories"] = [{"id": 7, "name": "cat"}, {"id": 3, "name": "Dog"}]

    (source,) = start(write(tmp_path, change))
    assert [c.name for c in source.val.categories] == ["cat", "dog", "Dog"]
    assert source.val.labels.labels.tolist() == [2, 0] * 3
    assert {problem.kind: problem.examples for problem in source.problems} == {
        "class of val that train does not have: nothing is measured for it": ["'Dog', train has 'dog'"],
        "class of train that val does not have: nothing is measured for it": ["dog"],
    }


def test_objects_of_unknown_classes_alone_are_nothing_to_measure(tmp_path: Path) -> None:
    def change(trees: dict[str, dict[str, Any]]) -> None:
        trees["val"]["categories"].append({"id": 9, "name": "owl"})
        each("category_id", 9, "val")(trees)

    root = write(tmp_path, change)
    with pytest.raises(
        UserError, match="val.json: all of its 6 objects are of classes that .*train.json does not have"
    ):
        start(root)
    assert not check(str(root)).usable


def test_pictures_that_no_file_lists_are_counted(tmp_path: Path) -> None:
    root = write(tmp_path)
    write_set(root, tree(8, 1), "more")  # a split of its own may list the others
    assert not start(root)[0].problems
    (root / "annotations" / "more.json").unlink()
    (root / "images" / ".hidden.png").touch()
    (root / "images" / "notes.txt").touch()
    (problem,) = start(root)[0].problems
    assert problem.kind == "picture that the annotations do not list: not used"
    assert problem.examples == [str(root.resolve() / "images" / "8.png")]
    assert not start(root, fraction=0.5)[0].problems
    assert str(problem) in check(str(root)).text()


def test_dense_pictures_name_the_setting(tmp_path: Path) -> None:
    root, lines = write(tmp_path), list[str]()
    config = load_config(overrides={"data.root": str(root), "model.heads.detection.num_queries": 1})
    read_data_sources(config.data, ["detection"], 0, lines.append, config.model.heads)
    expected = (
        "  ! 3 x image with more objects than the 1 that detection can find: raise them with "
        "-o model.heads.detection.num_queries=2 (1.png: 2; 2.png: 2; 3.png: 2)"
    )
    assert expected in lines
    assert expected in check(str(root), assignments=["model.heads.detection.num_queries=1"]).text().splitlines()
    assert check(str(root), assignments=["model.heads.detection.num_queries=2"]).verdict.startswith("sound")


@pytest.mark.parametrize(
    ("tile", "sides", "remedy"),
    [(None, "0.8 x 0.8", "or data.tile"), (4000, "0.8 x 0.8", "or smaller tiles (data.tile)"), (200, "", "")],
)
def test_objects_smaller_than_a_pixel_of_the_input_are_counted(
    tile: int | None, sides: str, remedy: str, tmp_path: Path
) -> None:
    """Pictures of 1280 x 640 are stretched to 64 x 32: 16 pixels become 0.8; of tiles of 200 pixels, more."""
    for name, first in (("train", 1), ("val", 2)):
        boxes = [[10, 10, 16, 16], [10, 40, 40, 40], [60, 10, 24, 24], [90, 10, 14, 28]]
        content = coco([annotation(first, box) for box in boxes], size=(640, 1280))
        content["annotations"].append(annotation(first, [200, 200, 4, 4], iscrowd=1))
        content["images"][0].update(id=first, file_name=f"{first}.png")
        for number, entry in enumerate(content["annotations"], start=1):
            entry["id"] = number
        write_set(tmp_path, content, name)
    settings = {"data.root": str(tmp_path), "data.tile": tile, "model.image_size": [32, 64]}
    report = checking.check(load_config(overrides=settings), quick=True)
    told = {name: [p for p in split.problems if "than a pixel" in p.kind] for name, split in report.splits.items()}
    assert not told["val"]
    assert len(told["train"]) == (1 if remedy else 0)
    for problem in told["train"]:
        assert "object smaller than a pixel at model.image_size 64x32: not learned unless" in problem.kind
        assert problem.kind.endswith(f"a larger --image-size, {remedy}")
        assert problem.examples == [f"1.png: {sides}", "1.png: 0.7 x 1.4"][: problem.count]


@pytest.mark.parametrize(("kind", "setting"), [("dense", "num_instances"), ("query", "num_queries")])
def test_only_objects_of_classes_with_points_are_too_many_for_poses(kind: str, setting: str, tmp_path: Path) -> None:
    def without_points(trees: dict[str, dict[str, Any]]) -> None:
        for each in trees.values():
            del each["categories"][0]["keypoints"]
            for entry in each["annotations"]:
                if entry["category_id"] == each["categories"][0]["id"]:
                    del entry["keypoints"]

    for root, most in ((write(tmp_path / "a"), 2), (write(tmp_path / "b", without_points), 1)):
        overrides = {"data.root": str(root), "model.heads.keypoints": {"kind": kind, setting: 1}}
        config, lines = load_config(overrides=overrides), list[str]()
        read_data_sources(config.data, ["keypoints"], 0, lines.append, config.model.heads)
        told = [line for line in lines if "more objects than the 1 that keypoints can find" in line]
        assert len(told) == 2 * (most > 1), lines  # of train and val
        assert all(f"-o model.heads.keypoints.{setting}={most} " in line for line in told)


def test_every_place_can_be_listed(tmp_path: Path) -> None:
    def change(trees: dict[str, dict[str, Any]]) -> None:
        for entry in trees["train"]["annotations"]:
            entry |= {"bbox": [1, 1, 0, 0], "segmentation": None, "keypoints": None}
        trees["train"]["annotations"].append(annotation(1, id=99))  # type: ignore[arg-type]

    report = check(str(write(tmp_path, change)))
    lines = [line.strip() for line in report.text(every_place=True).splitlines()]
    assert "! 6 x box without area: annotation skipped" in lines
    assert "3.png, annotation 7: bbox [1, 1, 0, 0]" in lines
    assert "3.png, annotation 7" not in report.text()  # five of them, and "..."


def test_problems_of_other_tasks_are_marked(tmp_path: Path) -> None:
    root = write(tmp_path, lambda trees: trees["train"]["annotations"][0].update(segmentation=[[1, 2]]))
    lines: list[str] = []
    start(root, "detection", lines=lines)
    assert not [line for line in lines if "!" in line]
    (line,) = (line for line in check(str(root)).text().splitlines() if "!" in line)
    assert line.endswith("[instance-seg, semantic-seg]")


def files(source: DataSource) -> tuple[set[str], set[str]]:
    return {record.file for record in source.train.records}, {record.file for record in source.val.records}


def test_a_share_of_the_training_images_is_held_out(tmp_path: Path) -> None:
    root = write_set(tmp_path, tree(1, 10))
    content = json.loads((root / "annotations" / "train.json").read_text())
    content["images"].append(
        {**content["images"][0], "id": 50, "file_name": "./1.png"}
    )  # a picture that is there twice
    content["annotations"].append(annotation(50, [1, 1, 5, 5], 3, id=99))  # type: ignore[arg-type]
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    trained, held_out = files(start(root, val_fraction=0.3)[0])
    assert (len(trained), len(held_out)) == (7, 3)
    assert not trained & held_out
    assert files(start(root, val_fraction=0.3)[0]) == (trained, held_out)
    less, same = files(start(root, val_fraction=0.3, fraction=0.5)[0])
    assert less < trained
    assert same == held_out
    config = load_config(overrides={"data.root": str(root), "data.val_fraction": 0.3}).data
    _, ((_, _, validation),) = read_validation(config, None, ["detection"], seed=0)
    assert {record.file for record in validation.records} == held_out
    others = [read_validation(config, None, ["detection"], seed=seed)[1][0][2].records for seed in range(1, 5)]
    assert any({record.file for record in records} != held_out for records in others)
    report = check(str(root), assignments=["data.val_fraction=0.3"])
    assert (report.usable, report.splits["train"].images, report.splits["val"].images) == (True, 7, 3)
    assert not report.problems


def test_no_share_is_held_out_where_there_is_a_validation_set(tmp_path: Path) -> None:
    lines: list[str] = []
    (source,) = start(write(tmp_path), lines=lines, val_fraction=0.5)
    assert [len(source.train), len(source.val)] == [3, 3]
    assert any("data.val_fraction is not used" in line for line in lines)
    one = write_set(tmp_path / "one", tree(1, 1))
    with pytest.raises(UserError, match="data.val_fraction needs two pictures or more, there are 1"):
        start(one, val_fraction=0.5)


def test_the_share_is_evaluated_by_val_too(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", tree(1, 6))
    options = {**FAST, "train.epochs": 1, "train.seed": 3, "data.root": str(root), "data.val_fraction": 0.34}
    run = train(load_config("tiny", tasks=["detection"], overrides=options), output=tmp_path / "run", device="cpu")
    validate(str(run), output=tmp_path / "val", device="cpu")
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "val")]
    assert figures[0] == figures[1]


def test_several_data_sets_are_checked_as_they_are_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "boxes", lambda trees: [each(key, None)(trees) for key in ("keypoints", "segmentation")])
    write(tmp_path / "poses", each("segmentation", None))
    file = tmp_path / "two.yaml"
    file.write_text(f"data: {{root: {tmp_path / 'boxes'}, more: [{{root: {tmp_path / 'poses'}}}]}}")
    report = check(None, tasks=["detection", "keypoints"], file=file)
    assert report.usable
    assert list(report.splits) == ["boxes/train", "boxes/val", "poses/train", "poses/val"]
    assert [split.with_keypoints for split in report.splits.values()] == [0, 0, 6, 6]
    assert report.tasks["keypoints"] is None
    assert "boxes/annotations/train.json: no object" in (report.tasks["instance-seg"] or "")
    report = check(None, tasks=["instance-seg"], file=file)
    assert (
        report.refused == "data: no data set (boxes, poses) has labels for instance-seg, or is used for it (data.tasks)"
    )


def test_ignore_iscrowd_trains_on_brush_masks(tmp_path: Path) -> None:
    root = write(tmp_path, each("iscrowd", 1))
    (source,) = start(root, "instance-seg", ignore_iscrowd=True)
    assert not source.train.labels.crowd.any()
    assert source.train.available >= {"masks"}
    assert check(str(root), tasks=["instance-seg"], assignments=["data.ignore_iscrowd=true"]).usable

"""COCO files as other tools write them: numbers as text, crowds, entries that are there twice, and nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.formats.numbers import flag, number, numbers, whole_number
from mvision.data.formats.points import match_points
from mvision.data.formats.segmentation import BadSegmentation, parse_segmentation, rasterise
from mvision.data.formats.usable import refusal
from mvision.errors import UserError
from tests.coco_files import PEOPLE, annotation, coco, write_set

HUGE = 10**400
SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
POINT: list[dict[str, Any]] = [{"id": 1, "name": "needle", "keypoints": ["tip"]}]


def read(root: Path, tree: dict[str, Any], split: str = "train", **more: Any) -> CocoSplit:
    write_set(root, tree, split)
    return reread(root, split, **more)


def reread(root: Path, split: str = "train", **more: Any) -> CocoSplit:
    return CocoSplit(replace(find_layout(root).split(split), **more), FIELDS)


def kinds(split: CocoSplit) -> dict[str, int]:
    return {problem.kind.split(":")[0]: problem.count for problem in split.problems}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((value, 3) for value in (3, 3.0, "3", " 3 ", "3.0", "+3", "٣")),
        *((value, None) for value in (True, None, [], {}, 3.5, "3.5", "²", "--3", "", "a", HUGE, 1e300)),
        *((value, None) for value in (float("nan"), float("inf"), "nan", "9" * 5000, str(2**64), [3])),
        ("9007199254740993", 2**53 + 1),
        (-1, -1),
    ],
)
def test_whole_numbers(value: Any, expected: int | None) -> None:
    assert whole_number(value) == expected


def test_numbers_and_flags() -> None:
    assert [number(value) for value in ("1.5", 2, HUGE, "inf", True, None, "x")] == [1.5, 2.0, *[None] * 5]
    assert numbers(["1.00", 2, 3.5, "4"], 4) == numbers("[1, 2, 3.5, 4]", 4) == [1, 2, 3.5, 4]
    assert numbers([1, 2, 3], 4) is numbers([1, 2, 3, HUGE], 4) is numbers({"x": 1}, 4) is None
    assert [flag(value) for value in (1, "1", True, "true")] == [True] * 4
    assert [flag(value) for value in (0, "0", False, None, "", "false", "No", "0.0")] == [False] * 8


def test_numbers_as_text_are_numbers(tmp_path: Path) -> None:
    tree = coco([annotation(bbox=["8.00", "8.00", "20.00", "16.00"], iscrowd="0", area="320")])  # type: ignore[list-item]
    tree["images"][0] |= {"id": "1", "height": "48", "width": "64.0"}
    tree["annotations"][0] |= {"image_id": "1", "category_id": "3"}
    write_set(tmp_path, coco([]))
    write_set(tmp_path, tree, pictures=False)
    split = reread(tmp_path)
    assert not split.problems
    (entry,) = split.coco_dict["annotations"]
    assert (entry["bbox"], entry["area"], entry["iscrowd"], entry["image_id"]) == ([8, 8, 20, 16], 320, 0, 1)


def test_crowds_are_counted_and_can_be_read_as_objects(tmp_path: Path) -> None:
    entries = [annotation(iscrowd=1, segmentation=[SQUARE]), annotation(bbox=[1, 1, 9, 9], segmentation=[SQUARE])]
    split = read(tmp_path, coco(entries))
    (problem,) = split.problems
    assert (problem.count, problem.examples) == (1, ["1.png, annotation 1"])
    assert "-o data.ignore_iscrowd=true" in problem.kind
    assert refusal(split, "instance-seg") is None
    objects = reread(tmp_path, ignore_iscrowd=True)
    assert not objects.problems
    assert objects.labels.crowd.tolist() == [False, False]
    assert [entry["iscrowd"] for entry in objects.coco_dict["annotations"]] == [0, 0]


def test_crowds_alone_teach_nothing(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(iscrowd=1, segmentation=[SQUARE])]))
    for task in ("detection", "instance-seg", "semantic-seg"):
        reason = refusal(split, task)
        assert reason is not None
        assert reason.startswith(f"{tmp_path / 'annotations' / 'train.json'}: no object in it can be used for {task}")
        assert "all 1 are crowd regions (iscrowd 1)" in reason
        assert "-o data.ignore_iscrowd=true" in reason
        assert refusal(reread(tmp_path, ignore_iscrowd=True), task) is None


def test_what_is_missing_for_a_task_is_said(tmp_path: Path) -> None:
    def why(name: str, task: str, *entries: dict[str, Any], **more: Any) -> str | None:
        return refusal(read(tmp_path / name, coco(list(entries), PEOPLE)), task, **more)

    box = annotation(category_id=1)
    assert why("a", "detection", box) is None
    assert "none of the 1 objects has a mask" in (why("b", "semantic-seg", box) or "")
    assert "none of the 1 objects has a labelled keypoint" in (why("c", "keypoints", box) or "")
    assert "none of its 1 images has a label" in (why("d", "detection") or "")
    assert why("e", "detection", empty_is_fine=True) is None
    bad = annotation(category_id=1, bbox=[5, 5, 0, 0])
    reason = why("f", "detection", bad, empty_is_fine=True) or ""
    assert "all of its 1 annotations were left out: 1 x box without area: annotation skipped (1.png" in reason
    unseen = annotation(category_id=1, keypoints=[10, 10, 0, 20, 10, 0, 15, 15, 0])
    assert "visibility 0" in (why("g", "keypoints", unseen) or "")


def test_a_picture_listed_twice_is_one_picture(tmp_path: Path) -> None:
    tree = coco([annotation(1), annotation(101, [30, 10, 9, 9]), annotation(101)], images=1)
    tree["images"] += [{**tree["images"][0], "id": 101}, {**tree["images"][0], "id": 102, "file_name": "./1.png"}]
    split = read(tmp_path, tree)
    assert [record.file for record in split.records] == ["1.png"]
    assert split.start.tolist() == [0, 2]
    assert {entry["image_id"] for entry in split.coco_dict["annotations"]} == {1}
    assert kinds(split) == {"picture in several image entries": 2, "object that is there twice, alike in everything": 1}
    assert "1.png, ids 1 and 101" in str(split.problems)


def test_one_picture_with_two_sizes_stays_two(tmp_path: Path) -> None:
    tree = coco([annotation(1), annotation(2)], images=1)
    tree["images"].append({"id": 2, "file_name": "1.png", "height": 24, "width": 32})
    write_set(tmp_path, coco([]))
    write_set(tmp_path, tree, pictures=False)
    split = reread(tmp_path)
    assert len(split) == 2
    assert kinds(split) == {"picture in several image entries that differ in height and width": 1}


def test_objects_are_twins_only_if_they_agree_in_everything(tmp_path: Path) -> None:
    other = [[8.0, 8.0, 28.0, 8.0, 8.0, 24.0]]
    entries = [annotation(), annotation(), annotation(category_id=7), annotation(segmentation=other)]
    entries += [annotation(segmentation=other), annotation(iscrowd=1)]
    split = read(tmp_path, coco(entries))
    assert len(split.labels) == 4
    assert kinds(split)["object that is there twice, alike in everything"] == 2


def test_annotations_without_picture_are_left_out_and_named(tmp_path: Path) -> None:
    split = read(tmp_path, coco([annotation(), annotation(5), annotation(None), annotation("x")]))  # type: ignore[arg-type]
    (problem,) = split.problems
    assert problem.kind == "annotation of an image that 'images' does not list: left out"
    assert problem.examples == ["annotation 2: image_id 5", "annotation 3: image_id None", "annotation 4: image_id 'x'"]


def test_unknown_categories_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"annotation 1 has category_id 8 \(and 2 other annotations\); the .* are 3, 7"):
        read(tmp_path, coco([annotation(category_id=8), annotation(category_id=9), annotation(category_id=10)]))


def test_points_make_a_box_where_there_is_none(tmp_path: Path) -> None:
    entry = {"image_id": 1, "category_id": 1, "keypoints": [30, 20, 2], "iscrowd": 0}
    entries = [{**entry, "bbox": [30.0, 20.0, 0.0, 0.0], "area": 0.0}, {**entry, "keypoints": [40, 20, 1]}]
    entries.append({**entry, "bbox": [30, 20, 0, 0], "keypoints": [30, 20, 0]})
    write_set(tmp_path, coco(entries, POINT))
    for fields in (("boxes",), ("boxes", "keypoints")):
        split = CocoSplit(find_layout(tmp_path).split("train"), fields)
        boxes = [entry["bbox"] for entry in split.coco_dict["annotations"]]
        margin = 0.02 * 64  # of the longer side
        np.testing.assert_allclose(boxes, [[x - margin, 20 - margin, 2 * margin, 2 * margin] for x in (30, 40)])
        assert kinds(split)["box without area"] == kinds(split)["object without bbox"] == 1
    assert split.labels.keypoints is not None
    np.testing.assert_allclose(split.labels.keypoints[:, 0], [[30 / 64, 20 / 48, 2], [40 / 64, 20 / 48, 1]])


def test_points_with_an_extent_make_a_wider_box(tmp_path: Path) -> None:
    points = [10, 10, 2, 50, 30, 2, 20, 46, 1]
    split = read(tmp_path, coco([annotation(category_id=1, bbox=[10, 10, 0, 9], keypoints=points)], PEOPLE))
    np.testing.assert_allclose(split.coco_dict["annotations"][0]["bbox"], [6, 6, 48, 42])  # a tenth of 40; the border


def test_a_box_without_size_is_that_of_the_segmentation(tmp_path: Path) -> None:
    write_set(tmp_path, coco([annotation(bbox=[5, 5, 0, 0], segmentation=[SQUARE])]))
    for fields in (("boxes",), ("boxes", "masks")):
        split = CocoSplit(find_layout(tmp_path).split("train"), fields)
        assert split.coco_dict["annotations"][0]["bbox"] == [10, 10, 20, 20]
        assert kinds(split) == {"box without area": 1}


def test_places_with_visibility_0_are_no_labels(tmp_path: Path) -> None:
    unseen, none = [10, 10, 0, 20, 10, 0, 15, 15, 0], [0] * 9
    entries = [annotation(category_id=1, keypoints=points) for points in (unseen, none, [1, 1, 0.4, *none[3:]])]
    split = read(tmp_path, coco([{**e, "bbox": [1, 1, 9, 9 + n]} for n, e in enumerate(entries)], PEOPLE))
    found = {problem.kind: problem for problem in split.problems}
    (kind,) = (kind for kind in found if "visibility 0" in kind)
    assert (found[kind].count, found[kind].field) == (1, "keypoints")
    assert split.labels.keypoints is not None
    assert split.labels.keypoints[:, 0, 2].tolist() == [0, 0, 1]  # a confidence of 0.4 is a labelled point
    never = found["keypoint that no object has labelled: nothing is learned about it"]
    assert never.examples == ["person: left_eye", "person: right_eye"]


@pytest.mark.parametrize(
    ("own", "given", "order", "said"),
    [
        ("abc", "abc", [0, 1, 2], ""),
        ("cab", "abc", [1, 2, 0], ""),
        ("aBc", "abc", [0, 1, 2], "'B' is taken for 'b'"),
        ("ab", "abc", [0, 1, -1], "'c' is missing"),
        ("abcd", "ca", [2, 0], "'b' is left out, 'd' is left out"),
        ("", "ab", [-1, -1], ""),
        ("aa", "ab", [0, 1], ""),  # names that say nothing
    ],
)
def test_points_are_matched_by_name(own: str, given: str, order: list[int], said: str) -> None:
    found, text = match_points(list(own), list(given))
    assert (found.tolist(), text) == (order, said)
    assert match_points(["point_0", "point_1"], ["nose", "tail"])[1] == ""


def test_validation_takes_classes_and_points_of_the_training_set(tmp_path: Path) -> None:
    names = ["nose", "tail", "ear"]
    first = [{"id": 1, "name": "cat", "keypoints": names}, {"id": 2, "name": "dog", "keypoints": names}]
    second = [{"id": 7, "name": "dog", "keypoints": ["ear", "nose", "tail"]}, {"id": 1, "name": "owl"}]
    train = read(tmp_path, coco([annotation(category_id=1, keypoints=[1, 1, 2, 2, 2, 2, 3, 3, 2])], first))
    points = [3, 3, 2, 1, 1, 2, 2, 2, 1]
    write_set(tmp_path, coco([annotation(category_id=7, keypoints=points), annotation(category_id=1)], second), "val")
    val = CocoSplit(find_layout(tmp_path).split("val"), FIELDS, train.categories)
    assert [(c.id, c.name) for c in val.categories] == [(1, "cat"), (2, "dog"), (3, "owl")]
    assert val.labels.labels.tolist() == [1, 2]
    assert val.labels.keypoints is not None
    np.testing.assert_allclose(val.labels.keypoints[0] * (64, 48, 1), [[1, 1, 2], [2, 2, 1], [3, 3, 2]], atol=1e-5)
    tree = val.coco_dict
    assert [(c["id"], c["name"]) for c in tree["categories"]] == [(2, "dog"), (3, "owl")]
    assert tree["categories"][0]["keypoints"] == names
    assert [a["category_id"] for a in tree["annotations"]] == [2, 3]
    assert tree["annotations"][0]["keypoints"] == [1, 1, 2, 2, 2, 1, 3, 3, 2]


def roboflow(*categories: tuple[int, str, str]) -> list[dict[str, Any]]:
    return [{"id": identity, "name": name, "supercategory": parent} for identity, name, parent in categories]


def test_roboflows_parent_is_dropped_before_names_are_compared(tmp_path: Path) -> None:
    same = roboflow((0, "drone", "none"), (1, "drone", "drone"))
    split = read(tmp_path, coco([annotation(category_id=1)], same))
    assert [(c.id, c.name) for c in split.categories] == [(1, "drone")]
    with pytest.raises(UserError, match="categories 0 and 1 are both named 'drone'"):
        read(tmp_path, coco([annotation(category_id=0)], same))  # it is used: a class
    used = roboflow((0, "animal", "none"), (1, "cat", "animal"))
    assert len(read(tmp_path, coco([annotation(category_id=0)], used)).categories) == 2
    every = roboflow((0, "cat", "none"), (1, "dog", "none"))
    assert len(read(tmp_path, coco([annotation(category_id=1)], every)).categories) == 2


def test_a_category_listed_twice_is_one(tmp_path: Path) -> None:
    twice = [{"id": 3, "name": "cat"}, {"id": "3", "name": "cat", "supercategory": "x"}]
    assert len(read(tmp_path, coco([annotation()], twice)).categories) == 1


def test_a_file_without_a_list_of_annotations_is_not_labelled(tmp_path: Path) -> None:
    tree = coco([])
    del tree["annotations"]
    split = read(tmp_path, tree)
    assert (len(split), split.annotated, len(split.labels)) == (1, 0, 0)
    assert kinds(split) == {"file without a list 'annotations'": 1}


def test_impossible_sizes_are_taken_from_the_file(tmp_path: Path) -> None:
    tree = coco([annotation()], images=5)
    write_set(tmp_path, tree)
    sizes: list[Any] = [(128_000, 96_000), (-1, -1), (HUGE, 3), (float("nan"), 64), (None, [5])]
    for entry, (height, width) in zip(tree["images"], sizes):
        entry |= {"height": height, "width": width}
    write_set(tmp_path, tree, pictures=False)
    split = reread(tmp_path)
    assert {(record.height, record.width) for record in split.records} == {(48, 64)}
    assert kinds(split) == {
        "image with an impossible height and width": 1,
        "image without height and width in the annotations": 4,
    }


@pytest.mark.parametrize(
    ("name", "size", "segmentation"),
    [
        ("far away", (48, 64), [[0, 0, 2e9, 0, 2e9, 2e9]]),
        ("all of it far away", (48, 64), [[2e9, 2e9, 2e9 + 5, 2e9, 2e9, 2e9 + 5]]),
        ("to and fro", (4000, 4000), [[0, 0, 4000, 4000] * 2000]),
        ("digits", (48, 64), [[HUGE, 0, 5, 5, 9, 9]]),
        ("deep", (48, 64), [[[1, 2], 0, 5, 5, 9, 9]]),
        ("runs of 300 digits", (48, 64), {"size": [48, 64], "counts": [HUGE, 1]}),
        ("runs that wrap", (48, 64), {"size": [48, 64], "counts": [2**62, 2**62, 2**62, 2**62, 3072]}),
        ("runs below 0", (48, 64), {"size": [48, 64], "counts": [3073, -1]}),
        ("half runs", (48, 64), {"size": [48, 64], "counts": [0.5, 3071.5]}),
        ("one number of a megabyte", (48, 64), {"size": [48, 64], "counts": "o" * 1_000_000 + "0"}),
        ("a megabyte of runs", (48, 64), {"size": [48, 64], "counts": "1" * 1_000_000}),
        ("lists as runs", (48, 64), {"size": [48, 64], "counts": [[1], [2]]}),
        ("size as a list of lists", (48, 64), {"size": [[48], [64]], "counts": [3072]}),
        ("a number", (48, 64), 7),
    ],
)
def test_hostile_outlines_are_refused_at_once(name: str, size: tuple[int, int], segmentation: Any) -> None:
    with pytest.raises(BadSegmentation):
        parse_segmentation(segmentation, *size)


def test_run_lengths_of_a_large_image_are_drawn_without_decoding_it() -> None:
    height, width = 30_000, 40_000  # decoded, 1.2 GB
    runs = [height * 10_000, height * 20_000, height * 10_000]  # the columns in the middle
    outline, _ = parse_segmentation({"size": [height, width], "counts": runs}, height, width)
    assert outline is not None
    drawn = rasterise(outline, np.ones(2), np.zeros(2), (0, 0, 8, 6), (6, 8))
    assert drawn.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 6
    flipped = rasterise(outline, np.array((-2.0, 1.0)), np.array((1.5, 0.0)), (0, 0, 8, 6), (6, 8))
    assert flipped.tolist() == [[1] * 8] * 6


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(100_000), "more than a thousand deep"),
        (f'{{"images": {"9" * 5000}}}', "thousands of digits"),
        ('{"images": {}, "categories": []}', "no list 'images' in it"),
        ('{"images": [], "categories": "x"}', "no list 'categories' in it"),
        ("\0\1\2", "not text"),
    ],
)
def test_files_that_are_no_coco(tmp_path: Path, text: str, message: str) -> None:
    write_set(tmp_path, coco([annotation()]))
    (tmp_path / "annotations" / "train.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        reread(tmp_path)
    assert "\n" not in str(caught.value)


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    HUGE,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    [],
    [1],
    [[]],
    {},
    {"id": 1},
]
PLACES: list[Callable[[dict[str, Any], Any], Any]] = [
    *(
        lambda t, v, key=key: t["annotations"][0].update({key: v})
        for key in ("id", "image_id", "category_id", "bbox", "iscrowd", "area", "segmentation", "keypoints")
    ),
    *(lambda t, v, key=key: t["images"][0].update({key: v}) for key in ("id", "file_name", "height", "width")),
    *(
        lambda t, v, key=key: t["categories"][0].update({key: v})
        for key in ("id", "name", "supercategory", "keypoints", "skeleton", "sigmas", "flip_pairs")
    ),
    *(lambda t, v, key=key: t[key].insert(0, v) for key in ("images", "annotations", "categories")),
    *(lambda t, v, key=key: t.update({key: v}) for key in ("info", "images", "annotations", "categories")),
    lambda t, v: t.update(info={"keypoint_sigmas": v, "flip_pairs": v}),
    lambda t, v: t["annotations"][0].update(bbox=[1, 1, v, 5]),
    lambda t, v: t["annotations"][0].update(keypoints=[5, 5, 2, v, 5, v, 6, 6, 1]),
    lambda t, v: t["annotations"][0].update(segmentation={"size": v, "counts": v}),
]  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_odd_values_are_problems_or_one_line(tmp_path: Path) -> None:
    write_set(tmp_path, coco([annotation()]))
    file = tmp_path / "annotations" / "train.json"
    layout = find_layout(tmp_path)
    lines = []
    for change in PLACES:
        for value in ODD:
            entry = annotation(category_id=1, segmentation=[SQUARE], keypoints=[5, 5, 2] * 3)
            tree = coco([entry], json.loads(json.dumps(PEOPLE)))
            change(tree, value)
            file.write_text(json.dumps(tree))
            try:
                split = CocoSplit(layout.split("train"), FIELDS)
            except UserError as error:
                lines.append(str(error))
            else:
                assert np.isfinite(split.labels.boxes).all()
                json.dumps(split.coco_dict, allow_nan=False)
    assert len(lines) > 100
    assert not [line for line in lines if "\n" in line or len(line) > 1000]

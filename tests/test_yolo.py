"""What YOLO's ``data.yaml`` and label files say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mvision.data.augment.geometry import mirror_keypoints
from mvision.data.formats.layouts import find_layout
from mvision.errors import UserError
from tests.yolo_files import read, said, yolo_set

POSE = "{label} {cx} {cy} {w} {h} {x0} {y0}{v} {x1} {y1}{v} {cx} {cy}{v}"


def _poses(third: str = "") -> Callable[[str], list[str]]:
    """Label files with two objects of three points; where they lie depends on the picture's name."""

    def lines(name: str) -> list[str]:
        rng = np.random.default_rng(ord(name))
        found = []
        for label in (0, 1):
            w, h = rng.uniform(0.05, 0.2, 2).round(4)
            cx, cy = rng.uniform(0.2, 0.8, 2).round(4)
            corners = {"x0": cx - w / 2, "y0": cy - h / 2, "x1": cx + w / 2, "y1": cy + h / 2}
            found.append(POSE.format(label=label, cx=cx, cy=cy, w=w, h=h, v=third, **corners))
        return found

    return lines


def _polygons(points: int) -> Callable[[str], list[str]]:
    def lines(name: str) -> list[str]:
        rng = np.random.default_rng(ord(name))
        found = []
        for label in (0, 1):
            centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.03, 0.15)
            angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
            corners = centre + radius * np.stack((np.cos(angles), np.sin(angles)), 1)
            found.append(f"{label} {' '.join(f'{value:.4f}' for value in corners.reshape(-1))}")
        return found

    return lines


def test_boxes(tmp_path: Path) -> None:
    layout = find_layout(yolo_set(tmp_path, ["1 0.5 0.5 0.2 0.4", "0 0.1 0.2 0.1 0.2"]))
    assert "YOLO" in layout.description
    assert find_layout(tmp_path / "data.yaml").splits == layout.splits
    split = read(tmp_path, "val")
    assert [(record.file, record.width, record.height) for record in split.records] == [
        ("d.png", 200, 100),
        ("e.png", 200, 100),
    ]
    np.testing.assert_allclose(split.labels.boxes[0], (0.4, 0.3, 0.6, 0.7), atol=1e-6)
    assert split.labels.labels.tolist() == [1, 0, 1, 0]
    assert split.start.tolist() == [0, 2, 4]
    assert split.coco_dict["annotations"][0]["bbox"] == pytest.approx([80, 30, 40, 40])


def test_polygons(tmp_path: Path) -> None:
    split = read(yolo_set(tmp_path, ["0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5"]), fields=("boxes", "masks"))
    assert split.available == {"boxes", "masks"}
    np.testing.assert_allclose(split.labels.boxes[0], (0.1, 0.1, 0.5, 0.5), atol=1e-6)
    assert split.labels.areas[0] == pytest.approx(0.16, rel=0.02)


@pytest.mark.parametrize("dims", [2, 3])
def test_poses(tmp_path: Path, dims: int) -> None:
    third = {2: ["", "", ""], 3: [" 2", " 1", " 0"]}[dims]
    points = f"0.5 0.5{third[0]} 0.4 0.6{third[1]} 0 0{third[2]}"
    root = yolo_set(tmp_path, [f"0 0.5 0.5 0.2 0.4 {points}"], kpt_shape=[3, dims], flip_idx=[0, 2, 1])
    split = read(root, fields=("boxes", "keypoints"))
    assert split.categories[0].keypoints == ["point_0", "left_point_1", "right_point_1"]
    assert split.labels.keypoints is not None
    expected = [[0.5, 0.5, 2], [0.4, 0.6, 2 if dims == 2 else 1], [0, 0, 0]]
    np.testing.assert_allclose(split.labels.keypoints[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("flip", "pairs", "swap"),
    [([2, 1, 0], [(0, 2)], [2, 1, 0]), ([0, 1, 2], [], [0, 1, 2]), (None, None, [1, 0, 2])],
)
def test_flip_idx_decides_also_where_the_points_have_names(
    tmp_path: Path, flip: list[int] | None, pairs: list[tuple[int, int]] | None, swap: list[int]
) -> None:
    line = "0 0.5 0.5 0.2 0.4 0.5 0.5 0.4 0.6 0.3 0.3"
    extra = {} if flip is None else {"flip_idx": flip}
    root = yolo_set(tmp_path, [line], kpt_shape=[3, 2], kpt_names=["left_ear", "right_ear", "tip"], **extra)
    split = read(root, fields=("boxes", "keypoints"))
    assert split.categories[0].flip_pairs == pairs
    assert mirror_keypoints(split.categories).tolist() == [swap] * len(split.categories)


@pytest.mark.parametrize(("third", "dims"), [("", 2), (" 2", 3), (" 1.0", 3)])
def test_poses_without_kpt_shape_are_recognised(tmp_path: Path, third: str, dims: int) -> None:
    root = yolo_set(tmp_path, _poses(third), flip_idx=[1, 0, 2])
    for name in ("train", "val"):
        split = read(root, name, ("boxes", "masks", "keypoints"))
        assert split.available == {"boxes", "keypoints"}
        assert split.categories[0].keypoints == ["left_point_0", "right_point_0", "point_2"]
        assert split.labels.keypoints is not None
        assert (split.labels.keypoints[..., 2] > 0).all()
        assert f"kpt_shape is missing in data.yaml: taken as [3, {dims}] from the label files" in said(split)


def test_a_split_with_few_poses_follows_train(tmp_path: Path) -> None:
    poses = _poses()
    root = yolo_set(tmp_path, lambda name: [] if name == "d" else poses(name)[:1])
    assert len(read(root, "val", ("keypoints",)).categories[0].keypoints) == 3
    root = yolo_set(tmp_path, lambda name: [] if name in "de" else poses(name))
    assert len(read(root, "val", ("keypoints",)).categories[0].keypoints) == 3


@pytest.mark.parametrize("points", [3, 4, 5, 7, 8])
def test_polygons_with_equally_many_points_are_no_poses(tmp_path: Path, points: int) -> None:
    split = read(yolo_set(tmp_path, _polygons(points)), fields=("boxes", "masks", "keypoints"))
    assert split.available == {"boxes", "masks"}
    assert said(split) == {}


def test_what_may_be_poses_or_polygons_asks_for_kpt_shape(tmp_path: Path) -> None:
    line = "0 0.4 0.4 0.5 0.45 0.55 0.5 0.5 0.55"
    message = r"data\.yaml: the 8 numbers after the class .*add kpt_shape: \[2, 2\] for poses, or kpt_shape: null"
    with pytest.raises(UserError, match=message):
        read(yolo_set(tmp_path, [line]))
    assert read(yolo_set(tmp_path, [line], kpt_shape=None), fields=("masks",)).available == {"boxes", "masks"}
    poses = read(yolo_set(tmp_path, [line], kpt_shape=[2, 2]), fields=("keypoints",))
    assert poses.available == {"boxes", "keypoints"}


def test_a_kpt_shape_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    message = r"none of the 6 lines .*a\.txt, line 1: 10 numbers after .*a pose of 13 .*fit kpt_shape: \[3, 2\]"
    with pytest.raises(UserError, match=message):
        read(yolo_set(tmp_path, _poses(), kpt_shape=[3, 3]))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("1 0.5 0.5", "neither a box of 4 numbers nor a polygon of six or more"),
        ("0 0.5 x 0.2 0.4", "numbers expected"),
        ("cat 0.5 0.5 0.2 0.4", "numbers expected"),
        ("1_0 0.5 0.5 0.2 0.4", "numbers expected"),
        ("0.6 0.5 0.5 0.2 0.2", "the class is no whole number"),
        ("-1 0.5 0.5 0.2 0.2", "class without a name"),
        ("7 0.5 0.5 0.2 0.2", "class without a name"),
        ("1e300 0.5 0.5 0.2 0.2", "class without a name"),
        ("0 nan 0.5 0.2 0.2", "a number that is not finite"),
        ("inf 0.5 0.5 0.2 0.2", "a number that is not finite"),
        ("1 0.5 0.5 -0.2 0.2", "width or height is not above 0"),
        ("1 0.5 0.5 0.2 0", "width or height is not above 0"),
        ("0 94 45 20 24", "numbers above 1: pixels? Fractions of the picture's width and height are expected"),
        ("0 9 4 20 24 20 30", "numbers above 1: pixels? Fractions of the picture's width and height are expected"),
        ("0 0.5 0.5 0.2 0.2 17", "neither a box of 4 numbers nor a polygon of six or more"),
    ],
)
def test_lines_that_cannot_be_used_are_left_out_one_by_one(tmp_path: Path, line: str, kind: str) -> None:
    good = "0 0.5 0.5 0.2 0.4"
    train = read(yolo_set(tmp_path, lambda name: [good, line] if name in "ab" else [good]))
    assert len(train.labels) == 3
    ((found, (count, places)),) = said(train).items()
    assert (found, count) == (f"label line left out: {kind}", 2)
    assert all(place.startswith(f"labels/train/{name}.txt, line 2: ") for place, name in zip(places, "ab", strict=True))
    assert line in places[0]
    with pytest.raises(UserError, match=r"data\.yaml: none of the 3 lines .*'train'.*; the first: .*a\.txt, line 1: "):
        read(yolo_set(tmp_path, [line]))


def test_label_files_may_all_be_empty(tmp_path: Path) -> None:
    train = read(yolo_set(tmp_path, ["", "  "]))
    assert (len(train), len(train.labels), said(train)) == (3, 0, {})


@pytest.mark.parametrize(
    ("text", "encoding", "kinds"),
    [
        ("0 0.5 0.5 0.2 0.4\n1 0.2 0.2 0.1 0.2\n", "utf-8-sig", set()),
        ("  0.0\t0.5 \t+0.5 2e-1 .4 \r\n\r\n1\u00a00.2\u00a00.2 0.1 0.2", "utf-8", set()),
        ("0 0.5 0.5 0.2 0.4\r\n1 0.2 0.2 0.1 0.2\r\n", "utf-16", {"label file in UTF-16: read"}),
        ("0 0.5 0.5 0.2 0.4\r\n1 0.2 0.2 0.1 0.2\r\n", "utf-16-le", {"label file in UTF-16: read"}),
        ("0,0.5,0.5,0.2,0.4\n1,0.2,0.2,0.1,0.2", "utf-8", {"commas"}),
        ("0, 0.5, 0.5, 0.2, 0.4\n1; 0.2; 0.2; 0.1; 0.2", "utf-8", {"commas"}),
        ("0 0,5 0,5 0,2 0,4\n1 0,2 0,2 0,1 0,2", "utf-8", {"commas"}),
        ("0 0.5 0.5 0.2 0.4 0.9\n1 0.2 0.2 0.1 0.2 0.31\n", "utf-8", {"confidence"}),
        ("0 0.5 0.5 0.2 0.4\n" * 2 + "1 0.2 0.2 0.1 0.2\n" * 2, "utf-8", {"repeats"}),
    ],
)
def test_texts(tmp_path: Path, text: str, encoding: str, kinds: set[str]) -> None:
    root = yolo_set(tmp_path)
    for name in "abc":
        (root / "labels" / "train" / f"{name}.txt").write_bytes(text.encode(encoding))
    train = read(root)
    np.testing.assert_allclose(train.labels.boxes[:2], [(0.4, 0.3, 0.6, 0.7), (0.15, 0.1, 0.25, 0.3)], atol=1e-6)
    assert train.labels.labels.tolist() == [0, 1] * 3
    found = said(train)
    assert len(found) == len(kinds)
    assert all(any(word in kind for kind in found) for word in kinds)
    if kinds == {"repeats"}:
        assert found["label line that repeats another one of its file: merged"][1][:2] == [
            "labels/train/a.txt, line 2",
            "labels/train/a.txt, line 4",
        ]


def test_corners_instead_of_centres_are_said(tmp_path: Path) -> None:
    train = read(yolo_set(tmp_path, ["0 0.7 0.4 0.9 0.7", "1 0.1 0.1 0.3 0.9"]))
    assert any("look like corners" in kind for kind in said(train))
    assert not any("corners" in kind for kind in said(read(yolo_set(tmp_path))))


def test_classes_counted_from_one_are_refused(tmp_path: Path) -> None:
    message = r"'train' have classes from 1 to 2 .*a\.txt, line 2\), names counts from 0 to 1: write names as a mapping"
    with pytest.raises(UserError, match=message):
        read(yolo_set(tmp_path, ["1 0.5 0.5 0.2 0.4", "2 0.5 0.5 0.2 0.4"]))
    root = yolo_set(tmp_path, ["1 0.5 0.5 0.2 0.4", "2 0.2 0.5 0.2 0.4"], names={1: "cat", 2: "dog"})
    assert [(category.id, category.name) for category in read(root).categories] == [(1, "cat"), (2, "dog")]
    assert read(root).labels.labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("[no, yes]", ["no", "yes"]),
        ("[010, 1_0, 1.50]", ["010", "1_0", "1.50"]),
        ("[2024-01-01, null, 0x1F, ~]", ["2024-01-01", "null", "0x1F", "~"]),
        ("{0: no, 1: 1e3, 02: on}", ["no", "1e3", "on"]),
        ("\n  - Käfer\n  - 12:30", ["Käfer", "12:30"]),
    ],
)
def test_names_stay_text(tmp_path: Path, written: str, names: Sequence[str]) -> None:
    root = yolo_set(tmp_path)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        text = f"train: images/train\nval: images/val\nnames: {written}\n"
        (root / "data.yaml").write_bytes(text.encode(encoding))
        assert [category.name for category in read(root).categories] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a\n", r"not valid YAML: line 2, column 1"),
        ("names: [cat]\ntrain: nowhere\n", r"train: nowhere is not there"),
        ("names: [cat]\ntrain: {a: b}\n", r"train has to be a folder, a list file"),
        ("names: [cat]\n", r"names no train, val or test images"),
        ("names: {cat: 0}\ntrain: images/train\n", r"names has to be a list, or numbers with names"),
        ("names: {0: cat, 00: dog}\ntrain: images/train\n", r"names has two names for one number"),
        ("names: cat\ntrain: images/train\n", r"names has to be a list of class names, not 'cat'"),
        ("names: [cat, [a]]\ntrain: images/train\n", r"class 1 under names has no name"),
        ("names: [cat, '']\ntrain: images/train\n", r"class 1 under names has no name"),
        ("train: images/train\n", r"it has no 'names'"),
        ("names: [cat]\ntrain: images/train\nkpt_shape: [x, 3]\n", r"kpt_shape has to be"),
        ("names: [cat]\ntrain: images/train\nkpt_shape: [1000000000, 3]\n", r"kpt_shape has to be"),
        ("names: [cat]\ntrain: images/train\nkpt_shape: [2, 3]\nflip_idx: [a, 0]\n", r"flip_idx has to list"),
        (
            "names: [cat]\ntrain: images/train\nkpt_shape: [2, 3]\nkpt_names: [a, b]\nflip_idx: [1, 1]\n",
            r"flip_idx has to list",
        ),
        ("names: [cat]\ntrain: images/train\nkpt_shape: [2, 3]\nkpt_names: [a]\n", r"kpt_names has to be a list of 2"),
        ("names: [cat]\ntrain: data.yaml\n", r"data.yaml is neither a folder nor a list"),
    ],
)
def test_mistakes_in_data_yaml_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    root = yolo_set(tmp_path)
    (root / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        find_layout(root / "data.yaml")
    assert str(root / "data.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_data_yaml_lacks_or_contradicts_is_said(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, nc=3)
    assert said(read(root)) == {"nc contradicts names: the names count": (1, ["nc: 3, 2 names"])}
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 2\n")
    train = read(root)
    assert [category.name for category in train.categories] == ["class_0", "class_1"]
    assert [count for count, _ in said(train).values()] == [1]
    gaps = read(yolo_set(tmp_path, names={0: "cat", 5: "dog"}))
    assert len(gaps.labels) == 3
    assert said(gaps)["label line left out: class without a name"][0] == 3


def test_paths_of_roboflow(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, images="{split}/images", labels="{split}/labels", train="../train/images")
    assert len(read(root).labels) == 6

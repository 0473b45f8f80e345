"""What ``mvision data check``, ``show`` and ``convert`` do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mvision.config import AugmentConfig, load_config
from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.tools import check as checking
from mvision.data.tools.convert import convert
from mvision.data.tools.show import contact_sheet, write_image
from mvision.errors import UserError
from tests.coco_files import CATEGORIES, annotation, coco, picture, write_picture, write_set

SQUARE = [[8.0, 8.0, 28.0, 8.0, 28.0, 24.0, 8.0, 24.0]]


def check(root: Path, splits: tuple[str, ...] = (), *, tasks: list[str] | None = None, **more: Any) -> checking.Report:
    return checking.check(load_config(tasks=tasks, overrides={"data.root": str(root)}), splits, **more)


def two_splits(root: Path, train: list[dict[str, Any]], val: list[dict[str, Any]] | None = None) -> Path:
    """Three training images 1-3.png and one of validation, 9.png."""
    write_set(root, coco(train, images=3))
    tree = coco(val if val is not None else [annotation(9)])
    tree["images"][0].update(id=9, file_name="9.png")
    return write_set(root, tree, "val")


def test_a_sound_set(tmp_path: Path) -> None:
    entries = [annotation(1, segmentation=SQUARE), annotation(1, category_id=7, segmentation=SQUARE)]
    entries.append(annotation(2, iscrowd=1))
    report = check(two_splits(tmp_path, entries))
    train = report.splits["train"]
    assert (train.images, train.empty_images, train.objects, train.crowds) == (3, 2, 2, 1)
    assert (train.with_masks, train.with_keypoints, train.most_objects) == (2, 0, 2)
    assert train.classes == {"cat": 1, "dog": 1}
    assert train.image_sizes == {"64 x 48": 3}
    assert train.object_sizes == {"small": 2, "medium": 0, "large": 0}
    assert train.decoded
    assert report.usable
    assert report.verdict == "usable with 1 problem of 1 kind: every split can serve detection"
    assert not report.splits["val"].problems
    assert "64 x 48 (3)" in report.text()
    assert [task for task, reason in report.tasks.items() if reason is None] == ["detection"]
    reason = report.tasks["instance-seg"]
    assert reason is not None
    assert "val.json: no object in it can be used for instance-seg: none of the 1 objects has a mask" in reason


def test_objects_without_segmentation_are_named_where_others_have_one(tmp_path: Path) -> None:
    entries = [
        annotation(1, segmentation=SQUARE),
        annotation(2),
        annotation(2, [1, 2, 9, 9], segmentation=[]),
        annotation(3, iscrowd=1),
    ]
    report = check(two_splits(tmp_path, entries))
    crowd, problem = report.splits["train"].problems[::-1]
    assert crowd.kind.startswith("crowd region (iscrowd 1)")
    assert problem.kind == "object without segmentation: no mask is learned from it"
    assert (problem.count, problem.examples[0]) == (2, "2.png, annotation 2")
    assert not report.splits["val"].problems  # nothing there has one: a data set for detection


def test_keypoints_without_left_and_right_are_noted_where_pictures_are_mirrored(tmp_path: Path) -> None:
    tree = coco([annotation(1, keypoints=[10, 10, 2, 20, 12, 2])], [{"id": 3, "name": "tube", "keypoints": ["a", "b"]}])
    for name in ("train", "val"):
        write_set(tmp_path, tree, name)
    note = "note: class 'tube': no left and right among its keypoints (a, b)"
    assert check(tmp_path, tasks=["keypoints"]).notes[0].startswith(note)
    assert not check(tmp_path, tasks=["detection"]).notes
    still = load_config(tasks=["keypoints"], overrides={"data.root": str(tmp_path), "data.augment.flip": 0})
    assert not checking.check(still).notes


def test_problems_are_counted_with_examples(tmp_path: Path) -> None:
    root = two_splits(tmp_path, [annotation(1), annotation(2, [10, 10, 0, 5])])
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    write_picture(tmp_path / "images" / "2.png", picture(96, 128))
    report = check(root)
    kinds = {problem.kind: problem.examples for problem in report.splits["train"].problems}
    assert kinds["box without area: annotation skipped"] == ["2.png, annotation 2: bbox [10, 10, 0, 5]"]
    assert kinds["image that cannot be read: never shown"] == ["3.png: not an image that can be read"]
    assert "128 x 96, annotated as 64 x 48" in kinds["image of another size than annotated: labels are scaled"][0]
    assert report.usable
    assert report.verdict.startswith("usable with 3 problems of 3 kinds")
    assert "! 1 x box without area" in report.text()

    quick = check(root, ("train",), quick=True)
    assert list(quick.splits) == ["train"]
    assert len(quick.splits["train"].problems) == 1


def test_a_broken_split_is_reported_and_not_usable(tmp_path: Path) -> None:
    two_splits(tmp_path, [annotation(1, category_id=55)])
    report = check(tmp_path)
    assert not report.usable
    assert "category_id 55" in report.verdict
    assert report.splits["val"].error is None


def test_problems_between_splits(tmp_path: Path) -> None:
    two_splits(tmp_path, [annotation(1)], [annotation(9, category_id=7)])
    tree = json.loads((tmp_path / "annotations" / "val.json").read_text())
    tree["images"].append({"id": 10, "file_name": "2.png", "height": 48, "width": 64})
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(tree))
    found = {problem.kind: problem.examples for problem in check(tmp_path).problems}
    assert found == {
        "class of val without an object in train": ["dog"],
        "image of val that is in train too": ["2.png"],
    }


def test_a_layout_is_checked_for_detection(tmp_path: Path) -> None:
    report = checking.check(find_layout(two_splits(tmp_path, [annotation(1)])))
    assert report.asked == ["detection"]
    assert report.verdict == "sound: every split can serve detection"


def test_progress_counts_every_image(tmp_path: Path) -> None:
    read: list[int] = []
    check(two_splits(tmp_path, [annotation(1)]), progress=read.append)
    assert sum(read) == 4


def test_contact_sheet(tmp_path: Path) -> None:
    layout = find_layout(two_splits(tmp_path, [annotation(1, segmentation=SQUARE)]))
    sheet = contact_sheet(layout, count=16, tile=100)
    assert sheet.shape == (154, 204, 3)  # three pictures of 75 x 100 in two columns
    augmented = contact_sheet(layout, tile=100, augment=AugmentConfig(flip=1))
    assert not np.array_equal(sheet, augmented)
    for suffix in ("png", "jpg"):
        path = tmp_path / f"sheet.{suffix}"
        write_image(str(path), sheet)
        assert cv2.imread(str(path)).shape == sheet.shape
    with pytest.raises(UserError, match="no picture format"):
        write_image(str(tmp_path / "sheet.xyz"), sheet)


def test_contact_sheet_leaves_out_damaged_images(tmp_path: Path) -> None:
    layout = find_layout(two_splits(tmp_path, [annotation(1)]))
    (tmp_path / "images" / "3.png").unlink()
    assert contact_sheet(layout, tile=100).shape == (154, 100, 3)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 chosen images can be read"):
        contact_sheet(layout)


def test_convert_writes_what_was_read(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write_picture(tmp_path / "old" / part / "1.png", picture(seed=len(part)))  # one name, two pictures
        tree = coco([annotation(segmentation=SQUARE), annotation(bbox=[1, 1, 0, 0])], CATEGORIES)
        (tmp_path / "old" / part / "_annotations.coco.json").write_text(json.dumps(tree))
    old = find_layout(tmp_path / "old")
    new = convert(old, tmp_path / "new")
    assert list(new.splits) == ["train", "val"]
    for name in new.splits:
        before, after = (CocoSplit(layout.split(name), FIELDS) for layout in (old, new))
        assert after.records[0].file == f"{name}/1.png"
        assert len(after.problems) == 0
        np.testing.assert_array_equal(after.labels.boxes, before.labels.boxes)
        assert after.coco_dict["annotations"] == before.coco_dict["annotations"]
        source, copy = before.folder / "1.png", after.folder / after.records[0].file
        assert source.read_bytes() == copy.read_bytes()


def test_convert_does_not_touch_a_folder_in_use(tmp_path: Path) -> None:
    layout = find_layout(two_splits(tmp_path / "old", [annotation(1)]))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        convert(layout, tmp_path / "new")

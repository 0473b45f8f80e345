"""Where the pictures of YOLO data sets and their label files lie."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mvision.data.formats.layouts import find_layout
from mvision.data.formats.yolo_pictures import Folders, LabelFiles
from mvision.errors import UserError
from tests.coco_files import picture, write_picture
from tests.yolo_files import BOXES, NAMES, read, said, yolo_set


def _objects(root: Path, split: str = "train") -> list[int]:
    """Objects of every picture."""
    found = read(root, split)
    return [found.rows(image).stop - found.rows(image).start for image in range(len(found))]


def test_pictures_in_linked_folders_have_their_labels_beside_the_link(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set")
    (tmp_path / "pool").mkdir()
    for split in NAMES:
        (root / "images" / split).rename(tmp_path / "pool" / split)
        (root / "images" / split).symlink_to(Path("..", "..", "pool", split))
    train = read(root)
    assert len(train.labels) == 6
    assert [record.file for record in train.records] == ["a.png", "b.png", "c.png"]
    (kind,) = said(train)
    assert kind == f"image outside {root}, through links: used"
    assert said(train)[kind][0] == 3
    assert said(train)[kind][1][0] == f"images/train/a.png -> {tmp_path}/pool/train/a.png"


def test_linked_pictures_have_the_labels_of_the_link_else_of_the_file(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set")
    pool = tmp_path / "pool" / "images"
    pool.mkdir(parents=True)
    for name in NAMES["train"]:
        (root / "images" / "train" / f"{name}.png").rename(pool / f"pool_{name}.png")
        (root / "images" / "train" / f"{name}.png").symlink_to(pool / f"pool_{name}.png")
    (root / "labels" / "train" / "b.txt").unlink()
    (tmp_path / "pool" / "labels").mkdir()
    (tmp_path / "pool" / "labels" / "pool_b.txt").write_text("1 0.5 0.5 0.1 0.1")
    assert _objects(root) == [2, 1, 2]


def test_loops_of_links_end(tmp_path: Path) -> None:
    root = yolo_set(tmp_path)
    (root / "images" / "train" / "up").symlink_to("..")
    (root / "images" / "train" / "self").symlink_to(".")
    (root / "images" / "train" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    train = read(root)
    assert len(train) == 3
    assert [count for count, _ in said(train).values()] == [1, 2]
    assert any("not followed" in kind for kind in said(train))
    assert any("leads nowhere" in kind for kind in said(train))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("{split}/images", "{split}/images"),
        ("{split}", "{split}"),
        ("Images/{split}", "Labels/{split}"),
        ("IMAGES/{split}", "labels/{split}"),
        ("images/{split}/images", "images/{split}/labels"),
        ("images/{split}/images", "labels/{split}/images"),
        ("{split}/images/day", "{split}/labels/day"),
        ("Images/Day {split}", "labels/day {split}"),
    ],
)
def test_places_of_label_files(tmp_path: Path, images: str, labels: str) -> None:
    root = yolo_set(tmp_path / "images" / "project", images=images, labels=labels)
    # A folder called images above the data set has no meaning.
    for split in NAMES:
        wrong = tmp_path / "labels" / "project" / images.format(split=split)
        wrong.mkdir(parents=True)
        (wrong / "a.txt").write_text("0 0.1 0.1 0.1 0.1\n" * 9)
    assert _objects(root) == [2, 2, 2]
    assert _objects(root, "val") == [2, 2]
    assert said(read(root)) == {}


def test_the_path_as_written_comes_before_beside_and_links(tmp_path: Path) -> None:
    finder = LabelFiles([tmp_path], Folders())
    assert finder.looked_for(str(tmp_path / "images" / "x.v1.jpg")) == [
        str(tmp_path / "labels" / "x.v1.txt"),
        str(tmp_path / "images" / "x.v1.txt"),
    ]
    assert LabelFiles([tmp_path / "images"], Folders()).looked_for(str(tmp_path / "images" / "x.jpg")) == [
        str(tmp_path / "images" / "x.txt")
    ]
    root = yolo_set(tmp_path)
    (root / "images" / "train" / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert _objects(root) == [2, 2, 2]


def test_a_set_without_label_files_is_refused(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, labels="annotations/{split}")
    message = (
        f"{root}/data.yaml: 0 of 3 images of 'train' have a label file; looked for {root}/labels/train/a.txt and "
        f"{root}/images/train/a.txt, ...; there is {root}/annotations/train/a.txt"
    )
    with pytest.raises(UserError) as caught:
        read(root)
    assert str(caught.value).startswith(message)


def test_a_test_split_needs_no_label_files(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, test="images/test")
    shutil.copytree(root / "images" / "val", root / "images" / "test")
    assert _objects(root, "test") == [0, 0]


def test_pictures_without_labels_and_labels_without_pictures_are_counted(tmp_path: Path) -> None:
    root = yolo_set(tmp_path)
    (root / "images" / "train" / "a.png").unlink()
    (root / "labels" / "train" / "b.txt").unlink()
    (root / "labels" / "train" / "classes.txt").write_text("cat\ndog\n")
    (root / "labels" / "train" / "night").mkdir()
    (root / "labels" / "train" / "night" / "x.txt").write_text(BOXES[0])
    train = read(root)
    assert len(train.labels) == 2
    assert said(train) == {
        "image without a label file: it counts as one without objects": (
            1,
            ["images/train/b.png: looked for labels/train/b.txt and images/train/b.txt"],
        ),
        "label file without an image: left out": (2, ["labels/train/a.txt", "labels/train/night/x.txt"]),
    }


def test_labels_of_another_list_are_no_orphans(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, images="images", labels="labels", train="train.txt", val="val.txt")
    for split, names in NAMES.items():
        (root / f"{split}.txt").write_text("".join(f"images/{name}.png\n" for name in names))
    assert said(read(root)) == {}


def test_hidden_and_unknown_files_are_left_out_and_counted(tmp_path: Path) -> None:
    root = yolo_set(tmp_path)
    folder = root / "images" / "train"
    (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    write_picture(folder / ".ipynb_checkpoints" / "a-checkpoint.png", picture())
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (folder / name).write_bytes(b"x")
    for name in ("x.heic", "y.heic", "frame"):
        (folder / name).write_bytes(b"x")
    train = read(root)
    assert [record.file for record in train.records] == ["a.png", "b.png", "c.png"]
    assert {kind: count for kind, (count, _) in said(train).items()} == {
        "hidden folder: left out": 1,
        "hidden file that is called like an image: left out": 1,
        "file with the ending .heic, for which there is no decoder: left out": 2,
        "file with no ending, which no image has: left out": 1,
    }


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "utf-16"])
@pytest.mark.parametrize("line", ["images\\{split}\\{name}.png\r\n", "./images/{split}/{name}.png\n"])
def test_lists(tmp_path: Path, line: str, encoding: str) -> None:
    root = yolo_set(tmp_path, train="train.txt", val="lists/val.txt")
    (root / "lists").mkdir()
    for split, file in (("train", root / "train.txt"), ("val", root / "lists" / "val.txt")):
        text = "".join(line.format(split=split, name=name) for name in NAMES[split])
        file.write_bytes(f"{text}\n".encode(encoding))
    train = read(root)
    assert [record.file for record in train.records] == [f"images/train/{name}.png" for name in NAMES["train"]]
    assert len(train.labels) == 6
    assert len(read(root, "val").labels) == 4  # the lines count from the root of the set
    assert said(train) == ({"list in UTF-16: read": (1, [f"{root}/train.txt"])} if encoding == "utf-16" else {})


def test_a_list_of_another_machine(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, train="train.txt")
    (root / "train.txt").write_text(
        "/home/me/pets/images/train/a.png\nC:\\pets\\images\\train\\b.png\n/x/images/train/gone.png\n/x/train/d.png\n"
    )
    train = read(root)
    assert [record.file for record in train.records] == ["images/train/a.png", "images/train/b.png"]
    assert {kind: count for kind, (count, _) in said(train).items() if "list" in kind} == {
        "image listed with a path of another machine: found by its end": 2,
        "image that is listed but not there: left out": 2,
    }
    (root / "train.txt").write_text("gone/x.png\ngone/y.png\n")
    with pytest.raises(UserError, match=r"train\.txt: none of its images is there: looked for .*gone/x\.png"):
        find_layout(root).split("train")


def test_pictures_outside_that_a_list_names_are_used_and_counted(tmp_path: Path) -> None:
    yolo_set(tmp_path / "other")
    root = yolo_set(tmp_path / "set", train="train.txt")
    (root / "train.txt").write_text("../other/images/train/a.png\nimages/train/b.png\n")
    train = read(root)
    assert len(train.labels) == 4
    outside = f"image outside {root}, as it is listed: used"
    assert said(train) == {outside: (1, [f"{tmp_path}/other/images/train/a.png"])}


def test_a_picture_may_be_listed_several_times(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, train="train.txt")
    (root / "train.txt").write_text("images/train/a.png\nimages/train/b.png\n" * 40)
    assert _objects(root) == [2] * 80
    assert said(read(root)) == {
        "image listed several times: it counts as often": (
            2,
            ["images/train/a.png: 40 times", "images/train/b.png: 40 times"],
        )
    }


def test_a_data_yaml_of_another_machine(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, path="/content/pets", train="/content/pets/images/train", val="images\\val")
    assert _objects(root) == [2, 2, 2]
    assert _objects(root, "val") == [2, 2]
    assert said(read(root)) == {
        "path of another machine in data.yaml: found by its end": (
            1,
            [f"/content/pets/images/train -> {root}/images/train"],
        )
    }
    root = yolo_set(tmp_path / "windows", path="C:\\pets", train="C:\\pets\\images\\train", val="/x/val/images")
    assert _objects(root) == [2, 2, 2]
    with pytest.raises(UserError, match=r"no split 'val' \(.*val: /x/val/images is not there"):
        find_layout(root).split("val")  # images/ alone would be train and val


def test_splits_that_are_not_there_do_not_hinder_the_others(tmp_path: Path) -> None:
    root = yolo_set(tmp_path, test="../test/images")
    layout = find_layout(root)
    assert list(layout.splits) == ["train", "val"]
    assert "without test: " in layout.description
    assert "../test/images is not there" in layout.missing["test"]


def test_label_files_that_cannot_be_read_take_their_picture_with_them(tmp_path: Path) -> None:
    root = yolo_set(tmp_path)
    folder = root / "labels" / "train"
    (folder / "a.txt").write_bytes(b"\xff\xd8\xff\xe0" + bytes(50))
    (folder / "b.txt").unlink()
    os.mkfifo(folder / "b.txt")
    train = read(root)
    assert [record.file for record in train.records] == ["c.png"]
    ((kind, (count, places)),) = said(train).items()
    assert kind == "label file that cannot be read: left out with its image"
    assert count == 2
    assert places[0].startswith("labels/train/a.txt: not text")
    assert places[1] == "labels/train/b.txt: not a file"

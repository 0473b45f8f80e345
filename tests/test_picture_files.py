"""Where the pictures of a COCO file are found: other folders, other spellings, links."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.errors import UserError
from tests.coco_files import annotation, coco, picture, write_picture, write_set

ELSEWHERE = "file_name that is not there as written: taken from another place of the data set"


def write(root: Path, names: list[str], pictures: list[str]) -> Path:
    """Images with these file names in train.json, and pictures at these paths below ``root``."""
    tree = coco([annotation(1)], images=len(names))
    for entry, name in zip(tree["images"], names):
        entry["file_name"] = name
    write_set(root, tree, pictures=False)
    for number, path in enumerate(pictures):
        write_picture(root / path, picture(seed=number))
    return root


def read(root: Path) -> CocoSplit:
    return CocoSplit(find_layout(root).split("train"))


def problems(split: CocoSplit) -> dict[str, list[str]]:
    return {problem.kind: problem.examples for problem in split.problems}


@pytest.mark.parametrize(
    ("names", "pictures", "folder"),
    [
        (["1.png", "2.png"], ["images/1.png", "images/2.png"], "images"),
        (["./1.png", "sub//2.png"], ["images/1.png", "images/sub/2.png"], "images"),
        (["1.png", "2.png"], ["images/train/1.png", "images/train/2.png"], "images/train"),
        (["images/1.png", "images\\2.png"], ["images/1.png", "images/2.png"], "."),
        (["1.png"], ["annotations/1.png"], "annotations"),
        (["data/1.png"], ["data/1.png"], "."),
    ],
)
def test_names_count_from_one_of_several_folders(
    tmp_path: Path, names: list[str], pictures: list[str], folder: str
) -> None:
    split = read(write(tmp_path, names, pictures))
    assert split.folder.resolve() == (tmp_path / folder).resolve()
    assert all((split.folder / record.file).is_file() for record in split.records)
    assert not split.problems


def test_the_folder_with_most_of_the_pictures_is_taken(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(4)]
    split = read(write(tmp_path, names, ["images/0.png", *(f"images/train/{name}" for name in names[1:])]))
    assert split.folder == tmp_path / "images"
    assert [record.file for record in split.records] == ["0.png", *(f"train/{name}" for name in names[1:])]
    assert problems(split) == {ELSEWHERE: ["0.png: images/0.png"]}


def test_other_spellings_are_found_and_said(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "Zoë.png")
    decomposed = unicodedata.normalize("NFD", composed)
    split = read(
        write(tmp_path, ["1.png", "2.PNG", composed], ["images/1.png", "images/2.png", f"images/{decomposed}"])
    )
    assert [record.file for record in split.records] == ["1.png", "2.png", decomposed]
    assert list(problems(split)) == [ELSEWHERE]


def test_names_encoded_as_in_a_url_are_found_and_said(tmp_path: Path) -> None:
    names = ["my%20pic.png", "sub%2Fa%C3%A4.png", "100%25.png", "x/far%20away.png", "gone%20.png"]
    pictures = ["images/my pic.png", "images/sub/aä.png", "images/100%25.png", "more/far away.png"]
    split = read(write(tmp_path, names, pictures))
    assert split.broken == {4}
    assert [split.records[number].file for number in range(4)] == pictures
    assert len(problems(split)[ELSEWHERE]) == 3  # as written wins
    for name in ("%2e%2e/1.png", "a/%2e%2e/..%2f../1.png"):
        with pytest.raises(UserError, match="leaves the folder of the images"):
            read(write(tmp_path / "set", [name, "1.png"], ["1.png", "images/1.png", "../1.png"]))


def test_the_base_name_is_the_last_resort(tmp_path: Path) -> None:
    names = ["upload/4/a.png", "upload/4/b.png", "x/c.png", "y/c.png"]
    split = read(write(tmp_path, names, ["images/a.png", "more/b.png", "more/1/c.png"]))
    assert split.folder == tmp_path
    assert [record.file for record in split.records[:2]] == ["images/a.png", "more/b.png"]
    assert split.broken == {2, 3}  # one picture cannot be two images
    assert problems(split) == {
        ELSEWHERE: ["upload/4/a.png: images/a.png", "upload/4/b.png: more/b.png"],
        "image that is not there: never shown": ["images/x/c.png", "images/y/c.png"],
    }


def test_two_files_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    split = read(write(tmp_path, ["old/a.png", "1.png"], ["images/1.png", "p/a.png", "q/a.png", ".hidden/a.png"]))
    assert split.broken == {0}
    (tmp_path / "q" / "a.png").unlink()
    assert not read(tmp_path).broken


def cameras(root: Path, names: list[str], pictures: list[str]) -> Path:
    """A file beside the folders of its pictures; every entry with an object."""
    tree = coco([annotation(number) for number in range(1, len(names) + 1)], images=len(names))
    for entry, name in zip(tree["images"], names):
        entry["file_name"] = name
    for number, path in enumerate(pictures):
        write_picture(root / path, picture(seed=number))
    (root / "train.json").write_text(json.dumps(tree))
    return root


def test_the_folder_is_named_where_several_have_the_same_names(tmp_path: Path) -> None:
    pictures = ["depth/1.png", "depth/2.png", "rgb/1.png", "rgb/2.png", "some/1.png", "val/1.png", "val/2.png"]
    root = cameras(tmp_path, ["1.png", "2.png"], pictures)
    (root / "again").symlink_to("depth")  # the same pictures
    split = read(root)
    assert [file.rpartition("/")[2] for file in split.real_files] == ["1.png", "2.png"]
    assert [place for kind, place in problems(split).items() if "namesakes" in kind] == [["again/1.png, not rgb/1.png"]]
    assert not read(cameras(tmp_path / "b", ["a/1.png", "2.png"], ["x/a/1.png", "y/2.png"])).broken
    assert not [kind for kind in problems(read(tmp_path / "b")) if "namesakes" in kind]  # as many, but of other names


def test_entries_of_one_name_are_not_merged_where_several_files_have_it(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "1.png", "2.png", "3.png"]
    split = read(cameras(tmp_path, names, ["cam1/1.png", "cam2/1.png", "cam1/2.png", "cam1/3.png"]))
    assert [record.file for record in split.records] == ["2.png", "3.png"]
    assert split.coco_dict["images"][0]["id"] == 2
    assert len(split.labels) == 2  # the two of 2.png are alike
    found = {kind.partition(":")[0]: places for kind, places in problems(split).items()}
    assert found["file_name of several image entries and several files"] == [
        "1.png, ids 1 and 3: cam1/1.png, cam2/1.png"
    ]
    assert found["picture in several image entries"] == ["2.png, ids 2 and 4"]
    assert not any("does not list" in kind for kind in found)
    with pytest.raises(
        UserError, match=r"train\.json: which pictures .*\(1\.png, ids 1 and 2: cam1/1\.png, cam2/1\.png\); write"
    ):
        read(cameras(tmp_path, ["1.png", "1.png"], []))


def test_none_of_the_pictures(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"train.json: none of its images is there: looked for 1.png and others in .*imag"
    ):
        read(write(tmp_path, ["1.png", "2.png"], []))


@pytest.mark.parametrize(
    "name", ["../1.png", "..\\..\\1.png", "a/../../1.png", "/etc/passwd", "C:/1.png/../../../1.png"]
)
def test_names_that_leave_the_folder_are_refused_wherever_they_lead(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="leaves the folder of the images"):
        read(write(tmp_path, [name], ["1.png", "images/1.png"]))


@pytest.mark.parametrize("start", ["/content/My Drive/set", "C:\\Users\\me\\set", "https://host/set"])
def test_paths_of_another_machine_are_found_by_their_end(tmp_path: Path, start: str) -> None:
    ends = ["images/train/1.png", "images/val/1.png", "2.png"]
    split = read(write(tmp_path, [f"{start}/{end}" for end in ends], [*ends[:2], "more/2.png"]))
    assert not split.broken
    assert [record.file for record in split.records] == [*ends[:2], "more/2.png"]
    assert len(problems(split)[ELSEWHERE]) == 3


def test_absolute_paths_open_nothing_outside_and_are_not_guessed_between(tmp_path: Path) -> None:
    write_picture(tmp_path / "other" / "9.png", picture())
    root = write(tmp_path / "set", [str(tmp_path / "other" / "9.png"), "1.png"], ["images/1.png"])
    with pytest.raises(UserError, match=r"train\.json: file_name '/.*/other/9\.png' leaves the folder of the images"):
        read(root)
    with pytest.raises(UserError, match=r"'/a/d/1\.png' leaves the folder"):  # d/1.png cannot be both
        read(write(root, ["/a/d/1.png", "/c/d/1.png", "2.png"], ["images/d/1.png", "images/2.png"]))


def test_pictures_behind_links_are_read_and_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "set", ["1.png", "2.png", "pool/3.png"], ["images/1.png"])
    for name in ("2.png", "3.png"):
        write_picture(tmp_path / "pool" / name, picture())
    (root / "images" / "2.png").symlink_to(tmp_path / "pool" / "2.png")
    (root / "images" / "pool").symlink_to("../../pool")
    (root / "images" / "again").symlink_to("../images")  # a loop
    split = read(root)
    assert not split.broken
    pool = tmp_path.resolve() / "pool"
    assert problems(split) == {
        f"picture outside {root}, through links: read from there": [
            f"2.png: {pool / '2.png'}",
            f"pool/3.png: {pool / '3.png'}",
        ]
    }
    assert split.real_files[0] == str(root.resolve() / "images" / "1.png")


def test_a_data_set_that_is_itself_a_link_is_not_outside(tmp_path: Path) -> None:
    write(tmp_path / "set", ["1.png"], ["images/1.png"])
    (tmp_path / "link").symlink_to("set")
    assert not read(tmp_path / "link").problems


def test_missing_pictures_are_counted_once(tmp_path: Path) -> None:
    root = write(tmp_path / "set", ["1.png", "gone.png", "broken.png"], ["images/1.png", "images/broken.png"])
    (root / "images" / "broken.png").write_bytes(b"x")
    tree = json.loads((root / "annotations" / "train.json").read_text())
    for entry in tree["images"]:
        del entry["height"]
    (root / "annotations" / "train.json").write_text(json.dumps(tree))
    split = read(root)
    assert split.broken == {1, 2}
    counts = {problem.kind.split(":")[0]: problem.count for problem in split.problems}
    assert counts == {
        "image that is not there": 1,
        "image that cannot be read": 1,
        "image without height and width in the annotations": 3,
    }

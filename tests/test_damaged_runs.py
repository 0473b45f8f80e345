"""Runs on data with damaged pictures: they end, name each file once, and count."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvision.errors import UserError
from tests.small_runs import run_in_process


def damage(file: Path, kind: str) -> None:
    data = file.read_bytes()
    contents = {
        "empty": b"",
        "text": b"<html>not found</html>",
        "truncated": data[: len(data) // 2],
        "header only": data[:20],
        "zeros": data[:4] + bytes(len(data) - 4),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    }
    file.write_bytes(contents[kind])


def test_a_run_with_damaged_pictures_names_each_once(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = squares / "images"
    damage(images / "train_1.jpg", "truncated")
    for number, kind in ((0, "header only"), (1, "text"), (2, "zeros")):
        damage(images / f"val_{number}.jpg", kind)
    run = run_in_process(squares, tmp_path / "run", train__epochs=3)
    printed = capsys.readouterr().out
    for name in ("train_1", "val_0", "val_1", "val_2"):
        assert sum(line.startswith("skipped ") and name in line for line in printed.splitlines()) == 1
    assert "warning: 1 training image could not be read, replaced by others " in printed
    assert "warning: 3 validation images could not be read, left out of the figures: " in printed
    assert (run / "predictions.jpg").is_file()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["empty", "eps"])
def test_a_split_of_which_no_picture_can_be_read_is_one_line(
    squares: Path, tmp_path: Path, split: str, kind: str
) -> None:
    for number in range(4):
        damage(squares / "images" / f"{split}_{number}.jpg", kind)
    with pytest.raises(UserError, match=rf"{split}.json: none of its 4 images can be read: .*{split}_\d.jpg: "):
        run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert not (tmp_path / "run").exists()

"""Data sets and runs with the faults that docs/troubleshooting.md is about, beside those of ``page_place``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mvision.storage.run_folder import RunFolder
from tests.page_place import read
from tests.small_runs import run_in_process


def add_faults(root: Path) -> None:
    """What the symptoms of the page come from."""
    _changed(root / "my_data", root / "sizes", _swap_sizes)
    _changed(root / "my_data", root / "names", _rename)
    _changed(root / "my_data", root / "ids", _move_ids)
    _changed(root / "my_data", root / "crowds", _crowds)
    for name, change in (("pixels", _in_pixels), ("from_one", _from_one)):
        shutil.copytree(root / "yolo", root / name)
        for file in (root / name / "labels").rglob("*.txt"):
            file.write_text("".join(change(line) for line in file.read_text().splitlines()), encoding="utf-8")
    (root / "model.pkl").write_bytes(b"a pickle")
    run_in_process(root / "my_data", root / "runs" / "stopped", train__epochs=1, data__root="my_data")
    _changed(root / "my_data", root / "fewer", _drop_one)
    for name, data in (("other_images", "fewer"), ("other_classes", "names")):
        shutil.copytree(root / "runs" / "stopped", root / "runs" / name)
        file = RunFolder(root / "runs" / name).path / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["data"]["root"] = data
        file.write_text(yaml.safe_dump(config), encoding="utf-8")


def _changed(data: Path, copy: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    shutil.copytree(data, copy)
    for split in ("train", "val"):
        content = read(copy, split)
        change(content, split)
        (copy / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _swap_sizes(content: dict[str, Any], split: str) -> None:
    """The labels of pictures that were made half as large afterwards."""
    for image in content["images"]:
        image["width"], image["height"] = 128, 128
    for entry in content["annotations"]:
        entry["bbox"] = [2 * value for value in entry["bbox"]]
        entry["segmentation"] = [[2 * value for value in part] for part in entry["segmentation"]]


def _rename(content: dict[str, Any], split: str) -> None:
    content["categories"][0]["name"] = "azure" if split == "train" else "sky"


def _move_ids(content: dict[str, Any], split: str) -> None:
    for category in content["categories"]:
        category["id"] += 1


def _crowds(content: dict[str, Any], split: str) -> None:
    for entry in content["annotations"]:
        entry["iscrowd"] = 1


def _drop_one(content: dict[str, Any], split: str) -> None:
    if split == "train":
        content["images"].pop()
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] < 8]


def _in_pixels(line: str) -> str:
    label, *values = line.split()
    return f"{label} {' '.join(str(round(64 * float(value))) for value in values)}\n"


def _from_one(line: str) -> str:
    label, rest = line.split(maxsplit=1)
    return f"{int(label) + 1} {rest}\n"

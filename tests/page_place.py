"""A working folder in which the commands and the code of the pages run: data in every layout, pictures, trained runs.

Everything is small: pictures of 64 x 64 pixels with coloured squares, models that predict in milliseconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

import mvision
from mvision.structures import Category
from mvision.weights import save_weights
from tests.conftest import write_squares
from tests.small_runs import add_corners

POINTS = ["left_top", "right_top", "left_end", "right_end"]
CLASSES = [Category(id=2, name="blue", keypoints=["centre"]), Category(id=5, name="red", keypoints=POINTS)]
TASKS = ("detection", "instance-seg", "keypoints", "semantic-seg", "detection+instance-seg+keypoints")


def make_place(root: Path) -> Path:
    """The folder with everything in it that the pages take as given."""
    data = write_squares(root / "my_data", images=8)
    add_corners(data)
    _without_places_of_unlabelled_points(data)
    for layout in (_coco_2017, _roboflow, _fiftyone, _beside, _yolo, _yolo_plain, _cvat, _label_studio):
        layout(data, root)
    (root / "photos").mkdir()
    for number in range(3):
        shutil.copy(data / "images" / f"val_{number}.jpg", root / "photos")
    shutil.copy(data / "images" / "train_0.jpg", root / "street.jpg")
    for tasks in TASKS:
        save_weights(make_model(tasks.split("+")), root / "runs" / tasks / "1" / "best.safetensors")
        _write_config(root / "runs" / tasks / "1", tasks.split("+"))
    return root


def make_model(tasks: list[str]) -> mvision.Model:
    settings: dict[str, Any] = {"image_size": 64, "neck__embed_dim": 32}
    for task in tasks:
        if task in ("detection", "instance-seg"):
            settings[f"heads__{task}__num_queries"] = 10
    return mvision.create_model("tiny", tasks, categories=CLASSES, **settings).eval()


def _write_config(folder: Path, tasks: list[str]) -> None:
    """As a run leaves it: the data that its weights were trained on."""
    from mvision.config import load_config

    config = load_config("tiny", tasks=tasks, overrides={"data.root": "my_data", "model.image_size": 64})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")


def read(data: Path, split: str) -> dict[str, Any]:
    return json.loads((data / "annotations" / f"{split}.json").read_text(encoding="utf-8"))


def _without_places_of_unlabelled_points(data: Path) -> None:
    """As COCO has them: zeros, so that nothing is wrong with the data."""
    for split in ("train", "val"):
        content = read(data, split)
        for entry in content["annotations"]:
            points = [entry["keypoints"][k : k + 3] for k in range(0, len(entry["keypoints"]), 3)]
            entry["keypoints"] = [value * (point[2] > 0) for point in points for value in point]
        (data / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _copy(data: Path, folder: Path, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in read(data, split)["images"]:
        shutil.copy(data / "images" / image["file_name"], folder)


def _coco_2017(data: Path, root: Path) -> None:
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        _copy(data, root / "coco" / f"{split}2017", split)
        for kind in ("instances", "person_keypoints"):
            shutil.copy(
                data / "annotations" / f"{split}.json", root / "coco" / "annotations" / f"{kind}_{split}2017.json"
            )


def _roboflow(data: Path, root: Path) -> None:
    for split, folder in (("train", "train"), ("val", "valid")):
        _copy(data, root / "roboflow" / folder, split)
        shutil.copy(data / "annotations" / f"{split}.json", root / "roboflow" / folder / "_annotations.coco.json")


def _fiftyone(data: Path, root: Path) -> None:
    _copy(data, root / "fiftyone" / "data", "train")
    shutil.copy(data / "annotations" / "train.json", root / "fiftyone" / "labels.json")


def _beside(data: Path, root: Path) -> None:
    _copy(data, root / "export" / "images", "train")
    shutil.copy(data / "annotations" / "train.json", root / "export" / "result.json")


def _yolo(data: Path, root: Path) -> None:
    for split in ("train", "val"):
        _copy(data, root / "yolo" / "images" / split, split)
        _write_labels(root / "yolo" / "labels" / split, read(data, split))
    names = {"train": "images/train", "val": "images/val", "names": ["blue", "red"]}
    (root / "yolo" / "data.yaml").write_text(yaml.safe_dump(names), encoding="utf-8")


def _yolo_plain(data: Path, root: Path) -> None:
    _copy(data, root / "yolo_plain" / "images", "train")
    _write_labels(root / "yolo_plain" / "labels", read(data, "train"))
    (root / "yolo_plain" / "classes.txt").write_text("blue\nred\n", encoding="utf-8")


def _write_labels(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for image in content["images"]:
        lines = []
        for entry in _of(image, content):
            x, y, width, height = (value / image["width"] for value in entry["bbox"])
            lines.append(f"{(2, 5).index(entry['category_id'])} {x + width / 2} {y + height / 2} {width} {height}\n")
        (folder / f"{Path(image['file_name']).stem}.txt").write_text("".join(lines), encoding="utf-8")


def _of(image: dict[str, Any], content: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]


def _names(content: dict[str, Any]) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def _cvat(data: Path, root: Path) -> None:
    _copy(data, root / "cvat" / "images", "train")
    content, lines = read(data, "train"), ["<annotations>", "<version>1.1</version>"]
    for image in content["images"]:
        lines.append('<image id="{id}" name="{file_name}" width="{width}" height="{height}">'.format(**image))
        for entry in _of(image, content):
            x, y, width, height = entry["bbox"]
            label = _names(content)[entry["category_id"]]
            corners = f'xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}"'
            lines.append(f'<box label="{label}" occluded="0" {corners} z_order="0"/>')
        lines.append("</image>")
    (root / "cvat" / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]), encoding="utf-8")


def _label_studio(data: Path, root: Path) -> None:
    _copy(data, root / "label_studio" / "images", "train")
    content, tasks = read(data, "train"), []
    for image in content["images"]:
        result = []
        for entry in _of(image, content):
            x, y, width, height = (100 * value / image["width"] for value in entry["bbox"])
            box = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
            result.append(
                {
                    "id": str(entry["id"]),
                    "type": "rectanglelabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": image["width"],
                    "original_height": image["height"],
                    "value": {**box, "rectanglelabels": [_names(content)[entry["category_id"]]]},
                }
            )
        path = f"/data/upload/1/{image['file_name']}"
        tasks.append({"id": image["id"], "data": {"image": path}, "annotations": [{"result": result}]})
    (root / "label_studio" / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")

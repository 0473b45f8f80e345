"""Rows for learning.py from a YOLO program, which is run as a command in an environment of its own.

    python docs/scripts/learning_yolo.py OUT --yolo yolo/bin/yolo --data detection=bccd --steps 600 --image-size 192
    python docs/scripts/learning.py ... --others OUT/rows.jsonl

``--yolo`` is the program that the package ``ultralytics`` installs. Its licence is the AGPL, so nothing of it is
imported, and it belongs into an environment without mvision. Its models start from random weights, with that program's
own settings but for the number of epochs, the pictures in a batch and their size. Data sets in COCO's layout are
rewritten as its text files: the same pictures and the same objects, without crowd regions.

The AP is the one that the program reports after each epoch, of its own metric, not pycocotools'. That of poses takes
1 / K for the sigmas of K points where K is not 17; so compare with sigmas of 1 / K.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, name_of, task_and_folder
from pycocotools import mask as rle

from mvision.structures.masks import mask_polygons

MODELS = {"detection": ("", "B"), "instance-seg": ("-seg", "M"), "keypoints": ("-pose", "P")}
"""Task -> ending of the model's name, and of the column with its AP."""
COMMANDS = {"detection": "detect", "instance-seg": "segment", "keypoints": "pose"}


def main() -> None:
    """Train what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="folder of rows.jsonl, the text files and the program's runs")
    add("--yolo", type=Path, required=True, metavar="FILE", help="the program")
    add("--data", action="append", required=True, type=task_and_folder, metavar="TASK=FOLDER", help="may be repeated")
    add("--model", default="yolo26n", help="[default: %(default)s]")
    add("--steps", type=int, default=1500, metavar="N", help="of a training, at least  [default: %(default)s]")
    add("--image-size", type=int, default=320, metavar="N", help="pixels  [default: %(default)s]")
    add("--batch", type=int, default=16, metavar="N", help="[default: %(default)s]")
    add("--seeds", type=int, default=3, metavar="N", help="from 0  [default: %(default)s]")
    add("--device", default="cpu", help="as in that program  [default: %(default)s]")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.out / "rows.jsonl"
    known = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    for seed in range(options.seeds):
        for task, folder in options.data:
            columns = columns_of(options, task, folder, seed)
            if any(columns.items() <= row.items() for row in known):
                continue
            row = columns | train(options, task, Path(folder), seed)
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{task} on {row['data']}, seed {seed}: AP {row['curve'][-1][1]:.3f}", flush=True)


def columns_of(options: argparse.Namespace, task: str, folder: str, seed: int) -> Row:
    """What names a training."""
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    return {
        "task": task,
        "data": name_of(folder),
        "model": options.model,
        "start": "random",
        "size": options.image_size,
        "batch": options.batch,
        "asked_steps": options.steps,
        "machine": f"CPU, {threads} threads" if options.device == "cpu" else options.device,
        "seed": seed,
    }


def train(options: argparse.Namespace, task: str, folder: Path, seed: int) -> Row:
    """Run the program, and read what it wrote."""
    data = options.out / "data" / f"{task}-{folder.name}"
    pictures = write_data(task, folder, data)
    of_epoch = math.ceil(pictures / options.batch)
    epochs = math.ceil(options.steps / of_epoch)
    ending, column = MODELS[task]
    run = options.out / "runs" / f"{task}-{folder.name}-{options.image_size}-{options.steps}-{seed}"
    settings = {
        "model": f"{options.model}{ending}.yaml",
        "data": data.resolve() / "data.yaml",
        "epochs": epochs,
        "patience": epochs,
        "imgsz": options.image_size,
        "batch": options.batch,
        "seed": seed,
        "device": options.device,
        "pretrained": False,
        "plots": False,
        "workers": 1,
        "project": run.parent.resolve(),
        "name": run.name,
        "exist_ok": True,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    with (options.out / f"{run.name}.log").open("w") as log:
        subprocess.run(
            [options.yolo, COMMANDS[task], "train", *words], check=True, stdout=log, stderr=subprocess.STDOUT
        )
    with (run / "results.csv").open(encoding="utf-8") as file:
        found = [{key.strip(): value for key, value in line.items()} for line in csv.DictReader(file)]
    curve = [(int(line["epoch"]), float(line[f"metrics/mAP50-95({column})"])) for line in found]
    clock = [(int(line["epoch"]) * of_epoch, float(line["time"])) for line in found]
    return {"pictures": pictures, "steps": epochs * of_epoch, "curve": curve, "clock": clock}


def write_data(task: str, folder: Path, out: Path) -> int:
    """Write the text files of both splits, with links to the pictures; return the number of training pictures."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split in ("train", "val"):
        coco = json.loads((folder / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
        categories = {category["id"]: number for number, category in enumerate(coco["categories"])}
        lines: dict[int, list[str]] = {image["id"]: [] for image in coco["images"]}
        sides = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        for found in coco["annotations"]:
            if not found.get("iscrowd"):
                numbers = numbers_of(task, found, *sides[found["image_id"]])
                lines[found["image_id"]] += [" ".join(map(str, [categories[found["category_id"]], *numbers]))]
        for part in ("images", "labels"):
            (out / part / split).mkdir(parents=True, exist_ok=True)
        for image in coco["images"]:
            name = Path(image["file_name"])
            link = out / "images" / split / name.name
            link.unlink(missing_ok=True)
            link.symlink_to((folder / "images" / name).resolve())
            (out / "labels" / split / f"{name.stem}.txt").write_text("\n".join(lines[image["id"]]), encoding="utf-8")
        sizes[split] = len(coco["images"])
    names = [category["name"] for category in coco["categories"]]
    settings: dict[str, Any] = {"path": str(out.resolve()), "train": "images/train", "val": "images/val"}
    settings["names"] = dict(enumerate(names))
    if task == "keypoints":
        settings["kpt_shape"] = [len(coco["categories"][0]["keypoints"]), 3]
    (out / "data.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML too
    return sizes["train"]


def numbers_of(task: str, found: dict[str, Any], width: int, height: int) -> list[float]:
    """An object's numbers in a line of a text file, behind its class."""
    if task == "instance-seg":
        return (polygon_of(found["segmentation"], width, height) / (width, height)).flatten().round(6).tolist()
    left, top, wide, high = found["bbox"]
    box = [(left + wide / 2) / width, (top + high / 2) / height, wide / width, high / height]
    if task == "keypoints":
        points = np.array(found["keypoints"], float).reshape(-1, 3) / (width, height, 1)
        box += points.flatten().tolist()
    return [round(number, 6) for number in box]


def polygon_of(segmentation: Any, width: int, height: int) -> np.ndarray:
    """(P, 2) x, y in pixels: the largest part of a mask."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, height, width)
        parts = [
            np.asarray(part, float).reshape(-1, 2) for part in mask_polygons(rle.decode(segmentation).astype(bool))
        ]
    else:
        parts = [np.asarray(part, float).reshape(-1, 2) for part in segmentation]
    return max(parts, key=lambda part: float(np.ptp(part, axis=0).prod()))


if __name__ == "__main__":
    main()

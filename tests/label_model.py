"""A model that finds painted rectangles with a mask and, of one class, keypoints; and its labels as written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mvision.cli.main import run
from mvision.commands import label as command
from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.inference.selection import Threshold
from mvision.structures import Category, Instances
from mvision.structures.masks import Masks
from tests.fake_model import FakeModel, paint, save

POINTS = ["left_top", "right_top", "middle"]
CLASSES = [
    Category(id=3, name="red", keypoints=POINTS, skeleton=[(0, 1), (1, 2)]),
    Category(id=9, name="green"),
    Category(id=10, name="blue"),
]
# A large red, a small green (which gets a low score) and a blue one.
PAINTED = {
    "a.png": [(0, (20, 10, 70, 60)), (1, (90, 60, 108, 75))],
    "sub/b.png": [(2, (5, 5, 55, 50))],
    "empty.png": [],
}


class LabelModel(FakeModel):
    """With the tasks that it is made with."""

    def __init__(self, tasks: Sequence[str] = ("detection",)) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.config.categories = self.categories = CLASSES

    def postprocess(
        self,
        outputs: dict[str, dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
        threshold: Threshold,
        *,
        multi_label: bool = False,
        nms: float | None = None,
    ) -> list[Instances]:
        """One instance for every rectangle; its mask is an L of two parts of it, its points lie in the corners."""
        outputs = {"detection": next(iter(outputs.values()))}
        found = super().postprocess(outputs, sizes, threshold, multi_label=multi_label, nms=nms)
        return [self._completed(replace(one, categories=CLASSES)) for one in found]

    def _completed(self, one: Instances) -> Instances:
        if "instance-seg" in self.tasks:
            masks = np.zeros((len(one), *one.size), bool)
            for mask, (x0, y0, x1, y1) in zip(masks, one.boxes.astype(int).tolist()):
                mask[y0 : (y0 + y1) // 2, x0:x1] = True
                mask[(y0 + y1) // 2 : y1, x0 : (x0 + x1) // 2] = True
                mask[y1 - 5 : y1, x1 - 5 : x1] = True  # a part of its own
            one = replace(one, masks=Masks.from_array(masks))
        if "keypoints" in self.tasks:
            x0, y0, x1, y1 = one.boxes.T
            sure = np.ones(len(one), np.float32)
            points = [(x0 + 2, y0 + 2, sure), (x1 - 2, y0 + 2, sure), ((x0 + x1) / 2, (y0 + y1) / 2, sure * 0.1)]
            one = replace(one, keypoints=np.stack([np.stack(point, axis=1) for point in points], axis=1))
        return one


def photos(folder: Path) -> Path:
    """The painted pictures."""
    for name, rectangles in PAINTED.items():
        save(folder / name, paint((96, 128), rectangles))
    return folder


def label(monkeypatch: pytest.MonkeyPatch, folder: Path, output: Path, *options: str, tasks: Sequence[str]) -> int:
    """``mvision label`` with this model; returns the exit code."""
    model = LabelModel(tasks).eval()
    monkeypatch.setattr(command, "open_fastest", lambda *args: (model, "a model of tests"))
    return run(["label", str(folder), "--weights", "none", "--output", str(output), "--device", "cpu", *options])


def read(folder: Path, split: str = "train") -> dict[str, list[dict[str, Any]]]:
    """The objects of every picture, by the last part of its name, in the order of their boxes."""
    part = CocoSplit(find_layout(folder).split(split, FIELDS), FIELDS)
    tree = part.coco_dict
    names = {category["id"]: category["name"] for category in tree["categories"]}
    pictures = {image["id"]: Path(image["file_name"]).name for image in tree["images"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pictures.values()}
    for annotation in tree["annotations"]:
        found[pictures[annotation["image_id"]]].append({**annotation, "name": names[annotation["category_id"]]})
    return {name: sorted(objects, key=lambda one: one["bbox"]) for name, objects in sorted(found.items())}

"""Mean IoU of classes over pixels, with the counting of segmentation-models-pytorch's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from pycocotools import mask as coco_mask

from mvision.errors import printable
from mvision.evaluation.ground_truth import GroundTruth
from mvision.evaluation.metric import Metric
from mvision.evaluation.tables import figure_text, text_table
from mvision.structures import Category

IGNORED = -1  # label of pixels that do not count


class SemanticMetric(Metric):
    """IoU of every class over the pixels of all images; class 0 are the pixels of no class.

    Pixels of crowd regions and in the boxes of objects without a mask are ignored. Where objects overlap, the smallest
    one's class is the pixel's class; where results overlap, that of the highest score.

    Raises:
        UserError: none of the model's classes is in the data, or the annotations cannot be evaluated.
    """

    name = "semantic"

    def __init__(self, annotations: dict[str, Any], categories: Sequence[Category]) -> None:
        super().__init__(annotations, categories)
        self.ground_truth = GroundTruth(annotations, self.categories, "segm")
        self.notes = self.ground_truth.notes
        self._class_numbers = {category.id: number for number, category in enumerate(self.categories, start=1)}
        dataset = self.ground_truth.dataset(set(self._class_numbers.values()))
        self._objects: dict[int, list[dict[str, Any]]] = {}
        for annotation in dataset["annotations"]:
            self._objects.setdefault(annotation["image_id"], []).append(annotation)
        self._sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}

    def measure(self, image_id: Any, results: list[dict[str, Any]]) -> np.ndarray:
        """(3, classes + 1) int64: true positive, false positive and false negative pixels of every class."""
        if image_id not in self.ground_truth.image_numbers:
            raise ValueError(f"image id {image_id!r} is not in the annotations")
        number = self.ground_truth.image_numbers[image_id]
        gt, predicted = np.zeros((2, *self._sizes[number]), dtype=np.int64)
        # Crowd regions first: an object that is labelled in front of one counts.
        for annotation in sorted(self._objects.get(number, []), key=lambda a: (not a["iscrowd"], -a["area"])):
            inside = coco_mask.decode(annotation["segmentation"]).astype(bool)
            gt[inside] = IGNORED if annotation["iscrowd"] else annotation["category_id"]
        for entry in sorted(results, key=lambda e: e["score"]):
            if entry["category_id"] in self._class_numbers and entry.get("segmentation"):
                inside = coco_mask.decode(entry["segmentation"]).astype(bool)
                predicted[inside] = self._class_numbers[entry["category_id"]]
        counted = gt != IGNORED
        if not counted.any():
            return np.zeros((3, len(self.categories) + 1), dtype=np.int64)
        tp, fp, fn, _ = smp.metrics.get_stats(
            torch.from_numpy(predicted[counted])[None],
            torch.from_numpy(gt[counted])[None],
            mode="multiclass",
            num_classes=len(self.categories) + 1,
        )
        return torch.cat((tp, fp, fn)).numpy()

    def compute(self) -> dict[str, float]:
        """``mIoU`` over the classes that are in the data (not class 0), ``accuracy``, and ``IoU/<class>``.

        -1 for a class without a pixel in the data.
        """
        empty = np.zeros((3, len(self.categories) + 1), dtype=np.int64)
        tp, fp, fn = torch.from_numpy(sum(self.measured.values(), start=empty))[:, None]
        ious = smp.metrics.iou_score(tp, fp, fn, torch.zeros_like(tp), reduction=None)[0].tolist()
        in_data = ((tp + fn)[0] > 0).tolist()
        values = [iou if labelled else -1.0 for iou, labelled in zip(ious, in_data)][1:]
        known = [value for value in values if value >= 0]
        pixels = int((tp + fn).sum())
        return {
            "mIoU": float(np.mean(known)) if known else -1.0,
            "accuracy": int(tp.sum()) / pixels if pixels else -1.0,
            **{f"IoU/{category.name}": value for category, value in zip(self.categories, values)},
        }

    def table(self) -> str:
        """The figures over all classes, and one line per class."""
        figures = self.compute()
        rows = [["class", "IoU"], *([c.name, figure_text(figures[f"IoU/{c.name}"])] for c in self.categories)]
        lines = [
            f"Mean IoU of the classes = {figure_text(figures['mIoU'])}",
            f"Pixel accuracy = {figure_text(figures['accuracy'])}",
            "",
            *text_table(rows),
            *(printable(f"note: {note}") for note in self.notes),
        ]
        return "\n".join(lines)

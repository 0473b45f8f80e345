"""Mean IoU of classes over pixels, by segmentation-models-pytorch's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from pycocotools import mask as coco_mask

from mvision.evaluation.ground_truth import Truth
from mvision.evaluation.metric import Metric
from mvision.structures import Category

UNKNOWN = -1


class SemanticMetric(Metric):
    """Collects the regions of images and computes the IoU of every class over all pixels seen.

    Pixels of crowd regions and in the boxes of objects without a mask count for nothing. Where objects overlap, the
    smaller one is seen. Arguments, attributes and methods are those of ``CocoMetric``.
    """

    name = "semantic"

    def __init__(self, coco_dict: dict[str, Any], categories: Sequence[Category]) -> None:
        super().__init__(coco_dict, categories)
        self.truth = Truth(coco_dict, self.categories, "segm")
        self.notes = self.truth.notes
        self._numbers = {category.id: number for number, category in enumerate(self.categories, start=1)}
        self._objects: dict[int, list[dict[str, Any]]] = {}
        everything = self.truth.dataset(set(range(1, len(self.categories) + 1)))
        for annotation in everything["annotations"]:
            self._objects.setdefault(annotation["image_id"], []).append(annotation)
        self._sizes = {image["id"]: (image["height"], image["width"]) for image in everything["images"]}
        self.reset()

    def reset(self) -> None:
        """Forget all results."""
        self._counts: dict[Any, np.ndarray] = {}

    def update(self, results: Iterable[dict[str, Any]], image_ids: Iterable[Any]) -> None:
        """Add the regions of some images: entries with ``category_id`` and ``segmentation`` (run lengths)."""
        by_image: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
        for entry in results:
            by_image[entry["image_id"]].append(entry)
        for image_id, entries in by_image.items():
            if image_id not in self._counts:
                self._counts[image_id] = self._count(self.truth.image_numbers[image_id], entries)

    def state(self) -> dict[Any, Any]:
        """Everything added so far; see ``merge``."""
        return dict(self._counts)

    def merge(self, state: dict[Any, Any]) -> None:
        """Add what another process has collected; an image that is already here is not counted twice."""
        for image_id, counts in state.items():
            self._counts.setdefault(image_id, counts)

    def compute(self) -> dict[str, float]:
        """``mIoU`` over the classes that the data has (without "none of them"), ``accuracy``, ``IoU/<class>``.

        -1 for a class that no pixel of the data has.
        """
        total = np.sum(list(self._counts.values()), axis=0) if self._counts else np.zeros((3, len(self.categories) + 1))
        tp, fp, fn = (torch.from_numpy(row)[None] for row in total.astype(np.int64))
        ious = smp.metrics.iou_score(tp, fp, fn, torch.zeros_like(tp), reduction=None)[0].tolist()
        labelled = ((tp + fn)[0] > 0).tolist()
        seen = [iou for iou, known in zip(ious[1:], labelled[1:]) if known]
        pixels = int((tp + fn).sum())
        figures = {
            "mIoU": float(np.mean(seen)) if seen else -1.0,
            "accuracy": int(tp.sum()) / pixels if pixels else -1.0,
        }
        for category, iou, known in zip(self.categories, ious[1:], labelled[1:]):
            figures[f"IoU/{category.name}"] = iou if known else -1.0
        return figures

    def table(self) -> str:
        """The figures, one a line."""
        figures = self.compute()
        lines = [
            f"Mean IoU of the classes = {_shown(figures['mIoU'])}",
            f"Pixel accuracy = {_shown(figures['accuracy'])}",
        ]
        width = max([5, *(len(category.name) for category in self.categories)])
        lines += ["", f"{'class':<{width}}    IoU"]
        lines += [f"{c.name:<{width}}  {_shown(figures[f'IoU/{c.name}'])}" for c in self.categories]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _count(self, number: int, entries: list[dict[str, Any]]) -> np.ndarray:
        """(3, C + 1) true positive, false positive and false negative pixels of one image."""
        size = self._sizes[number]
        truth, found = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        # Crowds first: what is labelled in front of them counts.
        objects = sorted(self._objects.get(number, []), key=lambda a: (not a["iscrowd"], -a["area"]))
        for annotation in objects:
            inside = coco_mask.decode(annotation["segmentation"]).astype(bool)
            truth[inside] = UNKNOWN if annotation["iscrowd"] else annotation["category_id"]
        for entry in sorted(entries, key=lambda e: e["score"]):
            if entry["category_id"] in self._numbers and entry.get("segmentation"):
                found[coco_mask.decode(entry["segmentation"]).astype(bool)] = self._numbers[entry["category_id"]]
        known = truth != UNKNOWN
        if not known.any():
            return np.zeros((3, len(self.categories) + 1), dtype=np.int64)
        tp, fp, fn, _ = smp.metrics.get_stats(
            torch.from_numpy(found[known])[None],
            torch.from_numpy(truth[known])[None],
            mode="multiclass",
            num_classes=len(self.categories) + 1,
        )
        return torch.cat((tp, fp, fn)).numpy()


def _shown(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"

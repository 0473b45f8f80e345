"""The share of centres that are predicted in the right place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mvision.evaluation import Metric
from mvision.structures import Category

RADIUS = 0.1  # a prediction counts within this distance, as a fraction of the image's longer side


class CenterMetric(Metric):
    """``hit_rate``: labelled centres with a prediction of their class nearby, 0..1.

    Of an image's predictions of a class only as many count as there are objects of the class, those with the highest
    scores.
    """

    name = "centers"

    def __init__(self, annotations: dict[str, Any], categories: Sequence[Category]) -> None:
        super().__init__(annotations, categories)
        self.radius = {image["id"]: RADIUS * max(image["width"], image["height"]) for image in annotations["images"]}
        self.labelled: defaultdict[Any, list[tuple[int, complex]]] = defaultdict(list)
        for entry in annotations["annotations"]:
            if not entry["iscrowd"]:
                self.labelled[entry["image_id"]].append((entry["category_id"], _center(entry["bbox"])))

    def measure(self, image_id: Any, results: list[dict[str, Any]]) -> int:
        results = sorted(results, key=lambda entry: -entry["score"])
        return self._count_hits(image_id, [(entry["category_id"], _center(entry["bbox"])) for entry in results])

    def compute(self) -> dict[str, float]:
        total = sum(len(self.labelled[image]) for image in self.measured)
        return {"hit_rate": sum(self.measured.values()) / total if total else -1.0}

    def table(self) -> str:
        return f"centres with a prediction nearby: {self.compute()['hit_rate']:.3f}"

    def _count_hits(self, image: Any, predicted: list[tuple[int, complex]]) -> int:
        hits = 0
        for label in {label for label, _ in self.labelled[image]}:
            labelled = [center for other, center in self.labelled[image] if other == label]
            best = [center for other, center in predicted if other == label][: len(labelled)]
            hits += sum(any(abs(a - b) <= self.radius[image] for b in best) for a in labelled)
        return hits


def _center(box: Sequence[float]) -> complex:
    """The centre of a box (x, y, width, height), as x + y i: the distance of two is the absolute difference."""
    return complex(box[0] + box[2] / 2, box[1] + box[3] / 2)

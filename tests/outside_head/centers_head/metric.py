"""The share of centres that are predicted in the right place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
        self.reset()

    def reset(self) -> None:
        self.hits: dict[Any, int] = {}

    def update(self, results: Iterable[dict[str, Any]], image_ids: Iterable[Any]) -> None:
        of_image = defaultdict(list)
        for entry in sorted(results, key=lambda entry: -entry["score"]):
            of_image[entry["image_id"]].append((entry["category_id"], _center(entry["bbox"])))
        for image in image_ids:
            self.hits.setdefault(image, self._count_hits(image, of_image[image]))

    def state(self) -> dict[Any, Any]:
        return self.hits

    def merge(self, state: dict[Any, Any]) -> None:
        self.hits = {**state, **self.hits}

    def compute(self) -> dict[str, float]:
        total = sum(len(self.labelled[image]) for image in self.hits)
        return {"hit_rate": sum(self.hits.values()) / total if total else -1.0}

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

"""The interface of a metric: a head names one as its evaluator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from mvision.structures import Category


class Metric(ABC):
    """Measures results image by image and computes figures over all images that it has measured.

    Every process of an evaluation has a metric of its own; their measurements are merged before anything is computed.

    Args:
        annotations: of the split, in COCO's format, see ``mvision.data.CocoSplit.coco_dict``.
        categories: the classes that the head predicts. They are matched with the data's classes by name.

    Class attributes:
        name: stands before the figures of a metric that is reported besides a task's main one, as in ``bbox/AP``.

    Attributes:
        categories: the classes that are evaluated.
        notes: lines that a reader of the figures should know, such as classes left out.
        measured: image id -> what ``measure`` returned.
    """

    name: ClassVar[str]

    def __init__(self, annotations: dict[str, Any], categories: Sequence[Category]) -> None:
        self.categories = list(categories)
        self.notes: list[str] = []
        self.reset()

    @abstractmethod
    def measure(self, image_id: Any, results: list[dict[str, Any]]) -> Any:
        """What ``compute`` needs of one image; it is sent between processes, so it should be small.

        Args:
            results: of this image, entries in COCO's result format (``Instances.to_coco``).

        Raises:
            ValueError: the annotations have no such image.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures by name. -1 stands for "the data has no such object"."""

    @abstractmethod
    def table(self) -> str:
        """The figures as text for a terminal."""

    def reset(self) -> None:
        """Forget all images, to start a new evaluation on the same annotations."""
        self.measured: dict[Any, Any] = {}
        self._computed: Any = None  # for subclasses: computed from all measurements, cleared when there are more

    def update(self, results: Iterable[dict[str, Any]], image_ids: Iterable[Any]) -> None:
        """Measure the results of some images.

        Args:
            results: entries in COCO's result format (``Instances.to_coco``).
            image_ids: all images that the model was run on, also those without results. One that was measured before
                is not counted twice: with several processes, the last batch is filled up with repeated images.

        Raises:
            ValueError: a result's image is not in ``image_ids``, or an image is not in the annotations.
        """
        by_image: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
        for entry in results:
            if entry["image_id"] not in by_image:
                raise ValueError(f"a result belongs to image id {entry['image_id']!r}, which is not in image_ids")
            by_image[entry["image_id"]].append(entry)
        self.merge({i: self.measure(i, entries) for i, entries in by_image.items() if i not in self.measured})

    def merge(self, measured: dict[Any, Any]) -> None:
        """Add the measurements of another process; an image that is already here is not counted twice."""
        self.measured = {**measured, **self.measured}
        self._computed = None

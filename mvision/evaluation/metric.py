"""The interface of a metric: what a head names as its evaluator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from mvision.structures import Category


class Metric(ABC):
    """Collects results image by image and computes figures over the images that it has seen.

    Class attributes:
        name: stands before the figures of a metric that is reported beside a task's main one, as in ``bbox/AP``.

    Attributes:
        categories: the classes that are evaluated.
        notes: lines that a reader of the figures should know, such as classes left out.
    """

    name: ClassVar[str]
    notes: list[str]

    def __init__(self, annotations: dict[str, Any], categories: Sequence[Category]) -> None:
        """Prepare an evaluation.

        Args:
            annotations: of the split, in COCO's format, see ``mvision.data.CocoSplit.coco_dict``.
            categories: the classes that the head finds. They meet those of the data by name.
        """
        self.categories = list(categories)
        self.notes = []

    @abstractmethod
    def reset(self) -> None:
        """Forget all results, to start a new evaluation on the same annotations."""

    @abstractmethod
    def update(self, results: Iterable[dict[str, Any]], image_ids: Iterable[Any]) -> None:
        """Add the results of some images.

        Args:
            results: entries in COCO's result format (``Instances.to_coco``).
            image_ids: every image that was looked at, those without results too. One that was added before is not
                counted twice: the last batch of several processes is filled up with repetitions.
        """

    @abstractmethod
    def state(self) -> dict[Any, Any]:
        """Everything added so far, small enough to send to another process; see ``merge``."""

    @abstractmethod
    def merge(self, state: dict[Any, Any]) -> None:
        """Add what another process has collected; an image that is already here is not counted twice."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures by name. -1 stands for "no such object in the data"."""

    @abstractmethod
    def table(self) -> str:
        """The figures for a terminal."""

"""Which of a model's predictions a user gets: by score, by class, with one class or several of a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torchvision.ops import nms

from mvision.errors import UserError, did_you_mean
from mvision.structures import Category, Instances

Threshold = float | Mapping[str, float]
"""The lowest score that is kept, 0..1: of all classes, or by class name, where ``OTHERS`` stands for the rest."""
OTHERS = "*"
DEFAULT_THRESHOLD = 0.5  # also of the classes that a mapping without ``OTHERS`` does not name
BEST = "best"
AskedThreshold = Threshold | str | Mapping[str, float | str]
"""A threshold, or ``BEST`` in its place or in that of ``OTHERS``: of every class the one with the largest F1."""


class HasBestThresholds(Protocol):
    """What is read of a model."""

    @property
    def best_thresholds(self) -> dict[str, float]:
        """The thresholds of its classes with the largest F1 on validation images; empty if they are not known."""


def wants_best(asked: AskedThreshold | None) -> bool:
    """Whether ``BEST`` is asked for."""
    return (asked.get(OTHERS) if isinstance(asked, Mapping) else asked) == BEST


def without_best(asked: AskedThreshold | None) -> Threshold:
    """What can be checked before there is a model: numbers, with ``DEFAULT_THRESHOLD`` in place of ``BEST`` and None.

    Raises:
        UserError: another word stands in place of a number.
    """
    if asked is None:
        return DEFAULT_THRESHOLD
    numbers: dict[str, float] = {}
    for name, value in (asked if isinstance(asked, Mapping) else {OTHERS: asked}).items():
        if isinstance(value, str) and (value != BEST or name != OTHERS):
            raise UserError(f"threshold '{value}': give a number from 0 to 1, one for each class, or '{BEST}' for all")
        numbers[name] = DEFAULT_THRESHOLD if isinstance(value, str) else value
    return numbers if isinstance(asked, Mapping) else numbers[OTHERS]


def resolve_threshold(asked: AskedThreshold | None, model: HasBestThresholds) -> Threshold:
    """Numbers in place of ``BEST``: those in the model's weights. Classes without one get ``DEFAULT_THRESHOLD``, as
    all do where nothing was asked for.

    Raises:
        UserError: the weights have none, or another word stands in place of a number.
    """
    numbers = without_best(asked)
    if not wants_best(asked):
        return numbers
    if not model.best_thresholds:
        raise UserError(
            f"threshold '{BEST}': these weights have none; a training writes them at its end, and mvision val "
            "--write-thresholds into the weights of an earlier one (for boxes, masks and poses)"
        )
    return {**model.best_thresholds, **(numbers if isinstance(numbers, Mapping) else {OTHERS: numbers})}


@dataclass(frozen=True)
class Selection:
    """Which predictions are kept.

    Attributes:
        threshold: the lowest score.
        multi_label: a query (keypoints: a grid point) may give several results, one for each class above the threshold.
            Without it only its best class counts, so that an object is not reported twice under two names.
        nms: of two results whose boxes have a larger IoU than this (0..1), whatever their classes, the better one is
            kept; None keeps both.
    """

    threshold: Threshold = DEFAULT_THRESHOLD
    multi_label: bool = False
    nms: float | None = None

    def __post_init__(self) -> None:
        """Raise a ``UserError`` for a threshold or IoU outside 0..1."""
        given = self.threshold if isinstance(self.threshold, Mapping) else {OTHERS: self.threshold}
        for name, value in given.items():
            if not 0 <= value <= 1:
                where = "" if name == OTHERS else f" of class '{name}'"
                raise UserError(f"threshold {value}{where}: has to be between 0 and 1")
        if self.nms is not None and not 0 < self.nms <= 1:
            raise UserError(f"nms {self.nms}: an IoU above 0 and up to 1 is needed")

    def check(self, categories: Sequence[Category]) -> None:
        """Raise a ``UserError`` for a threshold of a class that the model does not have."""
        names = [category.name for category in categories]
        for name in self.threshold if isinstance(self.threshold, Mapping) else ():
            if name not in names and name != OTHERS:
                raise UserError(
                    f"threshold of class '{name}': the model has no such class; {did_you_mean(name, names)}"
                )

    @property
    def lowest(self) -> float:
        """The threshold below which no class is kept."""
        if not isinstance(self.threshold, Mapping):
            return self.threshold
        return min({OTHERS: DEFAULT_THRESHOLD, **self.threshold}.values())

    def of_each(self, instances: Instances) -> np.ndarray:
        """(N,) the threshold of every instance's class."""
        given = self.threshold
        if not isinstance(given, Mapping):
            return np.full(len(instances), given)
        others = given.get(OTHERS, DEFAULT_THRESHOLD)
        return np.array([given.get(name, others) for name in instances.names])[instances.labels]

    def above(self, instances: Instances) -> Instances:
        """Those that reach the threshold of their class; ``lowest`` has been applied already."""
        if not isinstance(self.threshold, Mapping) or not len(instances):
            return instances
        # In float32, as the heads compare: 0.3 as float64 is above a score that is printed as 0.3.
        return instances.filter(instances.scores >= self.of_each(instances).astype(np.float32))

    def reached(self, instances: Instances) -> Instances:
        """Those that reach the threshold of their class, of instances with any score."""
        return instances.filter(instances.scores >= self.of_each(instances).astype(np.float32))

    def without_overlaps(self, instances: Instances) -> Instances:
        """The instances, sorted by falling score, without those that ``nms`` leaves out."""
        if self.nms is None or len(instances) < 2:
            return instances
        boxes, scores = torch.from_numpy(instances.boxes), torch.from_numpy(instances.scores)
        return instances.filter(np.sort(nms(boxes.float(), scores.float(), self.nms).numpy()))

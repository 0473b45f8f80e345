"""Which numbers of two pose models belong to points of the same name, where poses come from queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvision.heads.poses.settings import PoseConfig
from mvision.structures import Category
from mvision.structures.coco_names import canonical

if TYPE_CHECKING:
    from mvision.model import Model

# Tensors of the decoder with numbers for each point: name -> axis.
_AXES = {
    r"point_tokens$|point_label_embed$": 0,
    r"memory_points\.layers\.3\.(weight|bias)$": 0,
    r"quality_heads\.\d+\.layers\.0\.weight$": 1,
}


@dataclass(frozen=True)
class PointRows:
    """How the points of a tensor correspond in two models: each has the same number of rows (or columns) there.

    Attributes:
        axis: along which they are.
        matches: point in the model -> point in the other model, for points with the same name.
        count, other_count: points of both models.
    """

    axis: int
    matches: dict[int, int]
    count: int
    other_count: int

    def fits(self, target: Tensor, other: Tensor) -> bool:
        """Whether ``other`` can be copied into ``target``."""
        if target.ndim != other.ndim or not self.other_count or other.shape[self.axis] % self.other_count:
            return False
        one, other_one = (x.movedim(self.axis, 0) for x in (target, other))
        same = one.shape[1:] == other_one.shape[1:]
        return same and len(one) // self.count == len(other_one) // self.other_count

    def copy(self, target: Tensor, other: Tensor) -> None:
        """Copy the points with the same name, in place; others become the mean of all points of ``other``."""
        to = target.movedim(self.axis, 0).unflatten(0, (self.count, -1))
        of = other.movedim(self.axis, 0).unflatten(0, (self.other_count, -1))
        to[:] = of.to(torch.float64).mean(0).to(to)
        for point, other_point in self.matches.items():
            to[point] = of[other_point]


def point_rows(model: Model, others: Sequence[Category]) -> dict[str, PointRows]:
    """For the tensors of ``model`` with numbers for each point, how these correspond to those of another model.

    Args:
        others: the classes of the other model.
    """
    found = {}
    for task in model.heads:
        head = model.head(task)
        if not isinstance(head.config, PoseConfig):
            continue
        own, other = _names(head.classes), _names(head.predicted(list(others)))
        places = {name: index for index, name in enumerate(other)}
        matches = {index: places[name] for index, name in enumerate(own) if name in places}
        for inner in head.state_dict():
            axis = next((axis for pattern, axis in _AXES.items() if re.search(pattern, inner)), None)
            if axis is not None:
                found[f"heads.{task}.{inner}"] = PointRows(axis, matches, len(own), len(other))
    return found


def describe_points(model: Model, others: Sequence[Category], rows: dict[str, PointRows]) -> str | None:
    """A text on the points that have another number or other names; None where all have the same names."""
    if not rows or not next(iter(rows.values())).other_count:
        return None
    some = next(iter(rows.values()))
    if len(some.matches) == some.count:
        return None
    task = next(iter(rows)).split(".")[1]
    names = [name for index, name in enumerate(_names(model.head(task).classes)) if index not in some.matches]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{len(some.matches)} of {some.count} points matched by name (not in these weights: {shown}), the others start "
        "from the mean of the points of these weights"
    )


def _names(classes: Sequence[Category]) -> list[str]:
    """The names of the points of the class that has most, in one spelling."""
    return [canonical(name) for name in max((category.keypoints for category in classes), key=len, default=[])]

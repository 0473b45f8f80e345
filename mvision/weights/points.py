"""Which numbers of two pose models belong to points of the same name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvision.heads.keypoints.settings import KeypointSettings
from mvision.heads.poses.settings import PoseConfig
from mvision.structures import Category
from mvision.structures.coco_names import canonical

if TYPE_CHECKING:
    from mvision.model import Model

# Tensors with numbers for each point: name -> axis, and how many numbers a point has in each of the blocks that follow
# on one another along it; the first ones are of poses from queries, the last ones of dense heads.
_PLACES: dict[str, tuple[int, tuple[int, ...]]] = {
    r"point_tokens$|point_label_embed$": (0, ()),
    r"memory_points\.layers\.3\.(weight|bias)$": (0, ()),
    r"quality_heads\.\d+\.layers\.0\.weight$": (1, ()),
    r"^(one|many)\.points\.(weight|bias)$": (0, (2, 1)),
    r"^maps\.embed\.(weight|bias)$": (0, ()),
}


@dataclass(frozen=True)
class PointRows:
    """How the points of a tensor correspond in two models: each has the same number of rows (or columns) there.

    Attributes:
        axis: along which they are.
        blocks: numbers of a point in each block of all points; empty: there is one block, and as many as there are.
        matches: point in the model -> point in the other model, for points with the same name.
        count, other_count: points of both models.
    """

    axis: int
    blocks: tuple[int, ...]
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
        for to, of in zip(self._by_point(target, self.count), self._by_point(other, self.other_count)):
            to[:] = of.to(torch.float64).mean(0).to(to)
            for point, other_point in self.matches.items():
                to[point] = of[other_point]

    def _by_point(self, tensor: Tensor, count: int) -> list[Tensor]:
        """Views of the blocks, (count, numbers of a point, ...) each."""
        rows = tensor.movedim(self.axis, 0)
        blocks = self.blocks or (len(rows) // count,)
        return [part.unflatten(0, (count, -1)) for part in rows.split([count * numbers for numbers in blocks])]


def point_rows(model: Model, others: Sequence[Category]) -> dict[str, PointRows]:
    """For the tensors of ``model`` with numbers for each point, how these correspond to those of another model.

    Args:
        others: the classes of the other model.
    """
    found = {}
    for task in model.heads:
        head = model.head(task)
        if not isinstance(head.config, PoseConfig | KeypointSettings):
            continue
        own, other = _names(head.classes), _names(head.predicted(list(others)))
        places = {name: index for index, name in enumerate(other)}
        matches = {index: places[name] for index, name in enumerate(own) if name in places}
        for inner in head.state_dict():
            place = next((place for pattern, place in _PLACES.items() if re.search(pattern, inner)), None)
            if place is not None:
                found[f"heads.{task}.{inner}"] = PointRows(*place, matches, len(own), len(other))
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

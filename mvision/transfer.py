"""Starting a model from the weights of another one: what fits is taken, classes are matched by their names.

A different backbone, another task or other classes are no obstacle to what the two models have in common.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvision.coco_names import canonical
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.structures import Category

if TYPE_CHECKING:
    from mvision.config import ModelConfig
    from mvision.model import Model

# Not learned: they follow the backbone's weights, or count batches.
_NOT_COUNTED = ("backbone.mean", "backbone.std", "num_batches_tracked")


@torch.no_grad()
def transfer(model: Model, config: ModelConfig, tensors: dict[str, Tensor], source: str) -> str:
    """Copy into ``model`` every tensor that fits, and say in one line which parts were taken and what is new.

    Args:
        config, tensors: the description and the state dict of the other model.
        source: what errors call it.

    A head without a counterpart in ``tensors`` takes from the heads of other tasks what has the same name inside the
    head and the same shape. In layers with one row per class, the rows of classes with the same name are copied; the
    other rows stay as they are. With the backbone's weights goes the normalisation that they were trained with.

    Raises:
        UserError: nothing fits.
    """
    per_class = _rows_per_class(model)
    rows = _matching_rows(model.categories, config.categories)
    taken: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, target in model.state_dict().items():
        part = ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
        counted = not name.endswith(_NOT_COUNTED)
        total[part] += counted
        found = _counterpart(name, tensors)
        if name.startswith(("backbone.mean", "backbone.std")) or found is None:
            continue
        if name in per_class:
            fits = _copy_rows(target, found, rows, len(model.categories), len(config.categories))
        else:
            fits = target.shape == found.shape
            if fits:
                target.copy_(found)
        taken[part] += counted and fits
    if not sum(taken.values()):
        raise UserError(
            f"weights {source}: nothing in them fits: they have backbone {config.backbone.name} and embed_dim "
            f"{config.neck.embed_dim}, this model has {model.config.backbone.name} and {model.config.neck.embed_dim}"
        )
    if taken["backbone"]:
        model.backbone.set_normalization(tensors.get("backbone.mean"), tensors.get("backbone.std"))
    return _describe(taken, total, model.categories, rows)


def _counterpart(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """The tensor of this name, or for a head's tensor the one of the same name in another task's head."""
    if name in tensors or not name.startswith("heads."):
        return tensors.get(name)
    _, task, inner = name.split(".", 2)
    own = f"heads.{task}."
    if any(other.startswith(own) for other in tensors):
        return None
    ending = f".{inner}"
    return next((value for other, value in tensors.items() if _is_inner(other, ending)), None)


def _is_inner(name: str, ending: str) -> bool:
    return name.startswith("heads.") and name.endswith(ending) and name.count(".") == ending.count(".") + 1


def _matching_rows(targets: list[Category], sources: list[Category]) -> dict[int, int]:
    """For classes with a namesake: index there by index here."""
    known = {canonical(category.name): index for index, category in enumerate(sources)}
    return {
        index: known[canonical(category.name)]
        for index, category in enumerate(targets)
        if canonical(category.name) in known
    }


def _rows_per_class(model: Model) -> set[str]:
    """Names of the tensors whose first dimension grows with the number of classes."""
    more = [*model.categories, Category(id=-1, name="one more")]
    names = set()
    channels, strides = [model.config.neck.embed_dim] * len(model.neck.strides), model.neck.strides
    for task, settings in model.config.heads.items():
        with torch.device("meta"):
            larger = head_class(task)(settings, channels, strides, more).state_dict()
        for inner, tensor in model.head(task).state_dict().items():
            if larger[inner].shape[:1] != tensor.shape[:1]:
                names.add(f"heads.{task}.{inner}")
    return names


def _copy_rows(target: Tensor, source: Tensor, rows: dict[int, int], here: int, there: int) -> bool:
    """Copy the rows of known classes, and the rows behind the classes (padding); False where shapes do not fit."""
    extra = len(target) - here
    if target.shape[1:] != source.shape[1:] or len(source) - there != extra:
        return False
    for index, other in rows.items():
        target[index] = source[other]
    for index in range(extra):
        target[here + index] = source[there + index]
    return bool(rows)


def _describe(taken: Counter[str], total: Counter[str], categories: list[Category], rows: dict[int, int]) -> str:
    parts = []
    for part, count in total.items():
        name = part.replace("heads.", "head ")
        if taken[part] == count:
            parts.append(f"{name} taken")
        else:
            parts.append(f"{name} {taken[part]} of {count} tensors" if taken[part] else f"{name} new")
    if any(part.startswith("heads.") and taken[part] for part in total):
        new = [category.name for index, category in enumerate(categories) if index not in rows]
        named = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
        classes = f"{len(rows)} of {len(categories)} classes known by name"
        parts.append(f"{classes} (new: {named})" if new else classes)
    return "; ".join(parts)

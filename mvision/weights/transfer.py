"""Starting a model from the weights of another one: what fits is taken, classes are matched by their names.

A different backbone, another task or other classes are no obstacle to what the two models have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.coco_names import canonical

if TYPE_CHECKING:
    from mvision.config import ModelConfig
    from mvision.model import Model


@torch.no_grad()
def transfer(
    model: Model,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    source: str,
    parts: Collection[str] | None = None,
) -> str:
    """Copy into ``model`` every tensor that fits, and say in one line which parts were taken and what is new.

    Args:
        config, tensors: the description and the state dict of the other model.
        source: what errors call it.
        parts: only these parts of the model, of ``backbone``, ``neck`` and ``heads.TASK``; None: all of it.

    A head without a counterpart in ``tensors`` takes from the heads of other tasks what has the same name inside the
    head and the same shape. In layers with one row per class, the rows of classes with the same name are copied; the
    other rows stay as they are. With the backbone's weights goes the normalisation that they were trained with.

    Raises:
        UserError: nothing fits.
    """
    rows = _matching_rows(model.categories, config.categories)
    fit = _Fit(_rows_per_class(model, config.categories))
    # Layers by part of the model (backbone, neck, heads.TASK) and the module right below it.
    taken: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for module, members in _by_module(model.state_dict()).items():
        part = ".".join(module.split(".")[: 2 if module.startswith("heads.") else 1])
        pairs = {name: (target, _counterpart(name, tensors)) for name, target in members.items()}
        # All of a layer or nothing: a bias without its weights is no use, and the counters of norms may be absent.
        fits = (parts is None or part in parts) and all(
            fit(name, *pair) for name, pair in pairs.items() if not name.endswith("num_batches_tracked")
        )
        place = part, module.removeprefix(f"{part}.").partition(".")[0]
        total[place] += 1
        taken[place] += fits
        for name, (target, found) in pairs.items() if fits else ():
            if found is not None:
                fit.copy(name, target, found)
    if not sum(taken.values()):
        raise UserError(
            f"weights {source}: nothing in them fits: they have backbone {config.backbone.name} and embed_dim "
            f"{config.neck.embed_dim}, this model has {model.config.backbone.name} and {model.config.neck.embed_dim}"
        )
    if any(taken[place] for place in total if place[0] == "backbone"):
        model.backbone.set_normalization(tensors.get("backbone.mean"), tensors.get("backbone.std"))
    return _describe(taken, total, model.categories, rows)


@dataclass(frozen=True)
class _Rows:
    """The classes of a head here and there: ``pairs`` has for those known there the index there by the index here."""

    pairs: dict[int, int]
    here: int
    there: int


@dataclass(frozen=True)
class _Fit:
    """Whether a tensor can be taken over, and how.

    Attributes:
        per_class: the tensors that have one row per class (and possibly more behind them, for padding), by name.
    """

    per_class: dict[str, _Rows]

    def __call__(self, name: str, target: Tensor, found: Tensor | None) -> bool:
        if found is None:
            return False
        if name not in self.per_class:
            return target.shape == found.shape
        rows = self.per_class[name]
        same_padding = len(target) - rows.here == len(found) - rows.there
        return target.shape[1:] == found.shape[1:] and same_padding and bool(rows.pairs)

    def copy(self, name: str, target: Tensor, found: Tensor) -> None:
        """Into ``target``, in place."""
        if name not in self.per_class:
            target.copy_(found)
            return
        rows = self.per_class[name]
        for index, other in rows.pairs.items():
            target[index] = found[other]
        target[rows.here :] = found[rows.there :].to(target)


def _by_module(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the name of their module; without the normalisation, which goes with the backbone as a whole."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name not in ("backbone.mean", "backbone.std"):
            modules.setdefault(name.rpartition(".")[0], {})[name] = tensor
    return modules


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


def _rows_per_class(model: Model, sources: list[Category]) -> dict[str, _Rows]:
    """The tensors whose first dimension grows with the number of classes that their head finds."""
    # A class that every head finds, with no more points than others have: widths that grow with those stay as they are.
    points = max((category.keypoints for category in model.categories), key=len, default=[])
    more = [*model.categories, Category(id=-1, name="one more", keypoints=points)]
    per_class = {}
    for task in model.heads:
        head = model.head(task)
        here, there = head.classes, head.predicted(sources)
        rows = _Rows(_matching_rows(here, there), len(here), len(there))
        try:
            with torch.device("meta"):
                larger = model.new_head(task, more).state_dict()
        except UserError:
            continue  # a head that is made for one class alone has no rows per class
        for inner, tensor in head.state_dict().items():
            if larger[inner].shape[:1] != tensor.shape[:1]:
                per_class[f"heads.{task}.{inner}"] = rows
    return per_class


def _describe(
    taken: Counter[tuple[str, str]], total: Counter[tuple[str, str]], categories: list[Category], rows: dict[int, int]
) -> str:
    parts, heads_taken = [], False
    for part in dict.fromkeys(part for part, _ in total):
        counts = {place[1]: (taken[place], total[place]) for place in total if place[0] == part}
        found, count = (sum(column) for column in zip(*counts.values()))
        heads_taken = heads_taken or (part.startswith("heads.") and found > 0)
        name = part.replace("heads.", "head ")
        new = sorted(inner for inner, (some, _) in counts.items() if not some)
        more = f" (new: {', '.join(new)})" if new else ""
        taken_or_new = "taken" if found == count else f"{found} of {count} layers{more}" if found else "new"
        parts.append(f"{name} {taken_or_new}")
    if heads_taken:
        new = [category.name for index, category in enumerate(categories) if index not in rows]
        named = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
        classes = f"{len(rows)} of {len(categories)} classes known by name"
        parts.append(f"{classes} (new: {named})" if new else classes)
    return "; ".join(parts)

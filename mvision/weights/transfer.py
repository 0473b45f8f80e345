"""Initialising a model from the weights of another one: tensors that fit are copied, classes are matched by name.

The two models may have different backbones, tasks and classes; what they have in common is copied.
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
from mvision.weights.points import PointRows, describe_points, point_rows

if TYPE_CHECKING:
    from mvision.config import ModelConfig
    from mvision.model import Model

Place = tuple[str, str]
"""A part of the model (``backbone``, ``neck``, ``heads.TASK``) and the name of a module directly inside it."""


@dataclass(frozen=True)
class HeadStart:
    """What a head took over from other weights.

    Attributes:
        loaded, layers: how many of its layers were loaded, and how many it has.
        known, classes: how many of its classes were taken over by their names, and how many it has.
    """

    loaded: int
    layers: int
    known: int
    classes: int


@dataclass(frozen=True)
class Transferred:
    """What a model took over from other weights.

    Attributes:
        text: a line that says it: which parts were loaded, and which keep the weights that they had.
        shares: of ``backbone`` and ``neck``, the share of the layers that were loaded, 0..1.
        heads: by the task that the head is named after.
    """

    text: str
    shares: dict[str, float]
    heads: dict[str, HeadStart]


@torch.no_grad()
def transfer(
    model: Model,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    source: str,
    parts: Collection[str] | None = None,
) -> Transferred:
    """Copy every tensor that fits into ``model``, in place.

    A head whose task is not in ``tensors`` gets the tensors with the same name inside a head and the same shape from
    the heads of other tasks. In layers with one row per class, the rows of classes with the same name are copied, and
    the other rows become the mean of all rows of the other model: what its classes have in common, among it how rare
    objects are. The same holds for the points of poses. The mean and std of the images go with the weights
    of the backbone.

    Args:
        config, tensors: the description and the state dict of the other model.
        source: name of the weights in error messages.
        parts: copy only these parts of the model, of ``backbone``, ``neck`` and ``heads.TASK``; None: all.

    Raises:
        UserError: nothing fits.
    """
    class_rows = _class_rows(model, config.categories)
    points = point_rows(model, config.categories)
    rows: dict[str, _ClassRows | PointRows] = {**class_rows, **points}
    taken: set[str] = set()  # layers
    loaded: Counter[Place] = Counter()
    total: Counter[Place] = Counter()
    for layer, targets in _by_layer(model.state_dict()).items():
        place = _place(layer)
        part = place[0]
        pairs = {name: (target, _counterpart(name, tensors)) for name, target in targets.items()}
        # A layer is copied as a whole or not at all: a bias is of no use without its weights. Published weights with
        # frozen norms have no counters of batches.
        fits = (parts is None or part in parts) and all(
            _fits(*pair, rows.get(name)) for name, pair in pairs.items() if not name.endswith("num_batches_tracked")
        )
        total[place] += 1
        loaded[place] += fits
        taken |= {layer} if fits else set()
        for name, (target, other) in pairs.items() if fits else ():
            if other is not None:
                _copy(target, other, rows.get(name))
    if not loaded.total():
        raise UserError(
            f"weights {source}: nothing in them fits: they have backbone {config.backbone.name} and embed_dim "
            f"{config.neck.embed_dim}, this model has {model.config.backbone.name} and {model.config.neck.embed_dim}"
        )
    if any(loaded[place] for place in total if place[0] == "backbone"):
        model.backbone.set_normalization(tensors.get("backbone.mean"), tensors.get("backbone.std"))
    has_mean = any(loaded[_place(name)] for name in class_rows)
    of_points = describe_points(model, config.categories, {n: x for n, x in points.items() if loaded[_place(n)]})
    classes = _classes_of(model, {place[0] for place, count in loaded.items() if count})
    matches = _match_classes(classes, config.categories)
    text = "; ".join(filter(None, [_describe(loaded, total, classes, matches, has_mean), of_points]))
    heads = {task: _head_start(model, task, config, class_rows, taken) for task in model.heads}
    return Transferred(text, {part: _share(loaded, total, part) for part in ("backbone", "neck")}, heads)


def _share(loaded: Counter[Place], total: Counter[Place], part: str) -> float:
    """The share of the layers of a part that were loaded."""
    places = [place for place in total if place[0] == part]
    return sum(loaded[place] for place in places) / max(1, sum(total[place] for place in places))


@dataclass(frozen=True)
class _ClassRows:
    """How the rows of a tensor with one row per class correspond in two models.

    Attributes:
        matches: row in the model -> row in the other model, for classes with the same name.
        count, other_count: classes of the head in the model and in the other one. Rows after these are padding.
    """

    matches: dict[int, int]
    count: int
    other_count: int


def _head_start(
    model: Model, task: str, config: ModelConfig, class_rows: dict[str, _ClassRows], taken: set[str]
) -> HeadStart:
    """What a head took over; ``taken``: the layers of the model that were loaded."""
    head, prefix = model.head(task), f"heads.{task}."
    layers = {layer for layer in _by_layer(model.state_dict()) if layer.startswith(prefix)}
    of_classes = {name.rpartition(".")[0] for name in class_rows if name.startswith(prefix)}
    matches = _match_classes(head.classes, head.predicted(config.categories))
    known = len(matches) if (of_classes or layers) & taken else 0
    return HeadStart(len(layers & taken), len(layers), known, len(head.classes))


def _place(name: str) -> Place:
    part = ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
    return part, name.removeprefix(f"{part}.").partition(".")[0]


def _fits(target: Tensor, other: Tensor | None, rows: _ClassRows | PointRows | None) -> bool:
    """Whether ``other`` can be copied into ``target``; ``rows`` is None for tensors without rows per class or point."""
    if other is None:
        return False
    if isinstance(rows, PointRows):
        return rows.fits(target, other)
    if rows is None:
        return target.shape == other.shape
    same_padding = len(target) - rows.count == len(other) - rows.other_count
    return target.shape[1:] == other.shape[1:] and same_padding and rows.other_count > 0


def _copy(target: Tensor, other: Tensor, rows: _ClassRows | PointRows | None) -> None:
    """Copy ``other`` into ``target``, in place."""
    if isinstance(rows, PointRows):
        rows.copy(target, other)
        return
    if rows is None:
        target.copy_(other)
        return
    if len(rows.matches) < rows.count:
        target[: rows.count] = other[: rows.other_count].to(torch.float64).mean(0).to(target)
    for row, other_row in rows.matches.items():
        target[row] = other[other_row]
    target[rows.count :] = other[rows.other_count :].to(target)


def _by_layer(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by the module that holds them, without the mean and std of images."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name not in ("backbone.mean", "backbone.std"):
            layers.setdefault(name.rpartition(".")[0], {})[name] = tensor
    return layers


def _counterpart(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """The tensor of this name; for a head that ``tensors`` lack, the one of the same name inside another head."""
    if name in tensors or not name.startswith("heads."):
        return tensors.get(name)
    _, task, inner = name.split(".", 2)
    if any(other.startswith(f"heads.{task}.") for other in tensors):
        return None
    return next(
        (tensor for other, tensor in tensors.items() if other.startswith("heads.") and other.split(".", 2)[2] == inner),
        None,
    )


def _match_classes(categories: list[Category], others: list[Category]) -> dict[int, int]:
    """Index in ``categories`` -> index in ``others``, for classes that both have (in any spelling).

    A class with several names, as Objects365's "monitor/tv", is the class of each of them, unless there is another one
    with just that name.
    """
    found: dict[int, int] = {}
    by_name = {canonical(category.name): index for index, category in enumerate(others)}
    of_several = {
        canonical(name): index for index, category in enumerate(others) for name in category.name.split("/")
    } | by_name
    for index, category in enumerate(categories):
        names = [canonical(category.name), *map(canonical, category.name.split("/"))]
        match = next((of_several[name] for name in names if name in of_several), None)
        if match is not None:
            found[index] = match
    return found


def _class_rows(model: Model, others: list[Category]) -> dict[str, _ClassRows]:
    """For tensors of the heads whose number of rows depends on the number of classes: how their rows correspond.

    Which tensors these are is found by building each head once more, with one class added.
    """
    # The added class has the keypoints of the class with most, so that no size that depends on keypoints changes.
    points = max((category.keypoints for category in model.categories), key=len, default=[])
    more = [*model.categories, Category(id=-1, name="one more", keypoints=points)]
    class_rows = {}
    for task in model.heads:
        head = model.head(task)
        own, other = head.classes, head.predicted(others)
        rows = _ClassRows(_match_classes(own, other), len(own), len(other))
        try:
            with torch.device("meta"):
                larger = model.new_head(task, more).state_dict()
        except UserError:
            continue  # this head allows one class only
        for inner, tensor in head.state_dict().items():
            if larger[inner].shape[:1] != tensor.shape[:1]:
                class_rows[f"heads.{task}.{inner}"] = rows
    return class_rows


def _classes_of(model: Model, parts: Collection[str]) -> list[Category]:
    """The classes that some head among these parts predicts, in the order of the model: of poses those with points."""
    heads = [model.head(task) for task in model.heads if f"heads.{task}" in parts]
    names = {category.name for head in heads for category in head.classes}
    return [category for category in model.categories if category.name in names]


def _describe(
    loaded: Counter[Place], total: Counter[Place], categories: list[Category], matches: dict[int, int], has_mean: bool
) -> str:
    """What was loaded of every part, and, if that is a head, for which classes.

    Args:
        categories: of the heads that are loaded.
        matches: see ``_match_classes``.
        has_mean: classes without a match got the mean of the others.
    """
    texts, any_head = [], False
    for part in dict.fromkeys(part for part, _ in total):
        modules = {place[1]: (loaded[place], total[place]) for place in total if place[0] == part}
        count, of_all = (sum(column) for column in zip(*modules.values()))
        any_head = any_head or (part.startswith("heads.") and count > 0)
        name = part.replace("heads.", "head ")
        if count in (0, of_all):
            texts.append(f"{name} loaded" if count else f"{name} not loaded")
            continue
        left_out = sorted(module for module, (some, _) in modules.items() if not some)
        detail = f", not {', '.join(left_out)}" if left_out else ""
        texts.append(f"{name} loaded in part ({count} of {of_all} layers{detail})")
    if any_head:
        unmatched = [category.name for index, category in enumerate(categories) if index not in matches]
        names = ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
        detail = f" (not in these weights: {names})" if unmatched else ""
        texts.append(f"{len(matches)} of {len(categories)} classes matched by name{detail}")
        if unmatched and has_mean:
            texts.append(f"{len(unmatched)} start from the mean of the classes of these weights")
    return "; ".join(texts)

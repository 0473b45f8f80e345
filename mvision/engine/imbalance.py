"""What a run does for rare classes: weights of classes in the losses, and images that are shown more often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from mvision.config import Config
from mvision.data.loading.repeats import Repeats, repeat_factors
from mvision.data.loading.sources import DataSource
from mvision.data.loading.tiles import TiledDataset
from mvision.errors import UserError, did_you_mean
from mvision.heads import serving_task
from mvision.model import Model

NAMED = 12  # classes in a line; of more, the first and the last ones
HEAVY = 20.0  # weight of a class above which a run warns


def plan_repeats(
    config: Config, sources: Sequence[DataSource], model: Model, log: Callable[[str], None]
) -> Repeats | None:
    """How often the images are shown, where ``data.repeat_threshold`` is set; a line says what it comes to."""
    threshold = config.data.repeat_threshold
    if not threshold:
        return None
    repeats = repeat_factors(sources, threshold, {c.name for task in model.heads for c in model.head(task).classes})
    if not repeats.of_classes:
        log(f"repeat factors: none, as every class is in {threshold:g} of the images or more (data.repeat_threshold)")
        return repeats
    entries = [
        f"{name} x {factor:.2f} (in {share:.3g} of the images)" for name, (share, factor) in repeats.of_classes.items()
    ]
    log(f"repeat factors: {_some(entries)}; an epoch shows {repeats.shown} images in place of {repeats.images}")
    return repeats


def weigh_classes(
    config: Config,
    sources: Sequence[DataSource],
    model: Model,
    repeats: Repeats | None,
    tiles: Sequence[TiledDataset],
    log: Callable[[str], None],
) -> None:
    """Give every head the weights of its classes, where ``train.class_weights`` asks for them, and say which.

    The mean over the objects that a head learns from is 1, each object as often as an epoch shows its image, or as
    there are tiles that show enough of it.

    Raises:
        UserError: a name in ``train.class_weights`` that is no class of the data.
    """
    wanted = config.train.class_weights
    if wanted is None:
        return
    names = [category.name for category in model.categories]
    if isinstance(wanted, Mapping):
        for name in (name for name in wanted if name not in names):
            raise UserError(f"train.class_weights: the data has no class '{name}'; {did_you_mean(name, names)}")
    said: list[tuple[str, str]] = []
    for task in model.heads:
        head = model.head(task)
        if not head.weighs_classes:
            log(f"warning: train.class_weights has no effect on {task}: its head does not weigh classes")
            continue
        counts = objects_of_classes(sources, model, task, repeats, tiles)
        weights = class_weights(counts, [wanted_of(wanted, name) for name in names])
        head.class_weights = torch.from_numpy(weights.astype(np.float32))
        said.append((task, _described(weights, counts, names, bool(tiles), log)))
    for line in dict.fromkeys(line for _, line in said):
        tasks = " and ".join(task for task, of_task in said if of_task == line)
        log(f"class weights of {tasks}: {line}")


def wanted_of(wanted: Literal["balanced"] | Mapping[str, float], name: str) -> float | None:
    """The weight that the config gives a class; None for ``balanced``."""
    return wanted.get(name, 1.0) if isinstance(wanted, Mapping) else None


def class_weights(counts: np.ndarray, wanted: Sequence[float | None]) -> np.ndarray:
    """Weights with a mean over all objects of 1.

    Args:
        counts: (C,) objects of each class.
        wanted: of each class, before they are scaled; None: one divided by the number of its objects.

    Returns:
        (C,); 1 for classes without objects.
    """
    has_objects = counts > 0
    weights = np.ones(len(counts))
    for index in np.flatnonzero(has_objects).tolist():
        given = wanted[index]
        weights[index] = 1 / counts[index] if given is None else given
    if has_objects.any():
        weights[has_objects] *= counts.sum() / (weights * counts).sum()
    return weights


def objects_of_classes(
    sources: Sequence[DataSource],
    model: Model,
    task: str,
    repeats: Repeats | None,
    tiles: Sequence[TiledDataset] = (),
) -> np.ndarray:
    """(C,) objects that a head learns from in an epoch, by the model's classes; those that it does not predict have 0.

    An object counts as often as an epoch shows its image. Crowd regions do not.

    Args:
        tiles: the training images of every source, where they are divided: an object then counts in every tile that
            has it.
    """
    served = [other for other in model.tasks if serving_task(other, model.tasks) == task]
    counts = np.zeros(len(model.categories))
    for number, source in enumerate(sources):
        if not set(served) & set(source.tasks):
            continue
        if tiles:
            counts += source.weight * np.array(tiles[number].counts.classes)
            continue
        labels, start = source.train.labels, source.train.start
        shown = np.full(len(source.train), source.weight) if repeats is None else repeats.factors[number]
        weights = np.where(labels.crowd, 0, np.repeat(shown, np.diff(start)))
        counts += np.bincount(labels.labels, weights, minlength=len(counts))
    predicted = {category.name for category in model.head(task).classes}
    return np.where([category.name in predicted for category in model.categories], counts, 0)


def _described(
    weights: np.ndarray, counts: np.ndarray, names: Sequence[str], tiled: bool, log: Callable[[str], None]
) -> str:
    """The weights of the classes that have objects, the highest first; classes of very few objects are warned of."""
    order = [index for index in np.argsort(-weights, kind="stable") if counts[index] > 0]
    if heavy := [index for index in order if weights[index] > HEAVY]:
        few = ", ".join(f"'{names[index]}' ({counts[index]:.0f})" for index in heavy[:3]) + ", ..." * (len(heavy) > 3)
        log(
            f"warning: {len(heavy)} of the class weights are above {HEAVY:g}, of classes with few objects: {few}; "
            "each of these can unsettle the training; give weights of your own instead: "
            "-o 'train.class_weights={NAME: WEIGHT}'"
        )
    missing = int((counts == 0).sum())
    without = f"; {missing} classes have no objects to learn from" if missing else ""
    mean = f"the mean over objects{' in the tiles' if tiled else ''} is 1"
    return f"{_some([f'{names[index]} {weights[index]:.3g}' for index in order])} ({mean}){without}"


def _some(entries: Sequence[str]) -> str:
    """All entries, or the first and the last ones with how many are between them."""
    if len(entries) <= NAMED:
        return ", ".join(entries)
    return f"{', '.join(entries[: NAMED // 2])}, ({len(entries) - NAMED} more), {', '.join(entries[-NAMED // 2 :])}"

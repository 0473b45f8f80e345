"""How well a model does before its first step of training: what the weights that it starts from know already.

Class ids that mean something else, and weights that are broken or were read in a wrong way, show here, and not after an
hour of training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from mvision.data import Loader
from mvision.data.loading.dataset import SampleKey
from mvision.data.loading.samplers import EvalBatches
from mvision.engine.checkpoint import primary_figures
from mvision.engine.trainer import Trainer
from mvision.evaluation import Validation, evaluate
from mvision.evaluation.tables import figure_text
from mvision.heads import serving_task
from mvision.weights.files import Start
from mvision.weights.transfer import HeadStart

MOST_IMAGES = 500
"""Validation images of a data set that are looked at; of more, as many are drawn evenly."""
LOW = 0.01
"""A figure below this means that nothing is found, where all classes of the head are known."""


def tell_zero_shot(
    trainer: Trainer, begin: Start | None, validation: Sequence[Validation], log: Callable[[str], None]
) -> None:
    """Evaluate the model as it stands and say the figure of every task, or why there is none.

    Nothing in the training changes by it. Every process has to call this.

    Args:
        begin: the weights that the model has started from; None: there are none, or the run goes on, and nothing is
            said.
        validation: of a task, the first data set that is used for it is looked at.
    """
    start = None if begin is None else begin.transferred
    if start is None:
        return
    model = trainer.bare_model
    heads = {task: start.heads[serving_task(task, model.config.heads)] for task in model.tasks}
    found: dict[str, _Figure] = {}
    for part in validation:
        metrics = {task: of_task[:1] for task, of_task in part.metrics.items() if heads[task].known}
        metrics = {task: of_task for task, of_task in metrics.items() if task not in found}
        if metrics:
            with _random_numbers_kept(trainer.accelerator.device), _some_images(trainer, part) as images:
                figures = evaluate(
                    trainer.eval_model, part.loader, metrics, accelerator=trainer.accelerator, tiles=part.tiles
                )
            found |= {task: _Figure(name, value, images) for task, name, value in primary_figures(figures)}
    for task, head in heads.items():
        figure = found.get(task)
        log(_line(task, head, figure))
        is_whole = min(start.shares.values()) == 1 and head.loaded == head.layers
        if figure is not None and is_whole and 0 <= figure.value < LOW * head.known / head.classes:
            log(
                f"warning: {task}: nothing is found, though these weights know {head.known} of {head.classes} classes "
                "by name: either their pictures look different (then train on), or the names mean something else here "
                "(mvision data show), or the weights are damaged (mvision val with the data that they were trained on)"
            )


@dataclass(frozen=True)
class _Figure:
    """A task's primary metric, and on which images."""

    name: str
    value: float
    images: str


def _line(task: str, head: HeadStart, figure: _Figure | None) -> str:
    if figure is None:
        why = "no class of the data is taken over from these weights" if head.loaded else "its head starts new"
        return f"before training: {task} not measured: {why}"
    if figure.value < 0:
        return f"before training: {task} not measured: no such object in {figure.images}"
    partly = "" if head.loaded == head.layers else f" and {head.loaded} of {head.layers} layers of the head"
    return (
        f"before training: {task} {figure.name} {figure_text(figure.value)} on {figure.images} "
        f"({head.known} of {head.classes} classes{partly} from these weights)"
    )


@contextmanager
def _some_images(trainer: Trainer, part: Validation) -> Iterator[str]:
    """Inside this context the loader has at most ``MOST_IMAGES`` of its images, evenly spread; says how many."""
    loader = part.loader
    assert isinstance(loader, Loader)
    assert isinstance(loader.batches, EvalBatches)
    batches, everything, number = loader.batches, loader.batches.keys, len(loader.dataset)
    if number <= MOST_IMAGES:
        yield f"{number} validation images"
        return
    text, many, tiles = f"{MOST_IMAGES} of {number} validation images", MOST_IMAGES, loader.tiles
    if tiles is not None:  # all tiles of as many pictures
        number, many = len(tiles.pictures), max(1, MOST_IMAGES * len(tiles.pictures) // number)
        text = f"the tiles of {many} of {number} validation images"
    chosen = np.linspace(0, number - 1, many).round().astype(int).tolist()
    own = chosen[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
    own = own if tiles is None else tiles.of_pictures(own)
    batches.keys = [SampleKey(0, index, batches.image_size) for index in own]
    try:
        yield text
    finally:
        batches.keys = everything


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """After this context the sources of random numbers go on as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)

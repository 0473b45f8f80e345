"""What can be seen to go wrong before the first step of a training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvision.config import Config, ModelConfig, RunConfig
from mvision.data import Loader
from mvision.data.augment.geometry import describe_unmirrored
from mvision.data.augment.transforms import MIXING
from mvision.data.loading.compare import objects_of_mixed
from mvision.data.loading.samplers import TrainBatches
from mvision.data.loading.sources import DataSource
from mvision.engine.state import SavedState
from mvision.engine.trainer import Trainer
from mvision.errors import UserError
from mvision.heads import HEADS, head_class, serving_task
from mvision.model import Model
from mvision.structures import Category
from mvision.structures.oks import describe_default_sigmas
from mvision.weights.stored import without_data
from mvision.weights.transfer import Transferred

CROWDED = 0.01  # share of the pictures with more objects than queries from which on a run warns
NAMED = 3  # differing classes that are named


def check_model(config: ModelConfig, begin: Callable[[Model], str] | None, is_new: bool) -> None:
    """Raise what a model with these settings and initial weights raises, before the data is read, which takes longer.

    It is built without numbers and for one made-up class. Heads of other packages may refuse that class, so a model
    with one of them is not checked.

    Args:
        begin: loads the initial weights.
        is_new: the weights are not those of a run that goes on; only then there is something to check.
    """
    if not is_new or not config.heads.keys() <= HEADS.keys():
        return
    # Sigmas in the config are those of as many points.
    counts = [len(getattr(settings, "sigmas", [])) for settings in config.heads.values()]
    category = Category(id=1, name="any", keypoints=[f"point {index}" for index in range(max(1, *counts))])
    tried = config.model_copy(update={"categories": [category]}, deep=True)
    tried.backbone.pretrained = False
    model = without_data(lambda: Model(tried))
    if begin is not None:
        begin(model)


def check_task_weights(config: Config) -> None:
    """``train.task_weights`` are of heads that the model has; UserError if not."""
    heads = [task for task in config.model.heads if serving_task(task, config.model.heads) == task]
    for task in config.train.task_weights:
        if task not in heads:
            raise UserError(f"train.task_weights: there is no head {task} in this model, only {', '.join(heads)}")


def warn_of_slow_backbone(config: RunConfig, log: Callable[[str], None]) -> None:
    """The low learning rate of a pretrained backbone is far too low for random weights."""
    settings = config.train
    slow = settings.backbone_lr is not None and settings.backbone_lr < settings.lr
    if slow and not config.model.backbone.starts_trained:
        log(
            f"warning: the backbone starts from random weights at a low rate (train.backbone_lr "
            f"{settings.backbone_lr:g}): use --init WEIGHTS, -o model.backbone.pretrained=true, or "
            f"-o train.backbone_lr={settings.lr:g}"
        )


def warn_of_frozen_random_weights(
    config: RunConfig, taken: Transferred | None, is_new: bool, log: Callable[[str], None]
) -> None:
    """A part that is frozen and has no trained weights stays random to the end."""
    for part in config.train.freeze if is_new else ():
        share = 0.0 if taken is None else taken.shares[part]
        if share == 1 or (part == "backbone" and config.model.backbone.starts_trained):
            continue
        start = "all of" if share == 0 else "some of"
        log(
            f"warning: the {part} is frozen (train.freeze) and {start} its weights are random, which they stay: start "
            f"from trained ones with --init WEIGHTS, or leave --freeze {part} out"
        )


def tell_before_the_first_step(
    config: RunConfig,
    model: Model,
    sources: Sequence[DataSource],
    log: Callable[[str], None],
    taken: Transferred | None,
    *,
    is_new: bool,
) -> None:
    """All that a run says of its data and its backbone once the model is built and nothing is refused.

    Args:
        taken: what the model took over of other weights; None: nothing.
        is_new: the weights are not those of a run that goes on.
    """
    if is_new and taken is None:
        warn_of_slow_backbone(config, log)
    warn_of_frozen_random_weights(config, taken, is_new, log)
    tell_default_sigmas(model, log)
    tell_unmirrored_keypoints(config, model, log)
    warn_of_nothing_to_measure(model, sources, log)
    warn_of_crowded_pictures(config, sources, log)


def warn_of_nothing_to_measure(model: Model, sources: Sequence[DataSource], log: Callable[[str], None]) -> None:
    """Without objects in the validation images there is no figure by which the best weights could be chosen.

    Validation images without any label are reported with the other oddities of their data set.
    """
    empty = [task for task in model.tasks if not any(_can_measure(model, source, task) for source in sources)]
    if not empty or all(source.val.annotated == 0 for source in sources):
        return
    rest = [task for task in model.tasks if task not in empty]
    choice = f"chosen by {', '.join(rest)} alone" if rest else "those of the newest evaluation"
    log(
        f"warning: the {_count(sum(len(source.val) for source in sources), 'validation image')} have no object to "
        f"measure {', '.join(empty)} with: the best weights are {choice}"
    )


def warn_of_crowded_pictures(config: RunConfig, sources: Sequence[DataSource], log: Callable[[str], None]) -> None:
    """Pictures made of several images can have more objects than there are queries: those beyond are not learned."""
    augment = config.data.augment
    mixing = [name for name in MIXING if getattr(augment, name)]
    if not mixing or not augment.mixing(config.train.epochs):
        return
    for source in sources:
        for task in source.tasks:
            queries = getattr(config.model.heads[task], "num_queries", None)
            if queries is None or serving_task(task, config.model.heads) != task:
                continue
            objects = objects_of_mixed(source.train, augment)
            share = float(np.mean(objects > queries))
            if share >= CROWDED:
                enough = math.ceil(float(np.quantile(objects, 1 - CROWDED)) / 50) * 50
                log(
                    f"warning: with {' and '.join(mixing)} about {share:.0%} of the training pictures of {source.name} "
                    f"have more objects than the {queries} that {task} can find; the others are not learned: "
                    f"-o model.heads.{task}.num_queries={enough}, or a lower data.augment.{' or '.join(mixing)}"
                )


def tell_default_sigmas(model: Model, log: Callable[[str], None]) -> None:
    """The OKS, which poses are learned and measured by, has a guess in place of the tolerances that are not known."""
    for head in (model.head(task) for task in model.heads):
        for category in head.classes if "keypoints" in head.needs else ():
            if (line := describe_default_sigmas(category)) is not None:
                log(line)


def tell_unmirrored_keypoints(config: RunConfig, model: Model, log: Callable[[str], None]) -> None:
    """Pictures are mirrored, and the names of a class's points do not tell left from right."""
    if config.data.augment.flip == 0:
        return
    posed = [head.classes for head in (model.head(task) for task in model.heads) if "keypoints" in head.needs]
    lines = [describe_unmirrored(category) for classes in posed for category in classes]
    for line in dict.fromkeys(filter(None, lines)):
        log(f"note: {line}")


def _can_measure(model: Model, source: DataSource, task: str) -> bool:
    if task not in source.tasks:
        return False
    labels = source.val.labels
    names = {category.name for category in model.head(task).classes}
    known = [number for number, category in enumerate(source.val.categories) if category.name in names]
    counted = ~labels.crowd & np.isin(labels.labels, known)
    if "keypoints" in head_class(task).needs and labels.keypoints is not None:
        counted &= (labels.keypoints[..., 2] > 0).any(axis=1)
    return bool(counted.any())


def check_batches(trainer: Trainer, loader: Loader) -> None:
    """Batch norm cannot learn from a single value per channel, as one small image gives.

    Raises:
        UserError: the smallest step of the training would fail.
    """
    assert isinstance(loader.batches, TrainBatches)
    images, size = loader.batches.smallest()
    one_norm_for_all = trainer.accelerator.num_processes > 1 and trainer.accelerator.device.type == "cuda"
    if images > 1 or one_norm_for_all:
        return
    # A trial of the backbone and the neck, which have the coarsest maps, on copies: norms keep what they have seen.
    trial = copy.deepcopy(trainer.bare_model).train()
    picture = torch.zeros((1, 3, *size), dtype=torch.uint8, device=trial.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial.features(picture)
    except ValueError as error:
        line = single_value(error, 1, size)
        if line is None:
            raise
        raise line from error


def single_value(error: ValueError, images: int, size: Sequence[int]) -> UserError | None:
    """The line for torch's error about a single value per channel; None for any other error."""
    if "more than 1 value per channel" not in str(error):
        return None
    return UserError(
        f"train.batch_size: {_count(images, 'image')} of {size[1]} x {size[0]} in a step of a process give a batch "
        "norm a single value per channel, from which it cannot learn; use a larger --batch-size (and as many training "
        "images), or a larger --image-size"
    )


def check_resumed(
    path: Path, config: RunConfig, saved: SavedState, facts: dict[str, Any], log: Callable[[str], None]
) -> None:
    """Refuse what a run cannot go on with, see ``check_same_run``, and say what is different but can be.

    Raises:
        UserError: that, or a last epoch that is done already, but was not evaluated.
    """
    check_same_run(path, saved.facts, facts, inside_epoch=saved.progress.batch > 0)
    done, steps, before = saved.progress.epoch, facts["steps_of_epoch"], saved.facts.get("steps_of_epoch")
    if config.train.epochs <= done and "metrics" not in (saved.record or {}):
        raise UserError(
            f"--epochs {config.train.epochs}: {path} has trained {done} and was not evaluated after the last of them; "
            f"choose --epochs {done + 1} or more"
        )
    if before not in (None, steps):
        log(
            f"note: an epoch has {steps} optimiser steps now, and had {before}: the learning rate goes on from the "
            f"same share of the run; its peak is still that of the batches of before (train.lr {config.train.lr:.3g}), "
            "another one: -o train.lr=X"
        )


def check_same_run(path: Path, saved: dict[str, Any], now: dict[str, Any], *, inside_epoch: bool) -> None:
    """A run goes on only with the tasks, classes and pictures that it had, and at the same image size.

    Args:
        path: of the run.
        saved, now: ``state.run_facts`` of the saved state and of the config and data of today.
        inside_epoch: the run was stopped inside an epoch, of which it has done some batches.

    Raises:
        UserError: they differ.
    """
    new = f"start a new run from its weights instead: --init {path / 'best.safetensors'}"
    if saved["tasks"] != now["tasks"]:
        before, today = (", ".join(side["tasks"]) for side in (saved, now))
        raise UserError(f"--resume {path}: the run is of {before}, its config now says {today}; {new}")
    if saved["optimizer"] != now["optimizer"]:
        before, today = saved["optimizer"], now["optimizer"]
        raise UserError(f"--resume {path}: the run has train.optimizer {before}, not {today}; leave that out, or {new}")
    if saved["classes"] != now["classes"]:
        raise UserError(f"--resume {path}: {_changed_classes(saved['classes'], now['classes'])}; {new}")
    if saved["images"] != now["images"]:
        before, today = (
            ", ".join(f"{train} + {val}" for train, val in side["images"]) for side in (saved, now)
        )  # of each data set
        raise UserError(
            f"--resume {path}: the data had {before} training and validation images when the run stopped, and has "
            f"{today} now, so that its epochs and figures are no longer the same; bring the images back, or {new}"
        )
    if saved.get("image_size", now["image_size"]) != now["image_size"]:
        before, today = ("{1} x {0}".format(*side["image_size"]) for side in (saved, now))
        raise UserError(
            f"--resume {path}: the run has pictures of {before}, not {today}: its figures would be of two sizes; leave "
            f"--image-size out, or {new}"
        )
    if saved.get("drawn", now["drawn"]) != now["drawn"]:
        before, today = (_settings(side["drawn"]) for side in (saved, now))
        raise UserError(
            f"--resume {path}: its pictures were drawn with {before}, and would be with {today}: others "
            f"would be trained and validated on; go on with the same settings, or {new}"
        )
    if inside_epoch and saved["batches"] != now["batches"]:
        is_repeated = any("repeat_threshold" in side["batches"] for side in (saved, now))
        before, today = (
            f"{side['batches']['number']} batches of {side['batches']['size']} with seed {side['batches']['seed']}"
            + (f" and data.repeat_threshold {side['batches'].get('repeat_threshold', 0):g}" if is_repeated else "")
            for side in (saved, now)
        )
        raise UserError(
            f"--resume {path}: the run was stopped inside an epoch of {before}, which would now have {today}; go on "
            f"with the same settings, or {new}"
        )


def _settings(drawn: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in drawn.items()) or "no share of the images"


def _changed_classes(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    before, today = ([entry["name"] for entry in side] for side in (saved, now))
    added, gone = ([name for name in one if name not in other] for one, other in ((today, before), (before, today)))
    if added or gone:
        parts = [f"{word} {_names(names)}" for word, names in (("new", added), ("missing", gone)) if names]
        return f"the data's classes have changed since the run stopped ({'; '.join(parts)})"
    if before != today:
        return (
            f"the data's classes are in another order than when the run stopped: {_names(today)}, not {_names(before)}"
        )
    name = next(new["name"] for old, new in zip(saved, now) if old != new)
    return f"the keypoints of class '{name}' have changed since the run stopped"


def _names(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"

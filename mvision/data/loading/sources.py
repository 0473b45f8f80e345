"""The data sets of a run: one, or several with a common list of classes, each used for some of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvision.config import DataConfig, MoreDataConfig
from mvision.data.augment.extra import build_transforms
from mvision.data.formats.categories import read_categories
from mvision.data.formats.coco import CocoSplit, same_categories
from mvision.data.formats.layouts import Layout, find_layout
from mvision.data.formats.split import Split
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.structures import Category


@dataclass(frozen=True)
class DataSource:
    """One data set of a run.

    Attributes:
        name: its folder's name.
        tasks: what its labels are used for.
        train, val: its splits; labels are positions in the list of classes that all data sets of the run share.
        weight: how often an epoch shows each of its images.
    """

    name: str
    tasks: list[str]
    train: CocoSplit
    val: CocoSplit
    weight: float


def read_data_sources(
    config: DataConfig, tasks: Sequence[str], seed: int, log: Callable[[str], None]
) -> list[DataSource]:
    """Read every data set of a run, with the fields of ``Targets`` that the tasks need.

    Args:
        seed: of the share of the training images, where ``config.fraction`` asks for one.
        log: is called with a description of each data set, and with what is wrong in it.

    Raises:
        UserError: a data set that cannot be used, a task without any, or a mistake in ``config.augment.extra``.
    """
    build_transforms(config.augment.extra)  # a mistake in it is reported before the data is read
    configs = _configs(config)
    opened = []
    for one in configs:
        layout = find_layout(one.root)
        log(layout.description)
        wanted = _wanted(one, layout, one.train, tasks, len(configs) > 1)
        some = replace(_split(layout, one.train, wanted), fraction=config.fraction, seed=seed)
        opened.append((one, wanted, some, _split(layout, one.val, wanted)))
    _check_all_are_served(tasks, [(_name(one), wanted) for one, wanted, _, _ in opened])
    shared = merge_categories([split for _, _, split, _ in opened]) if len(opened) > 1 else None
    sources = []
    for one, wanted, train_split, val_split in opened:
        train = CocoSplit(train_split, _needs(wanted), shared, keep_annotations=False)
        val = CocoSplit(val_split, _needs(wanted), shared)
        for read in (train, val):
            if len(read.problems):
                log(f"{read.problems}")
        same_categories(train, val)
        sources.append(DataSource(_name(one), wanted, train, val, one.weight))
    return sources


def read_validation(
    config: DataConfig, split: str | None, tasks: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[str], CocoSplit]]]:
    """The data sets that a model is evaluated on.

    Args:
        split: its name; None: the one that a run evaluates on.

    Returns:
        Lines for the user (descriptions, and what is wrong), and for every data set its name, the tasks that it is
        used for, and the split.

    Raises:
        UserError: a data set that cannot be used, or a task without any.
    """
    configs = _configs(config)
    used, messages = [], []
    for one in configs:
        layout = find_layout(one.root)
        messages.append(layout.description)
        wanted = _wanted(one, layout, split or one.val, tasks, len(configs) > 1)
        if wanted:
            read = CocoSplit(_split(layout, split or one.val, wanted), _needs(wanted))
            messages += [f"{read.problems}"] if len(read.problems) else []
            used.append((_name(one), wanted, read))
    _check_all_are_served(tasks, [(name, wanted) for name, wanted, _ in used])
    return messages, used


def merge_categories(splits: Sequence[Split]) -> list[Category]:
    """One list of classes for several data sets: classes of the same name are one, ids stay where they are not taken.

    Raises:
        UserError: a class has other keypoints in one data set than in another.
    """
    merged: dict[str, Category] = {}
    origin: dict[str, Split] = {}
    used: set[int] = set()
    for split in splits:
        for category in read_categories(split.load(), str(split.annotations)):
            same = merged.get(category.name)
            identity = same.id if same is not None else category.id if category.id not in used else max(used) + 1
            used.add(identity)
            if same is not None and same.keypoints and category.keypoints not in ([], same.keypoints):
                raise UserError(
                    f"{split.annotations}: class '{category.name}' has other keypoints "
                    f"({', '.join(category.keypoints[:3])}, ...) than in {origin[category.name].annotations} "
                    f"({', '.join(same.keypoints[:3])}, ...); rename it in one of them"
                )
            if same is None or not same.keypoints:
                merged[category.name] = category.model_copy(update={"id": identity})
                origin[category.name] = split
    return list(merged.values())


def _configs(config: DataConfig) -> list[DataConfig | MoreDataConfig]:
    return [config, *config.more]


def _name(config: DataConfig | MoreDataConfig) -> str:
    return "built-in" if config.root is None else Path(config.root).resolve().name


def _needs(tasks: Iterable[str]) -> frozenset[str]:
    return frozenset[str]().union(*(head_class(task).needs for task in tasks))


def _split(layout: Layout, name: str, tasks: Sequence[str]) -> Split:
    return layout.split(name, _needs(tasks), poses_only=all(head_class(task).kind == "poses" for task in tasks))


def _wanted(
    config: DataConfig | MoreDataConfig, layout: Layout, split: str, tasks: Sequence[str], several: bool
) -> list[str]:
    """The tasks that a data set is used for: those in its ``tasks``; else all of the model's, or where there are
    several data sets, those for which it has labels."""
    for task in config.tasks:
        head_class(task)
    if config.tasks:
        return [task for task in tasks if task in config.tasks]
    if not several:
        return list(tasks)
    available = CocoSplit(_split(layout, split, tasks), keep_annotations=False).available
    return [task for task in tasks if head_class(task).needs <= available]


def _check_all_are_served(tasks: Sequence[str], used: Sequence[tuple[str, list[str]]]) -> None:
    for task in tasks:
        if all(task not in wanted for _, wanted in used):
            names = ", ".join(name for name, _ in used) or "none"
            raise UserError(f"data: no data set ({names}) has labels for {task}, or is used for it (data.tasks)")
    for name, wanted in used:
        if not wanted:
            raise UserError(f"data: {name} is used for no task of this model ({', '.join(tasks)}); leave it out")

"""The data sets of a run: one as a rule, or several with one list of classes, each used for some of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvision.config import DataConfig, MoreDataConfig
from mvision.data.formats.coco import CocoSplit, same_categories
from mvision.data.formats.layouts import Layout, Split, find_layout
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.structures import Category


@dataclass(frozen=True)
class DataSource:
    """One data set of a run.

    Attributes:
        name: its folder's name.
        tasks: what its labels are used for.
        train, val: its splits; labels are positions in the list of classes that all parts share.
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
    """Read every data set of a run, with what the tasks need of it.

    Args:
        seed: of the share of the training images, where ``config.fraction`` asks for one.
        log: gets what was found, and what was wrong with it.

    Raises:
        UserError: a data set that cannot be used, or a task for which none is.
    """
    sources = _sources(config)
    opened = []
    for source in sources:
        layout = find_layout(source.root)
        log(layout.description)
        wanted = _wanted(source, layout, source.train, tasks, len(sources) > 1)
        some = replace(layout.split(source.train, wanted), fraction=config.fraction, seed=seed)
        opened.append((source, wanted, some, layout.split(source.val, wanted)))
    _check_all_are_served(tasks, [(_name(source), wanted) for source, wanted, _, _ in opened])
    shared = merge_categories([split for _, _, split, _ in opened]) if len(opened) > 1 else None
    parts = []
    for source, wanted, train_split, val_split in opened:
        train, val = (CocoSplit(split, _needs(wanted), shared) for split in (train_split, val_split))
        for read in (train, val):
            if len(read.problems):
                log(f"{read.problems}")
        same_categories(train, val)
        parts.append(DataSource(_name(source), wanted, train, val, source.weight))
    return parts


def read_validation(
    config: DataConfig, split: str | None, tasks: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[str], CocoSplit]]]:
    """What was found, and for every data set its name, the tasks that it is used for, and the split to evaluate on.

    Args:
        split: its name; None: the one that a run evaluates on.
    """
    sources = _sources(config)
    found, messages = [], []
    for source in sources:
        layout = find_layout(source.root)
        messages.append(layout.description)
        wanted = _wanted(source, layout, split or source.val, tasks, len(sources) > 1)
        if wanted:
            read = CocoSplit(layout.split(split or source.val, wanted), _needs(wanted))
            messages += [f"{read.problems}"] if len(read.problems) else []
            found.append((_name(source), wanted, read))
    _check_all_are_served(tasks, [(name, wanted) for name, wanted, _ in found])
    return messages, found


def merge_categories(splits: Sequence[Split]) -> list[Category]:
    """One list of classes for several data sets: those of one name are one class; ids are kept where they are free.

    Raises:
        UserError: a class has other keypoints in one data set than in another.
    """
    merged: dict[str, Category] = {}
    origin: dict[str, Split] = {}
    used: set[int] = set()
    for split in splits:
        for category in CocoSplit(split).own:
            known = merged.get(category.name)
            identity = known.id if known is not None else category.id if category.id not in used else max(used) + 1
            used.add(identity)
            if known is not None and known.keypoints and category.keypoints not in ([], known.keypoints):
                raise UserError(
                    f"{split.annotations}: class '{category.name}' has other keypoints "
                    f"({', '.join(category.keypoints[:3])}, ...) than in {origin[category.name].annotations} "
                    f"({', '.join(known.keypoints[:3])}, ...); rename it in one of them"
                )
            if known is None or not known.keypoints:
                merged[category.name] = category.model_copy(update={"id": identity})
                origin[category.name] = split
    return list(merged.values())


def _sources(config: DataConfig) -> list[DataConfig | MoreDataConfig]:
    return [config, *config.more]


def _name(source: DataConfig | MoreDataConfig) -> str:
    return "built-in" if source.root is None else Path(source.root).resolve().name


def _needs(tasks: Iterable[str]) -> frozenset[str]:
    return frozenset[str]().union(*(head_class(task).needs for task in tasks))


def _wanted(
    source: DataConfig | MoreDataConfig, layout: Layout, split: str, tasks: Sequence[str], several: bool
) -> list[str]:
    """The tasks that a data set is used for: those named, else the model's; of several, those it has labels for."""
    for task in source.tasks:
        head_class(task)
    if source.tasks:
        return [task for task in tasks if task in source.tasks]
    if not several:
        return list(tasks)
    available = CocoSplit(layout.split(split, tasks)).available
    return [task for task in tasks if head_class(task).needs <= available]


def _check_all_are_served(tasks: Sequence[str], used: Sequence[tuple[str, list[str]]]) -> None:
    for task in tasks:
        if all(task not in wanted for _, wanted in used):
            names = ", ".join(name for name, _ in used) or "none"
            raise UserError(f"data: no data set ({names}) has labels for {task}, or is used for it (data.tasks)")
    for name, wanted in used:
        if not wanted:
            raise UserError(f"data: {name} is used for no task of this model ({', '.join(tasks)}); leave it out")

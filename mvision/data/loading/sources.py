"""The data sets of a run: one, or several with a common list of classes, each used for some of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mvision.config import DataConfig
from mvision.data.augment.extra import build_transforms
from mvision.data.augment.transforms import fields_of_augmentation
from mvision.data.formats.categories import free_id
from mvision.data.formats.coco import CocoSplit, same_categories
from mvision.data.formats.problems import Problem, Problems
from mvision.data.formats.split import FIELDS, Split
from mvision.data.formats.usable import refusal, refuse
from mvision.data.loading.compare import (
    compare_splits,
    count_above_queries,
    count_below_pixel,
    count_unlisted,
    refuse_unreadable,
)
from mvision.data.loading.folders import Folder, needs, open_folders
from mvision.data.loading.pixel_range import count_oddities
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.settings import Settings
from mvision.structures import Category


@dataclass(frozen=True)
class DataSource:
    """One data set of a run.

    Attributes:
        name: its folder's name.
        tasks: what its labels are used for.
        train, val: its splits; labels are positions in the list of classes that all data sets of the run share.
        weight: how often an epoch shows each of its images.
        folder: its files.
        problems: what concerns both splits together.
    """

    name: str
    tasks: list[str]
    train: CocoSplit
    val: CocoSplit
    weight: float
    folder: Folder
    problems: Problems

    def lines(self, prefix: str = "") -> list[str]:
        """Numbers, and what was left out or mended as far as it concerns the tasks: the first lines of a training.

        Args:
            prefix: of the names of the splits.
        """
        lines = [self.folder.note] if self.folder.note else []
        for name, split in (("train", self.train), ("val", self.val)):
            lines.append(f"{prefix}{name}: {split.summary}")
            lines += [f"  ! {problem}" for problem in concerning(split.problems, self.tasks)]
        return lines + [f"! {problem}" for problem in concerning(self.problems, self.tasks)]


def read_data_sources(
    config: DataConfig,
    tasks: Sequence[str],
    seed: int,
    log: Callable[[str], None],
    heads: Mapping[str, Settings] | None = None,
    all_fields: bool = False,
    image_size: tuple[int, int] | None = None,
) -> list[DataSource]:
    """Read every data set of a run, with the fields of ``Targets`` that the tasks need.

    ``mvision train`` and ``mvision data check`` both call it, so that they accept and refuse the same data.

    Args:
        seed: of the share of the training images, where ``config.fraction`` asks for one, and of the images that
            ``config.val_fraction`` holds out.
        log: is called with a description of each data set, and with what is wrong in it.
        heads: settings by task; objects beyond the number of queries of a head are counted.
        all_fields: read all that there is, for a report.
        image_size: (height, width) of the model's input; training objects that are too small at it are counted.

    Raises:
        UserError: a data set that cannot be used, a task without any, or a mistake in ``config.augment.extra``.
    """
    build_transforms(config.augment.extra)  # a mistake in it is reported before the data is read
    folders = open_folders(config, seed)
    opened: list[tuple[Folder, list[str], CocoSplit]] = []
    for folder in folders:
        log(folder.layout.description)
        wanted, train = _read_training(folder, tasks, config, len(folders) > 1, all_fields)
        opened.append((folder, wanted, train))
    _check_all_are_served(tasks, [(folder.name, wanted) for folder, wanted, _ in opened])
    shared = merge_categories([train for _, _, train in opened])
    sources = []
    for folder, wanted, train in opened:
        if len(opened) > 1:
            train.use_categories(shared)
        refuse(train, wanted)
        val = CocoSplit(folder.validation(wanted), FIELDS if all_fields else needs(wanted), train.categories)
        same_categories(train, val)
        refuse(val, wanted, empty_is_fine=True)
        for read in (train, val):
            refuse_unreadable(read, config.tile)
            count_oddities(read)
            for task in wanted if config.tile is None else ():  # of tiles, the lines about them have the number
                count_above_queries(read, task, (heads or {}).get(task))
        if image_size is not None:
            count_below_pixel(train, image_size, config.tile)
        problems = compare_splits(train, val, "val")
        count_unlisted(train, val, folder.layout, problems)
        if val.annotated == 0:
            kind = "validation set without any label: nothing is measured, the newest weights count as the best"
            problems.add(kind, str(val.split.annotations))
        source = DataSource(folder.name, wanted, train, val, folder.config.weight, folder, problems)
        for line in source.lines(f"{folder.name}/" if len(opened) > 1 else ""):
            log(line)
        sources.append(source)
    return sources


def read_validation(
    config: DataConfig, split: str | None, tasks: Sequence[str], seed: int = 0
) -> tuple[list[str], list[tuple[str, list[str], CocoSplit]]]:
    """The data sets that a model is evaluated on.

    Args:
        split: its name; None: the one that a run evaluates on.
        seed: of the run, which decides on the images that ``config.val_fraction`` holds out.

    Returns:
        Lines for the user (descriptions, and what is wrong), and for every data set its name, the tasks that it is
        used for, and the split.

    Raises:
        UserError: a data set that cannot be used, or a task without any.
    """
    used, messages = [], []
    folders = open_folders(config, seed)
    for folder in folders:
        messages.append(folder.layout.description)
        if split is None and folder.note:
            messages.append(folder.note)
        wanted = _asked(folder, tasks)
        if not wanted:
            continue

        def read(tasks: Sequence[str], folder: Folder = folder) -> CocoSplit:
            chosen = folder.validation(tasks) if split is None else folder.split(split, tasks)
            return CocoSplit(chosen, needs(tasks))

        found = read(wanted)
        if len(folders) > 1 and not folder.config.tasks:
            wanted = [task for task in wanted if refusal(found, task) is None]
        if wanted:
            refuse(found, wanted)
            messages += [f"! {problem}" for problem in concerning(found.problems, wanted)]
            used.append((folder.name, wanted, found))
    _check_all_are_served(tasks, [(name, wanted) for name, wanted, _ in used])
    return messages, used


def merge_categories(splits: Sequence[CocoSplit]) -> list[Category]:
    """One list of classes for several data sets: classes of the same name are one, ids stay where they are not taken.

    Raises:
        UserError: a class has other keypoints in one data set than in another.
    """
    merged: dict[str, Category] = {}
    origin: dict[str, Split] = {}
    used: set[int] = set()
    for split in splits:
        for category in split.own:
            same = merged.get(category.name)
            identity = same.id if same is not None else free_id(category.id, used)
            used.add(identity)
            if same is not None and same.keypoints and set(category.keypoints) not in (set(), set(same.keypoints)):
                raise UserError(
                    f"{split.split.annotations}: class '{category.name}' has other keypoints "
                    f"({', '.join(category.keypoints[:3])}, ...) than in {origin[category.name].annotations} "
                    f"({', '.join(same.keypoints[:3])}, ...); rename it in one of them"
                )
            if same is None or not same.keypoints:
                merged[category.name] = category.model_copy(update={"id": identity})
                origin[category.name] = split.split
    return list(merged.values())


def concerning(problems: Problems, tasks: Iterable[str]) -> list[Problem]:
    """The problems that make a difference to these tasks."""
    return problems.of(needs(tasks))


def _asked(folder: Folder, tasks: Sequence[str]) -> list[str]:
    """The tasks that a data set may be used for: those in its ``tasks``, else all of the model's."""
    for task in folder.config.tasks:
        head_class(task)
    return [task for task in tasks if task in folder.config.tasks] if folder.config.tasks else list(tasks)


def _read_training(
    folder: Folder, tasks: Sequence[str], config: DataConfig, several: bool, all_fields: bool
) -> tuple[list[str], CocoSplit]:
    """The training set of a folder, and the tasks that it is used for: where there are several data sets and the config
    names no tasks, those that it has labels for."""
    asked = wanted = _asked(folder, tasks)
    more = fields_of_augmentation(config.augment)
    split = folder.training(asked, config.fraction)
    train = CocoSplit(split, FIELDS if all_fields else needs(asked) | more, keep_annotations=False)
    if several and not folder.config.tasks:
        wanted = [task for task in asked if refusal(train, task) is None]
        chosen = folder.training(wanted or asked, config.fraction)
        if chosen != split:  # COCO's own layout has another file for poses alone
            train = CocoSplit(chosen, FIELDS if all_fields else needs(wanted) | more, keep_annotations=False)
        elif not all_fields:
            train.leave_out(FIELDS - needs(wanted) - more)
    if not all_fields:
        train.leave_out(more - needs(wanted) - train.available)
    return wanted, train


def _check_all_are_served(tasks: Sequence[str], used: Sequence[tuple[str, list[str]]]) -> None:
    for task in tasks:
        if all(task not in wanted for _, wanted in used):
            names = ", ".join(name for name, _ in used) or "none"
            raise UserError(f"data: no data set ({names}) has labels for {task}, or is used for it (data.tasks)")
    for name, wanted in used:
        if not wanted:
            raise UserError(f"data: {name} is used for no task of this model ({', '.join(tasks)}); leave it out")

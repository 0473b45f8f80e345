"""``mvision data check``: numbers of every split, what is wrong with it, and whether a training would take the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from mvision.config import Config, load_config
from mvision.data.augment.geometry import describe_unmirrored
from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import Layout, usual_splits
from mvision.data.formats.problems import Problem
from mvision.data.formats.split import Split
from mvision.data.formats.usable import refusal, refuse, usable_objects
from mvision.data.loading.compare import compare_splits, refuse_unreadable
from mvision.data.loading.dataset import Dataset
from mvision.data.loading.folders import Folder, needs, open_folders
from mvision.data.loading.pixel_range import choose_pixel_range
from mvision.data.loading.sources import DataSource, read_data_sources
from mvision.data.tools.check_tiles import TileReport, report_tiles
from mvision.errors import UserError, printable, shortened
from mvision.heads import known_tasks
from mvision.machine import cores
from mvision.structures.images import BadImage

SMALL, MEDIUM = 32**2, 96**2  # COCO's limits of object area in pixels
LISTED, MAX_NAME = 30, 80  # classes shown in the text, and characters of the name of one


@dataclass
class SplitReport:
    """The figures of one split.

    Attributes:
        annotations: the file.
        error: why the split cannot be read at all; everything else is empty then.
        images, empty_images: how many, and how many of them without any object.
        objects, crowds: labelled objects, and regions marked ``iscrowd``.
        with_masks, with_keypoints: objects that have a usable outline, or at least one labelled keypoint.
        classes: objects by class name.
        image_sizes: the most frequent "width x height" with their counts.
        object_sizes: objects by COCO's limits of area: small < 32 x 32 <= medium < 96 x 96 <= large, in pixels.
        most_objects: in one image.
        decoded: whether every image was read, not only its entry.
        tiles: what its images are divided into, where ``data.tile`` is set.
        problems: see ``Problem``.
    """

    annotations: str
    error: str | None = None
    images: int = 0
    empty_images: int = 0
    objects: int = 0
    crowds: int = 0
    with_masks: int = 0
    with_keypoints: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    image_sizes: dict[str, int] = field(default_factory=dict)
    object_sizes: dict[str, int] = field(default_factory=dict)
    most_objects: int = 0
    decoded: bool = False
    tiles: TileReport | None = None
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Report:
    """The data sets of a config: their layouts and splits, faults that concern several splits, and the verdict.

    Attributes:
        layout: a line for every data set.
        asked: the tasks that the data is checked for.
        splits: by name.
        refused: the line with which a training of these tasks would end at once; None where it would start.
        tasks: every known task -> why the data cannot serve it, None where it can.
        problems: between the splits.
        notes: what a training says of the data besides.
    """

    layout: str
    asked: list[str]
    splits: dict[str, SplitReport] = field(default_factory=dict)
    refused: str | None = None
    tasks: dict[str, str | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether a training would start."""
        return self.refused is None

    @property
    def verdict(self) -> str:
        """One line."""
        if self.refused is not None:
            return f"not usable: {self.refused}"
        kinds = [*self.problems, *(problem for split in self.splits.values() for problem in split.problems)]
        common = [task for task, reason in self.tasks.items() if reason is None]
        able = f"every split can serve {', '.join(common)}" if common else "no task can be served by every split"
        if kinds:
            count = sum(problem.count for problem in kinds)
            return f"usable with {_number(count, 'problem')} of {_number(len(kinds), 'kind')}: {able}"
        return f"sound: {able}"

    def text(self, every_place: bool = False) -> str:
        """For the terminal.

        Args:
            every_place: list all places of every problem, one a line, and not the first few.
        """
        lines = [self.layout, *self.notes]
        for name, split in self.splits.items():
            lines += ["", f"{name}: {printable(split.annotations)}"]
            lines += [f"  {line}" for line in _split_lines(split)]
            lines += [f"  {line}" for line in self._problem_lines(split.problems, every_place)]
        if self.problems:
            lines += ["", "between the splits"]
            lines += [f"  {line}" for line in self._problem_lines(self.problems, every_place)]
        if self.tasks:
            lines += ["", "tasks"]
            lines += [
                f"  {task:12} {'yes' if reason is None else f'no: {printable(reason)}'}"
                for task, reason in self.tasks.items()
            ]
        return "\n".join([*lines, "", printable(self.verdict)])

    def _problem_lines(self, problems: Sequence[Problem], every_place: bool) -> Iterator[str]:
        """The lines that a training begins with; those that only other tasks lose something by name the tasks."""
        for problem in problems:
            others = problem.field != "boxes" and problem.field not in needs(self.asked)
            tasks = [task for task in known_tasks() if problem.field in needs([task])] if others else []
            mark = f" [{', '.join(tasks)}]" if tasks else ""
            if not every_place:
                yield f"! {problem}{mark}"
                continue
            yield f"! {problem.count} x {problem.kind}{mark}"
            yield from (f"    {printable(place)}" for place in problem.examples)
            if problem.count > len(problem.examples):
                yield f"    ... and {problem.count - len(problem.examples)} more"


def check(
    data: Config | Layout,
    splits: Sequence[str] = (),
    quick: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Read everything and report.

    Args:
        data: data sets and the model whose tasks they have to serve; or one data set, for detection.
        splits: of the first data set, these alone; empty: those that a training reads, and ``test`` where there is one.
        quick: the annotations only; images are not opened.
        progress: called with the number of images just read.

    Raises:
        UserError: no data set is recognised, or it has no split of that name. What else would end a training is
            reported, not raised.
    """
    config = load_config(overrides={"data.root": str(data.root)}) if isinstance(data, Layout) else data
    if splits:
        report, read = _read_named(config, splits)
    else:
        report, read = _read_all(config)
    for name, split in read.items():
        report.splits[name] = _count(split)
        if not quick:
            _decode(split, progress)
            report.splits[name].decoded = True
        report.splits[name].problems = list(split.problems)
        is_trained = name == config.data.train if splits else name.rpartition("/")[2] == "train"
        _divide(split, report, name, config, is_trained)
    return report


def _divide(split: CocoSplit, report: Report, name: str, config: Config, is_trained: bool) -> None:
    """Add what becomes of the images on tiles, where the config asks for some."""
    if config.data.tile is None:
        return
    try:
        report.splits[name].tiles = report_tiles(split, config.data.tile, is_trained, config.train.seed)
    except UserError as error:
        report.refused = report.refused or str(error)


def _read_named(config: Config, names: Sequence[str]) -> tuple[Report, dict[str, CocoSplit]]:
    """Single splits, each held to what a training or an evaluation would ask of it."""
    folder, asked = open_folders(config.data, config.train.seed)[0], list(config.model.heads)
    report = Report(folder.layout.description, asked)
    read: dict[str, CocoSplit] = {}
    for name in names:
        split = folder.split(name, asked)
        try:
            one = read[name] = CocoSplit(split, FIELDS, keep_annotations=False)
            refuse(one, asked)
            refuse_unreadable(one)
        except UserError as error:
            report.refused = report.refused or str(error)
            if name not in read:
                report.splits[name] = SplitReport(str(split.annotations), error=str(error))
    read = {name: _with_every_field(folder, split) for name, split in read.items()}
    report.tasks = {task: _reason(task, [read]) for task in known_tasks()}
    return report, read


def _read_all(config: Config) -> tuple[Report, dict[str, CocoSplit]]:
    """The splits that a training reads, as it reads them, and ``test``."""
    asked, heads, seed = list(config.model.heads), config.model.heads, config.train.seed
    sources: list[DataSource] = []
    refused = None
    try:
        size = config.model.image_size
        sources = read_data_sources(config.data, asked, seed, lambda _: None, heads, all_fields=True, image_size=size)
    except UserError as error:
        refused = str(error)
    folders = [source.folder for source in sources] or open_folders(config.data, seed)
    report = Report("\n".join(folder.layout.description for folder in folders), asked, refused=refused)
    choose_pixel_range(config.model.pixel_range, [source.train for source in sources], report.notes.append)
    if sources and "keypoints" in needs(asked) and config.data.augment.flip:
        unmirrored = map(describe_unmirrored, sources[0].train.categories)  # all data sets have the same classes
        report.notes += [f"note: {line}" for line in unmirrored if line is not None]
    parts: dict[str, dict[str, CocoSplit]] = {}
    for number, folder in enumerate(folders):
        prefix = f"{folder.name}/" if len(folders) > 1 else ""
        if sources:
            part = {"train": sources[number].train, "val": sources[number].val}
            report.problems += sources[number].problems
        else:
            part = _read_each(folder, prefix, report)
        parts[prefix] = {name: _with_every_field(folder, split) for name, split in part.items()}
        _read_test(folder, parts[prefix], prefix, report)
    trained = [{name: split for name, split in part.items() if name != "test"} for part in parts.values()]
    report.tasks = {task: _reason(task, trained) for task in known_tasks()}
    return report, {prefix + name: split for prefix, part in parts.items() for name, split in part.items()}


def _read_each(folder: Folder, prefix: str, report: Report) -> dict[str, CocoSplit]:
    """What can be read of a data set that a training would refuse; errors go to the report."""
    asked = report.asked
    choices: dict[str, Callable[[], Split]] = {
        "train": lambda: folder.training(asked),
        "val": lambda: folder.validation(asked),
    }
    if folder.config.train not in folder.layout.splits:
        choices = {name: partial(folder.split, name, asked) for name in usual_splits(folder.layout)}
    read = {}
    for name, choose in choices.items():
        where = folder.layout.splits.get(name)
        try:
            read[name] = CocoSplit(choose(), FIELDS, keep_annotations=False)
        except UserError as error:
            path = str(folder.layout.root if where is None else where.annotations)
            report.splits[prefix + name] = SplitReport(path, error=str(error))
    return read


def _read_test(folder: Folder, read: dict[str, CocoSplit], prefix: str, report: Report) -> None:
    """Add the split ``test`` where there is one. No training reads it, so nothing in it is a reason to refuse."""
    if "test" not in folder.layout.splits or "test" in (*read, folder.config.train, folder.config.val):
        return
    split = folder.split("test", known_tasks())
    try:
        read["test"] = CocoSplit(split, FIELDS, keep_annotations=False)
    except UserError as error:
        report.splits[f"{prefix}test"] = SplitReport(
            str(split.annotations), error=f"{error} (training does not use it)"
        )
        return
    if "train" in read:
        report.problems += compare_splits(read["train"], read["test"], "test")


def _with_every_field(folder: Folder, split: CocoSplit) -> CocoSplit:
    """The split with COCO's second file, that of keypoints, where a training of other tasks leaves it aside."""
    every = folder.split(split.split.name, known_tasks())
    if (every.annotations, every.keypoints) == (split.split.annotations, split.split.keypoints):
        return split
    try:
        files = replace(split.split, annotations=every.annotations, keypoints=every.keypoints)
        return CocoSplit(files, FIELDS, keep_annotations=False)
    except UserError as error:
        split.problems.add("file of keypoints that cannot be read", str(error), "keypoints")
        return split


def _reason(task: str, parts: Sequence[dict[str, CocoSplit]]) -> str | None:
    """Why no data set can serve a task; None where one can."""
    reasons = []
    for part in parts:
        refusals = [refusal(split, task, empty_is_fine=name == "val") for name, split in part.items()]
        reasons.append(next(filter(None, refusals), None) if part else "no split of it can be read")
    return None if None in reasons else reasons[0]


def _count(split: CocoSplit) -> SplitReport:
    objects = split.labels
    real = ~objects.crowd
    per_image = np.diff(split.start)
    pixels = np.repeat([record.height * record.width for record in split.records], per_image)
    areas = (objects.areas * pixels)[real]
    sizes = Counter(f"{record.width} x {record.height}" for record in split.records)
    per_class = np.bincount(objects.labels[real], minlength=len(split.categories))
    images = np.repeat(np.arange(len(split)), per_image)
    of_image = np.bincount(images[real], minlength=len(split))
    usable = usable_objects(split)
    return SplitReport(
        annotations=str(split.split.annotations),
        images=len(split),
        empty_images=int((of_image == 0).sum()),
        objects=usable["boxes"],
        crowds=int(objects.crowd.sum()),
        with_masks=usable["masks"],
        with_keypoints=usable["keypoints"],
        classes={category.name: int(count) for category, count in zip(split.categories, per_class)},
        image_sizes=dict(sizes.most_common(5)),
        object_sizes={
            "small": int((areas < SMALL).sum()),
            "medium": int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
            "large": int((areas >= MEDIUM).sum()),
        },
        most_objects=int(of_image.max(initial=0)),
    )


def _decode(split: CocoSplit, progress: Callable[[int], object] | None) -> None:
    """Read every image, in threads (decoding releases the interpreter's lock); failures go to the split's problems."""
    dataset = Dataset(split, validate=False)

    def attempt(index: int) -> tuple[str, str] | None:
        if index in split.broken:
            return None  # named already
        try:
            image = dataset.image(index)
        except BadImage as error:
            return "image that cannot be read: never shown", f"{Path(error.path).name}: {error.reason}"
        record = split.records[index]
        if image.shape[:2] != (record.height, record.width):
            found = f"{image.shape[1]} x {image.shape[0]}, annotated as {record.width} x {record.height}"
            return "image of another size than annotated: labels are scaled", f"{record.file}: {found}"
        return None

    with ThreadPoolExecutor(cores()) as pool:
        for problem in pool.map(attempt, range(len(split))):
            if problem is not None:
                split.problems.add(*problem)
            if progress is not None:
                progress(1)


def _number(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _split_lines(split: SplitReport) -> list[str]:
    if split.error is not None:
        return [f"! {split.error}"]
    sizes = ", ".join(f"{size} ({count})" for size, count in split.image_sizes.items())
    objects = ", ".join(f"{count} {size}" for size, count in split.object_sizes.items())
    return [
        f"images       {split.images} ({split.empty_images} without objects): {sizes}",
        f"objects      {split.objects} (at most {split.most_objects} in an image): {objects}; {split.crowds} crowds",
        f"with masks   {split.with_masks}",
        f"with points  {split.with_keypoints}",
        f"classes      {_class_list(split.classes)}",
        "files        " + ("all images read" if split.decoded else "not opened (quick check)"),
        *_tile_lines(split.tiles),
    ]


def _tile_lines(tiles: TileReport | None) -> list[str]:
    if tiles is None:
        return []
    shown = [f"  by class   {_class_list(tiles.classes)}"] if tiles.trained else []
    return [*tiles.lines(), *shown, *(f"! {problem}" for problem in tiles.problems)]


def _class_list(classes: Mapping[str, int]) -> str:
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{shortened(printable(name), MAX_NAME)} {count}" for name, count in ranked[:LISTED])
    return f"{len(ranked)}: {shown}" + (f", and {len(ranked) - LISTED} more" if len(ranked) > LISTED else "")

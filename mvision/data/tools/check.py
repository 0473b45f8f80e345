"""``mvision data check``: numbers of every split, what is wrong with it, and a verdict."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mvision.data.formats.coco import FIELDS, CocoSplit
from mvision.data.formats.layouts import Layout, usual_splits
from mvision.data.formats.problems import Problem, Problems
from mvision.data.loading.dataset import Dataset
from mvision.errors import UserError
from mvision.heads import head_class, known_tasks
from mvision.machine import cores
from mvision.structures.images import BadImage

SMALL, MEDIUM = 32**2, 96**2  # COCO's limits of object area in pixels
LISTED = 30  # classes shown in the text


@dataclass
class SplitReport:
    """The figures of one split.

    Attributes:
        annotations: the file.
        error: why the split cannot be used at all; everything else is empty then.
        images, empty_images: how many, and how many of them without any object.
        objects, crowds: labelled objects, and regions marked ``iscrowd``.
        with_masks, with_keypoints: objects that have a usable outline, or at least one labelled keypoint.
        classes: objects by class name.
        image_sizes: the most frequent "width x height" with their counts.
        object_sizes: objects by COCO's limits of area: small < 32 x 32 <= medium < 96 x 96 <= large, in pixels.
        most_objects: in one image.
        decoded: whether every image was read, not only its entry.
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
    problems: list[Problem] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The tasks that the split can train: those whose head needs no more than its objects have."""
        counts = {"boxes": self.objects, "masks": self.with_masks, "keypoints": self.with_keypoints}
        return [task for task in known_tasks() if all(counts.get(field) for field in head_class(task).needs)]


@dataclass
class Report:
    """A whole data set: its layout, its splits, and faults that concern several of them."""

    layout: str
    splits: dict[str, SplitReport]
    problems: list[Problem] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether every checked split can be used."""
        return all(split.error is None for split in self.splits.values())

    @property
    def verdict(self) -> str:
        """One line."""
        for name, split in self.splits.items():
            if split.error is not None:
                return f"not usable: {name}: {split.error}"
        kinds = [*self.problems, *(problem for split in self.splits.values() for problem in split.problems)]
        tasks = [split.tasks for split in self.splits.values()]
        common = [task for task in tasks[0] if all(task in others for others in tasks)] if tasks else []
        able = f"every split can serve {', '.join(common)}" if common else "no task can be served by every split"
        if kinds:
            return f"usable with {sum(problem.count for problem in kinds)} problems of {len(kinds)} kinds: {able}"
        return f"sound: {able}"

    def text(self) -> str:
        """For the terminal."""
        lines = [self.layout]
        for name, split in self.splits.items():
            lines += ["", f"{name}: {split.annotations}", *(f"  {line}" for line in _split_lines(split))]
        if self.problems:
            lines += ["", "between the splits", *(f"  ! {problem}" for problem in self.problems)]
        return "\n".join([*lines, "", self.verdict])


def check(
    layout: Layout,
    splits: Sequence[str] | None = None,
    quick: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Read everything and report.

    Args:
        layout: from ``find_layout``.
        splits: names; None: train, val and test where they exist, else all.
        quick: the annotations only; images are not opened.
        progress: called with the number of images just read.

    Raises:
        UserError: a split that the layout does not have. Broken files are reported, not raised.
    """
    names = list(splits) if splits else usual_splits(layout)
    read: dict[str, CocoSplit] = {}
    reports: dict[str, SplitReport] = {}
    for name in names:
        split = layout.split(name, FIELDS)
        try:
            read[name] = CocoSplit(split, FIELDS, keep_annotations=False)
        except UserError as error:
            reports[name] = SplitReport(str(split.annotations), error=str(error))
            continue
        reports[name] = _count(read[name])
        if not quick:
            _decode(read[name], progress)
            reports[name].decoded = True
        reports[name].problems = list(read[name].problems)
    return Report(layout.description, reports, list(_between(read)))


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
    outlines = objects.outlines
    return SplitReport(
        annotations=str(split.split.annotations),
        images=len(split),
        empty_images=int((of_image == 0).sum()),
        objects=int(real.sum()),
        crowds=int(objects.crowd.sum()),
        with_masks=0 if outlines is None else sum(outlines[int(i)] is not None for i in np.flatnonzero(real)),
        with_keypoints=0 if objects.keypoints is None else int((objects.keypoints[real, :, 2] > 0).any(axis=1).sum()),
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
        try:
            image = dataset.image(index)
        except BadImage as error:
            return "image that cannot be read", f"{Path(error.path).name}: {error.reason}"
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


def _between(splits: dict[str, CocoSplit]) -> Problems:
    problems = Problems()
    if "train" not in splits:
        return problems
    train = splits["train"]
    trained = {os.path.realpath(train.folder / record.file) for record in train.records}
    names = [(category.id, category.name) for category in train.categories]
    seen = {train.categories[label].name for label in np.unique(train.labels.labels)}
    for name, split in splits.items():
        if name == "train":
            continue
        if [(category.id, category.name) for category in split.categories] != names:
            problems.add(f"categories of {name} that differ from those of train", str(split.split.annotations))
        for record in split.records:
            if os.path.realpath(split.folder / record.file) in trained:
                problems.add(f"image of {name} that is in train too", record.file)
        for label in np.unique(split.labels.labels):
            if split.categories[label].name not in seen:
                problems.add(f"class of {name} without an object in train", split.categories[label].name)
    return problems


def _split_lines(split: SplitReport) -> list[str]:
    if split.error is not None:
        return [f"! {split.error}"]
    sizes = ", ".join(f"{size} ({count})" for size, count in split.image_sizes.items())
    ranked = sorted(split.classes.items(), key=lambda item: -item[1])
    classes = ", ".join(f"{name} {count}" for name, count in ranked[:LISTED])
    rest = f", and {len(ranked) - LISTED} more" if len(ranked) > LISTED else ""
    objects = ", ".join(f"{count} {size}" for size, count in split.object_sizes.items())
    return [
        f"images       {split.images} ({split.empty_images} without objects): {sizes}",
        f"objects      {split.objects} (at most {split.most_objects} in an image): {objects}; {split.crowds} crowds",
        f"with masks   {split.with_masks}",
        f"with points  {split.with_keypoints}",
        f"classes      {len(ranked)}: {classes}{rest}",
        "files        " + ("all images read" if split.decoded else "not opened (quick check)"),
        *(f"! {problem}" for problem in split.problems),
    ]

"""Training and evaluation samples.

A sample is a function of (seed, epoch, index) alone: the process that loads it and the order of loading change nothing.
Where an epoch shows an image several times, it also depends on how often it did so before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils import data

from mvision.config import AugmentConfig
from mvision.data.augment.geometry import draw_masks, mirror_keypoints
from mvision.data.augment.transforms import EvalTransform, TrainTransform
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.labels import PictureLabels
from mvision.data.loading.cache import ImageCache
from mvision.errors import UserError
from mvision.heads import head_class, known_tasks
from mvision.structures import Instances, Targets
from mvision.structures.images import BadImage, PixelRange, read_image
from mvision.structures.masks import Masks, encode_mask

ATTEMPTS = 10  # images tried in place of a damaged one
ASPECT_TOLERANCE = 0.03


@dataclass(frozen=True)
class SampleKey:
    """One sample of a data set, as a sampler asks for it.

    Attributes:
        epoch: counted from 0.
        index: of the image.
        image_size: (height, width) of the sample in pixels.
        light: without mosaic, mixup, pasted objects and zoom-out (the end of a run).
        repeat: how often the epoch showed the image before.
        mixing: mosaic, mixup and pasted objects are allowed.
    """

    epoch: int
    index: int
    image_size: tuple[int, int]
    light: bool = False
    repeat: int = 0
    mixing: bool = True


@dataclass
class Sample:
    """One picture for the model with its labels.

    Attributes:
        image: (h, w, 3) uint8 RGB, None where neither the image nor one in its place could be read.
        targets: its labels, None without image.
        skipped: (file, reason) of images that could not be read.
    """

    image: np.ndarray | None
    targets: Targets | None
    skipped: list[tuple[str, str]] = field(default_factory=list)


class Transform(Protocol):
    """``EvalTransform`` and ``TrainTransform``."""

    def __call__(
        self, source: Dataset, index: int, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, PictureLabels]: ...


class Dataset(data.Dataset[Sample]):
    """Images and labels of one split; ``dataset[SampleKey(...)]`` is a ``Sample``.

    Without ``augment`` the whole image is stretched to the size asked for and nothing is left to chance.
    """

    def __init__(
        self,
        split: CocoSplit,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        mask_stride: int | None = 1,
        cache: ImageCache | None = None,
        validate: bool = True,
        tasks: Collection[str] | None = None,
        reduce: bool = True,
        pixel_range: PixelRange | None = None,
    ) -> None:
        """Prepare the samples of a split.

        Args:
            split: read with the ``fields`` that the targets shall have.
            augment: training augmentation; None for evaluation.
            seed: of all augmentation.
            mask_stride: masks are drawn at 1 / stride of the input size; None leaves them out of the targets.
            cache: keeps decoded images in memory between epochs.
            validate: insist that the annotations have what was asked for; off for looking at a data set.
            tasks: what the labels are used for, see ``Targets.tasks``; None: all for which there are some.
            reduce: decode a large JPEG at a part of its size where a sample needs no more. It gives slightly other
                pixels, so that it may not depend on whether there was memory for a ``cache`` (which has whole images).
            pixel_range: see ``read_image``.

        Raises:
            UserError: masks or keypoints are asked for, and the annotations have none, or see ``TrainTransform``.
        """
        if validate:
            require_fields(split)
        self.records = split.records
        self.split_labels, self.start = split.labels, split.start
        self.folder = split.folder
        self.categories = split.categories
        self.labelled_classes = split.labelled_classes
        self.tasks = None if tasks is None else frozenset(tasks)
        self.seed = seed
        self.mask_stride = mask_stride
        self.cache = cache
        self.reduce = reduce and cache is None
        self.pixel_range = pixel_range
        self.augmented = augment is not None
        self.transform: Transform
        self.unmixed: Transform
        self.light: Transform
        if augment is None:
            self.transform = self.unmixed = self.light = EvalTransform()
        else:
            train = TrainTransform(augment, mirror_keypoints(split.categories))
            self.transform, self.unmixed, self.light = train, train.unmixed(), train.light()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of a key; a damaged image of a training set is replaced by one drawn from the same numbers."""
        skipped: list[tuple[str, str]] = []
        index = key.index
        for attempt in range(ATTEMPTS if self.augmented else 1):
            # Where many files are damaged, a mosaic of four is unlikely to succeed: the later attempts are without.
            transform = self.transform if key.mixing else self.unmixed
            transform = self.light if key.light or attempt >= ATTEMPTS // 2 else transform
            more = (key.repeat,) if key.repeat else ()
            rng = np.random.default_rng((self.seed, key.epoch, key.index, attempt, *more))
            try:
                image, labels = transform(self, index, key.image_size, rng)
            except BadImage as error:
                skipped.append((error.path, error.reason))
                if error.path == str(self.path(index)):  # else it was another image of a mosaic or the like
                    index = int(rng.integers(len(self)))
                continue
            return Sample(image, self._targets(labels, index, key.image_size), skipped)
        return Sample(None, None, skipped)

    def labels(self, index: int) -> PictureLabels:
        """Labels of one image as it was read, crowd regions among them."""
        return self.split_labels.picture(slice(int(self.start[index]), int(self.start[index + 1])))

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 RGB of one image in the geometry that its annotations assume.

        Raises:
            BadImage: it cannot be read, or has another shape than its annotations say.
        """
        if self.cache is None:
            return self._read(index, at_least if self.reduce else None)
        image = self.cache.get(index)
        if image is None:
            image = self._read(index, None)
            self.cache.put(index, image)
        return image

    def aspect(self, index: int) -> float:
        """Width by height of one image."""
        return self.records[index].width / self.records[index].height

    def path(self, index: int) -> Path:
        """File of one image."""
        return self.folder / self.records[index].file

    def truth(self, index: int) -> tuple[np.ndarray, Instances]:
        """One image as it is, with what it is labelled with: for drawing. Pixels, score 1, crowd regions left out.

        Raises:
            BadImage: it cannot be read.
        """
        image, labels = self.image(index), self.labels(index)
        return image, self.to_instances(labels[~labels.crowd], image.shape[:2], str(self.path(index)))

    def to_instances(self, labels: PictureLabels, size: tuple[int, int], path: str | None = None) -> Instances:
        """Labels in pixels of a picture of this (height, width)."""
        height, width = size
        keypoints = None
        if labels.keypoints is not None:
            keypoints = (labels.keypoints * (width, height, 1)).astype(np.float32)
            keypoints[..., 2] = keypoints[..., 2] > 0
        return Instances(
            boxes=(labels.boxes * (width, height, width, height)).astype(np.float32),
            scores=np.ones(len(labels), dtype=np.float32),
            labels=labels.labels,
            size=(height, width),
            categories=self.categories,
            masks=None if labels.outlines is None else _masks(labels, (height, width)),
            keypoints=keypoints,
            path=path,
        )

    def _read(self, index: int, at_least: tuple[int, int] | None) -> np.ndarray:
        path, record = self.path(index), self.records[index]
        image = read_image(path, at_least, pixel_range=self.pixel_range)
        aspect = image.shape[1] / image.shape[0]
        if abs(aspect / self.aspect(index) - 1) > ASPECT_TOLERANCE:
            # Some tools label the picture as stored and ignore the camera's orientation.
            turned = read_image(path, at_least, rotate=False, pixel_range=self.pixel_range)
            if abs(turned.shape[1] / turned.shape[0] / self.aspect(index) - 1) > ASPECT_TOLERANCE:
                height, width = image.shape[:2]
                raise BadImage(path, f"is {width} x {height}, its annotations are for {record.width} x {record.height}")
            return turned
        return image

    def _targets(self, labels: PictureLabels, index: int, size: tuple[int, int]) -> Targets:
        crowds = labels[labels.crowd] if labels.crowd.any() else None
        labels = labels if crowds is None else labels[~labels.crowd]
        record = self.records[index]
        masks = ignored = None
        outlines, stride = labels.outlines, self.mask_stride
        labelled = outlines is not None and (len(outlines) == 0 or any(outline is not None for outline in outlines))
        if labelled and stride is not None:
            grid = (-(-size[0] // stride), -(-size[1] // stride))
            masks = torch.from_numpy(draw_masks(labels, grid))
            ignored = None if crowds is None else torch.from_numpy(_regions(crowds, grid))
        keypoints = None if labels.keypoints is None else torch.from_numpy(labels.keypoints.astype(np.float32))
        return Targets(
            boxes=torch.from_numpy(_cxcywh(labels.boxes)),
            labels=torch.from_numpy(labels.labels.astype(np.int64)),
            areas=torch.from_numpy(labels.areas.astype(np.float32)),
            masks=masks,
            keypoints=keypoints,
            image_id=record.id,
            size=(record.height, record.width),
            labelled_classes=None if self.labelled_classes is None else torch.from_numpy(self.labelled_classes),
            tasks=self.tasks,
            ignored=ignored,
        )


class MixedDataset(data.Dataset[Sample]):
    """The samples of several data sets, one after the other. Mosaics and the like take the images of one."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = list(datasets)
        self.start = np.cumsum([0, *map(len, datasets)])
        self.augmented = all(dataset.augmented for dataset in datasets)

    def __len__(self) -> int:
        return int(self.start[-1])

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of a key, whose index counts through all data sets."""
        number = int(np.searchsorted(self.start, key.index, side="right")) - 1
        return self.datasets[number][replace(key, index=key.index - int(self.start[number]))]


def require_fields(split: CocoSplit) -> None:
    """Masks and keypoints that were asked for have to be in the annotations, if there are any.

    Raises:
        UserError: they are not.
    """
    if split.annotated == 0:
        return  # a validation set of images without objects
    for name in sorted(split.fields - split.available):
        tasks = [task for task in known_tasks() if name in head_class(task).needs]
        needed = f"the task{'s' * (len(tasks) > 1)} {' and '.join(tasks)} need{'s' * (len(tasks) == 1)}"
        raise UserError(f"{split.split.annotations}: no object in it has {name}, which {needed}")


def _masks(labels: PictureLabels, size: tuple[int, int]) -> Masks:
    """Drawn one at a time: together they would fill the memory on large images."""
    return Masks((encode_mask(draw_masks(labels, size, np.array([index]))[0]) for index in range(len(labels))), size)


def _regions(crowds: PictureLabels, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8: 1 in crowd regions, all of the box where one has no outline."""
    height, width = size
    region = np.array(draw_masks(crowds, size).any(axis=0), dtype=np.uint8)
    for box, outline in zip(crowds.boxes, () if crowds.outlines is None else crowds.outlines):
        if outline is None:
            left, top, right, bottom = (box * (width, height, width, height)).tolist()
            region[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = 1
    return region


def _cxcywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), axis=1).astype(np.float32)

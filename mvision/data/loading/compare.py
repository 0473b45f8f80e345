"""What is wrong with splits beyond their annotations: with their pictures, between two of them, for a model."""

from __future__ import annotations

import numpy as np

from mvision.config import AugmentConfig
from mvision.config.tiles import TileConfig
from mvision.data.augment.copy_paste import most_pasted
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import Layout
from mvision.data.formats.problems import Problems
from mvision.data.loading.dataset import Dataset
from mvision.data.loading.folders import needs
from mvision.data.loading.tiles import is_read_in_parts
from mvision.errors import UserError
from mvision.settings import Settings
from mvision.structures.images import BadImage

MOSAIC_SHARE = {"filled": 0.5, "whole": 0.8}
"""The mean share of the objects of four images that is visible in a mosaic of them."""


def refuse_unreadable(split: CocoSplit, tile: TileConfig | None = None) -> None:
    """One picture has to be readable; in a sound data set the first one is, and no other is opened.

    Args:
        tile: with tiles, it is enough that a large one is read in parts.

    Raises:
        UserError: none of them can be read.
    """
    dataset, reasons = Dataset(split, validate=False), []
    for index in range(len(split)):
        try:
            dataset.image(index, at_least=(1, 1))
        except BadImage as error:
            if tile is not None and is_read_in_parts(dataset.path(index), tile):
                return
            reasons.append(error)
        else:
            return
    raise UserError(f"{split.split.annotations}: none of its {len(split)} images can be read: {reasons[0]}, ...")


def count_above_queries(split: CocoSplit, task: str, settings: Settings | None) -> None:
    """Count the images with more objects than the task's head can find, if its settings limit them."""
    name = next((name for name in ("num_queries", "num_instances") if hasattr(settings, name)), None)
    if name is None:
        return
    queries = getattr(settings, name)
    counted = ~split.labels.crowd
    if "keypoints" in needs([task]):  # objects of other classes are not found by a head for poses
        counted &= np.array([bool(category.keypoints) for category in split.categories])[split.labels.labels]
    objects = np.bincount(_images(split)[counted], minlength=len(split))
    most = int(objects.max(initial=0))
    kind = (
        f"image with more objects than the {queries} that {task} can find: raise them with "
        f"-o model.heads.{task}.{name}={most}"
    )
    for index in np.flatnonzero(objects > queries):
        split.problems.add(kind, f"{split.records[index].file}: {objects[index]}")


def count_below_pixel(split: CocoSplit, image_size: tuple[int, int], tile: TileConfig | None) -> None:
    """Count the objects that are smaller than a pixel once their picture, or a tile of it, is stretched to the model's
    input: augmentation drops them, as ``TrainTransform`` says.

    Args:
        image_size: (height, width) of the input.
    """
    shown = np.array([(record.height, record.width) for record in split.records], dtype=np.float64).reshape(-1, 2)
    parts = shown / (shown if tile is None else np.minimum(shown, tile.size))  # pictures in tiles, along each side
    boxes, images = split.labels.boxes, _images(split)
    sides = (boxes[:, 2:] - boxes[:, :2]) * (parts * image_size)[images][:, ::-1]
    height, width = image_size
    remedy = "or data.tile" if tile is None else "or smaller tiles (data.tile)"
    kind = (
        f"object smaller than a pixel at model.image_size {width}x{height}: not learned unless a crop enlarges it; a "
        f"larger --image-size, {remedy}"
    )
    for row in np.flatnonzero((sides.prod(axis=1) < 1.0) & ~split.labels.crowd):
        split.problems.add(kind, f"{split.records[images[row]].file}: {sides[row, 0]:.2g} x {sides[row, 1]:.2g}")


def objects_of_mixed(split: CocoSplit, augment: AugmentConfig, samples: int = 4000) -> np.ndarray:
    """(samples,) float, sorted: about how many objects training pictures have while they are made of several images.

    From the numbers of objects in the images alone, without crops. They are drawn with a seed of their own.
    """
    rng = np.random.default_rng(0)
    objects = np.bincount(_images(split)[~split.labels.crowd], minlength=len(split))
    drawn = objects[rng.integers(len(objects), size=(samples, 2, 4))]  # two pictures of four images each
    in_mosaic = MOSAIC_SHARE[augment.mosaic_form] * drawn.sum(axis=-1)
    pictures = np.where(rng.random((samples, 2)) < augment.mosaic, in_mosaic, drawn[..., 0])
    second = rng.random(samples) < augment.mixup
    if augment.copy_paste:
        some = objects[objects > 0]
        pasted = rng.integers(1, most_pasted(rng.choice(some, (samples, 2))) + 1) if len(some) else 0
        pictures = pictures + (rng.random((samples, 2)) < augment.copy_paste) * pasted
    return np.sort(pictures[:, 0] + second * pictures[:, 1])


def compare_splits(train: CocoSplit, other: CocoSplit, name: str) -> Problems:
    """What another split has in common with the training set and should not, and the other way round.

    Args:
        name: of the other split.
    """
    problems = Problems()
    trained = set(train.real_files)
    for record, file in zip(other.records, other.real_files):
        if file in trained:
            problems.add(f"image of {name} that is in train too", record.file)
    ours, theirs = ({category.name: category.name for category in split.own} for split in (train, other))
    folded = {own.casefold().strip(): own for own in ours}
    for own in theirs.keys() - ours.keys():
        alike = folded.get(own.casefold().strip())
        problems.add(
            f"class of {name} that train does not have: nothing is measured for it",
            f"{own!r}{f', train has {alike!r}' if alike else ''}",
        )
    for own in ours.keys() - theirs.keys():
        problems.add(f"class of train that {name} does not have: nothing is measured for it", own)
    seen = {train.categories[label].name for label in np.unique(train.labels.labels)}
    for label in np.unique(other.labels.labels):
        own = other.categories[label].name
        if own not in seen and own in ours:
            problems.add(f"class of {name} without an object in train", own)
    return problems


def count_unlisted(train: CocoSplit, val: CocoSplit, layout: Layout, problems: Problems) -> None:
    """Count the pictures beside those of both splits that no annotation file lists. They may belong to other splits:
    nothing is said where there are any in the same folders, or where a share of the images is left out on purpose."""
    parts = [*train.split.parts, *val.split.parts]
    ours = {path for split in parts for path in (split.annotations, split.keypoints)}
    folders = {split.images for split in parts}
    shared = any(other.annotations not in ours and other.images in folders for other in layout.splits.values())
    if shared or train.split.fraction < 1 or train.split.yolo is not None:
        return
    listed = {*train.real_files, *val.real_files}
    for path in sorted({*train.unlisted, *val.unlisted} - listed):
        problems.add("picture that the annotations do not list: not used", path)


def _images(split: CocoSplit) -> np.ndarray:
    """(N,) the image of every object."""
    return np.repeat(np.arange(len(split)), np.diff(split.start))

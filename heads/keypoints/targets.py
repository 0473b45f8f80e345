"""The labels of a batch, as keypoint heads learn them: everything that follows from labels alone, computed on the CPU.

The M objects of a batch form one list, each with the index of its image. A head's sets of last layers share the list:
first come the objects that the first set learns, then those of the next one. So one operator serves all sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvision.heads.query.matching import labelled_classes
from mvision.structures import Category, Targets
from mvision.structures.oks import keypoint_sigmas
from mvision.structures.transfer import to_device


@dataclass
class ClassTables:
    """What keypoint heads know about the classes of the data, on the CPU.

    ``sigmas`` (categories, K) float32 and ``point_exists`` (categories, K) bool: which of the K points a class has.
    """

    sigmas: np.ndarray
    point_exists: np.ndarray

    @classmethod
    def of(cls, categories: Sequence[Category]) -> ClassTables:
        """K is the largest number of keypoints that a class has."""
        counts = np.array([len(category.keypoints) for category in categories])
        point_exists = np.arange(counts.max(initial=0)) < counts[:, None]
        sigmas = np.ones(point_exists.shape, dtype=np.float32)
        for row, category in enumerate(categories):
            sigmas[row, : counts[row]] = keypoint_sigmas(category)
        return cls(sigmas, point_exists)


@dataclass
class Poses:
    """The P objects with labelled points that the first set of last layers learns.

    Attributes:
        row: (P,) int64, index of the object among the M of ``KeypointTargets``.
        image: (P,) int64, index of its image in the batch.
        number: (P,) int64, how many of the P objects come before it in its image.
        most: the largest number of these objects in an image.
        boxes, points, areas, scale, sigmas: (P, ...), see ``KeypointTargets``.
    """

    row: Tensor
    image: Tensor
    number: Tensor
    most: int
    boxes: Tensor
    points: Tensor
    areas: Tensor
    scale: Tensor
    sigmas: Tensor


@dataclass
class KeypointTargets:
    """The objects of a batch that sets of last layers learn, one set after the other, M in all.

    Most of it is on the device of the predictions, in their precision; what the CPU has to know is in numbers.

    Attributes:
        sizes: how many of the M objects each set learns.
        counts: how many objects of each image the first set learns.
        any_ignored: some grid points are ignored, see ``ignored_grid_points``.
        image: (M,) int64, index of the object's image in the batch, ascending in each set.
        classes: (M,) int64, index among the C classes that the set predicts.
        boxes: (M, 4) cxcywh in 0..1.
        points: (M, K, 3) x, y in 0..1 and visibility; 0 means not labelled.
        areas: (M,) as a fraction of the image.
        scale: (M, 2) factors for x and y that turn fractions of width and height into lengths in an image of area 1
            with the same aspect ratio.
        sigmas: (M, K) of the object's class.
        point_exists: (M, K) bool: which of the K points the object's class has.
        is_labelled: (M,) bool: at least one point of the object is labelled.
        class_has_points: (M,) bool: the object's class has keypoints, labelled or not.
        images_without_keypoints: (B,) bool: images whose annotations have no keypoints at all.
        labelled_classes: for each set (B, C) or (B, 1) bool: which of the predicted classes were labelled in each
            image, see ``Targets.labelled_classes``; None: all in all images.
        poses: those that heatmaps are learned from.
    """

    sizes: list[int]
    counts: list[int]
    any_ignored: bool
    image: Tensor
    classes: Tensor
    boxes: Tensor
    points: Tensor
    areas: Tensor
    scale: Tensor
    sigmas: Tensor
    point_exists: Tensor
    is_labelled: Tensor
    class_has_points: Tensor
    images_without_keypoints: Tensor
    labelled_classes: list[Tensor | None]
    poses: Poses


def keypoint_targets(
    targets: list[Targets],
    predicted: Sequence[Sequence[int]],
    tables: ClassTables,
    shape: tuple[int, int],
    like: Tensor,
) -> KeypointTargets:
    """Collect the objects that a keypoint head learns: all of it on the CPU, and then moved in one copy.

    Args:
        predicted: for every set of last layers the labels of the classes that it predicts.
        shape: height and width of the input, used for images whose original size is not known.
        like: a tensor with the device and the precision of the result.
    """
    objects = collect_objects(targets, tables, shape)
    rows, classes = [], []
    for own in predicted:
        place = np.full(len(tables.sigmas), -1)
        place[list(own)] = np.arange(len(own))
        of_class = place[objects["labels"]]
        rows.append((of_class >= 0).nonzero()[0])
        classes.append(of_class[rows[-1]])
    learned = {name: values[np.concatenate(rows)] for name, values in objects.items()}
    del learned["labels"]
    learned["classes"] = np.concatenate(classes)
    first = {name: values[: len(rows[0])] for name, values in learned.items()}
    counts = np.bincount(first["image"], minlength=len(targets))
    poses, most = _poses(first, len(targets))
    without = np.array([target.keypoints is None for target in targets])
    labelled = labelled_classes(targets)
    packed = {
        **{name: _tensor(values, like.dtype) for name, values in learned.items()},
        **{f"poses_{name}": _tensor(values, like.dtype) for name, values in poses.items()},
        "images_without_keypoints": torch.from_numpy(without),
    }
    if labelled is not None:
        for index, own in enumerate(predicted):
            packed[f"labelled_{index}"] = labelled if labelled.shape[1] == 1 else labelled[:, list(own)]
    moved = to_device(packed, like.device)
    return KeypointTargets(
        sizes=[len(row) for row in rows],
        counts=counts.tolist(),
        any_ignored=bool(without.any() or (first["class_has_points"] & ~first["is_labelled"]).any()),
        **{name: moved[name] for name in (*learned, "images_without_keypoints")},
        labelled_classes=[moved.get(f"labelled_{index}") for index in range(len(predicted))],
        poses=Poses(most=most, **{name: moved[f"poses_{name}"] for name in poses}),
    )


def collect_objects(targets: list[Targets], tables: ClassTables, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """All objects of a batch, image by image: the fields of ``KeypointTargets`` that do not depend on a set, and
    ``labels``.
    """
    num_points = tables.sigmas.shape[1]
    image = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
    labels = np.concatenate([target.labels.cpu().numpy() for target in targets])
    points = np.concatenate(
        [
            np.zeros((len(target), num_points, 3), np.float32)
            if target.keypoints is None
            else target.keypoints.cpu().numpy()
            for target in targets
        ]
    )
    return {
        "image": image,
        "labels": labels,
        "boxes": np.concatenate([target.boxes.cpu().numpy() for target in targets]),
        "points": points,
        "areas": np.concatenate([target.areas.cpu().numpy() for target in targets]),
        "scale": image_scales(targets, shape)[image],
        "sigmas": tables.sigmas[labels],
        "point_exists": tables.point_exists[labels],
        "is_labelled": (points[..., 2] > 0).any(-1),
        "class_has_points": tables.point_exists[labels].any(-1),
    }


def image_scales(targets: list[Targets], shape: tuple[int, int]) -> np.ndarray:
    """(B, 2), ``KeypointTargets.scale`` of every image."""
    heights, widths = np.array([target.size if all(target.size) else shape for target in targets]).T
    aspect = np.sqrt(widths / heights)
    return np.stack((aspect, 1 / aspect), -1)


def _poses(objects: dict[str, np.ndarray], batch: int) -> tuple[dict[str, np.ndarray], int]:
    """The fields of ``Poses``, and ``Poses.most``."""
    row = objects["is_labelled"].nonzero()[0]
    image = objects["image"][row]
    counts = np.bincount(image, minlength=batch)
    number = np.arange(len(row)) - (counts.cumsum() - counts)[image]
    copied = {name: objects[name][row] for name in ("boxes", "points", "areas", "scale", "sigmas")}
    return {"row": row, "image": image, "number": number, **copied}, int(counts.max(initial=0))


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

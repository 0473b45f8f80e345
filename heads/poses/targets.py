"""The labels of a batch, as query poses learn them: all of it computed on the CPU, and then moved in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvision.heads.keypoints.targets import ClassTables, collect_objects, image_scales
from mvision.heads.poses.denoising import noisy_poses
from mvision.heads.poses.outputs import PoseDenoising
from mvision.heads.query.denoising import attention_mask
from mvision.heads.query.matching import Matches, denoising_pairs, divisor, labelled_classes
from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.transfer import to_device

EVERYWHERE = np.array([[-np.inf, -np.inf, np.inf, np.inf]], dtype=np.float32)


@dataclass
class PoseTargets:
    """The poses of a batch, padded to the largest number T of them in one of its images.

    They are the objects of the C predicted classes that have at least one labelled point. What is padded has no
    labelled point.

    Attributes:
        labels: (B, T) int64 among the C classes; 0 where padded.
        points: (B, T, K, 3) x, y in 0..1 and visibility; 0 means not labelled.
        boxes: (B, T, 4) cxcywh in 0..1.
        areas: (B, T) as a fraction of the image.
        sigmas: (B, T, K) of the object's class.
        point_exists: (B, T, K) bool: which of the K points the object's class has.
        scale: (B, 2) factors for x and y that turn fractions of width and height into lengths in an image of area 1
            with the same aspect ratio.
        counts: number of poses in each image.
        total: the batch's number of poses, see ``divisor``.
        labelled_classes: (B, C) or (B, 1) bool, see ``Targets.labelled_classes``; None: all in all images.
        ignored: (B, U, 4) xyxy in 0..1, regions in which a query that matches no pose is no negative: objects of
            predicted classes without labelled points, and all of an image whose annotations have no keypoints. Padded
            with boxes of no size; None if there are none.
        denoising: the queries made from the poses; None where they are off or the batch has no pose.
        groups: number of copies of every pose among them.
    """

    labels: Tensor
    points: Tensor
    boxes: Tensor
    areas: Tensor
    sigmas: Tensor
    point_exists: Tensor
    scale: Tensor
    counts: list[int]
    total: float | Tensor
    labelled_classes: Tensor | None
    ignored: Tensor | None
    denoising: PoseDenoising | None
    groups: int

    @property
    def valid(self) -> Tensor:
        """(B, T) bool, False where padded."""
        return (self.points[..., 2] > 0).any(-1)


def pose_targets(
    targets: list[Targets],
    classes: Sequence[int],
    tables: ClassTables,
    shape: tuple[int, int],
    like: Tensor,
    num_queries: int,
    num_layers: int = 1,
    num_denoising: int = 0,
    label_noise: float = 0.5,
) -> PoseTargets:
    """Collect the poses of a batch and what denoising makes of them.

    Args:
        targets: labels on the CPU.
        classes: labels of the C classes that are predicted.
        tables: of all classes.
        shape: height and width of the input, used for images whose original size is not known.
        like: a tensor with the device and the precision of the result.
        num_queries: selected queries, which follow on the denoising queries in the decoder.
        num_layers: sets of predictions that the decoder makes of denoising queries, of which each has the same pairs.
        num_denoising: intended number of positive denoising queries per image: as many whole groups as fit, but at
            least one; 0 for none.
        label_noise: see ``noisy_poses``.
    """
    objects = collect_objects(targets, tables, shape)
    place = np.full(len(tables.sigmas), -1)
    place[list(classes)] = np.arange(len(classes))
    of_class = place[objects["labels"]]
    learned = (of_class >= 0) & objects["is_labelled"]
    packed, counts = _padded(objects, of_class, learned, len(targets), like.dtype)
    packed["scale"] = torch.from_numpy(image_scales(targets, shape)).to(like.dtype)
    groups = max(1, num_denoising // max(counts)) if num_denoising > 0 and any(counts) else 0
    pairs = denoising_pairs(counts, groups, num_layers)
    sent = {**packed, "pairs": torch.from_numpy(pairs.T.copy())}
    if groups:
        valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        own = {name: value for name, value in packed.items() if name != "point_exists"} | {"valid": valid}
        made = noisy_poses(**own, groups=groups, num_classes=len(classes), label_noise=label_noise)
        sent |= dict(zip(("noisy_labels", "noisy_points"), made))
    if (ignored := _ignored(targets, objects, (of_class >= 0) & ~objects["is_labelled"], like.dtype)) is not None:
        sent["ignored"] = ignored
    if (labelled := labelled_classes(targets)) is not None:
        sent["labelled"] = labelled if labelled.shape[1] == 1 else labelled[:, list(classes)]
    moved = to_device(sent, like.device)
    denoising = None
    if groups:
        mask = attention_mask(groups, 2 * max(counts), num_queries, like.device)
        noisy = moved["noisy_labels"], moved["noisy_points"]
        denoising = PoseDenoising(*noisy, mask, Matches.of(pairs, moved["pairs"]))
    return PoseTargets(
        **{name: moved[name] for name in packed},
        counts=counts,
        total=divisor(sum(counts), like.device),
        labelled_classes=moved.get("labelled"),
        ignored=moved.get("ignored"),
        denoising=denoising,
        groups=groups,
    )


def _padded(
    objects: dict[str, np.ndarray], of_class: np.ndarray, learned: np.ndarray, batch: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[int]]:
    """The tensors (B, T, ...) of ``PoseTargets``, and how many poses each image has."""
    image = objects["image"][learned]
    counts = np.bincount(image, minlength=batch)
    number = np.arange(len(image)) - (counts.cumsum() - counts)[image]
    names = ("points", "boxes", "areas", "sigmas", "point_exists")
    rows = {"labels": of_class[learned], **{name: objects[name][learned] for name in names}}
    padded = {}
    for name, values in rows.items():
        # A sigma of 0 would divide by zero.
        block = np.full((batch, counts.max(initial=0), *values.shape[1:]), int(name == "sigmas"), values.dtype)
        block[image, number] = values
        tensor = torch.from_numpy(block)
        padded[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return padded, counts.tolist()


def _ignored(
    targets: list[Targets], objects: dict[str, np.ndarray], is_ignored: np.ndarray, dtype: torch.dtype
) -> Tensor | None:
    boxes = cxcywh_to_xyxy(torch.from_numpy(objects["boxes"])).numpy()
    regions = [
        EVERYWHERE if target.keypoints is None else boxes[is_ignored & (objects["image"] == index)]
        for index, target in enumerate(targets)
    ]
    most = max(map(len, regions))
    if not most:
        return None
    padded = np.zeros((len(targets), most, 4), np.float32)
    for row, of_image in zip(padded, regions):
        row[: len(of_image)] = of_image
    return torch.from_numpy(padded).to(dtype)

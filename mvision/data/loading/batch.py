"""Batches: what the model gets, and the flat form in which worker processes hand it over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mvision.data.loading.dataset import Sample
from mvision.structures import Targets


@dataclass
class Batch:
    """Pictures and labels of one step.

    Attributes:
        images: (B, 3, H, W) uint8 RGB, in channels_last memory order.
        targets: B labels.
        crowds: B tensors (M, 4) float32 cxcywh in 0..1: regions full of objects that are not labelled one by one. Never
            targets; a loss may leave out what it predicts there.
        skipped: (file, reason) of images that could not be read. In training others took their place, in evaluation
            they are missing from the batch.
    """

    images: Tensor
    targets: list[Targets]
    crowds: list[Tensor] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=[target.to(device, non_blocking) for target in self.targets],
            crowds=[crowd.to(device, non_blocking=non_blocking) for crowd in self.crowds],
        )


@dataclass
class PackedBatch:
    """A batch in few tensors: each tensor that leaves a worker costs a file descriptor and two system calls.

    ``boxes``, ``labels``, ``areas`` and ``crowds`` hold all objects one image after the other, ``masks`` and
    ``keypoints`` those of the images that have some; ``counts`` says how many belong to each image, with None in
    ``mask_counts`` and ``keypoint_counts`` for the others. ``labelled_classes`` has a row per image.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowds: Tensor
    masks: Tensor | None
    keypoints: Tensor | None
    labelled_classes: Tensor | None
    counts: list[int]
    mask_counts: list[int | None]
    keypoint_counts: list[int | None]
    crowd_counts: list[int]
    ids: list[int]
    sizes: list[tuple[int, int]]
    tasks: list[frozenset[str] | None]
    skipped: list[tuple[str, str]]

    def pin_memory(self) -> PackedBatch:
        """Called by the DataLoader's own thread."""
        pinned: dict[str, Any] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)

    def unpack(self) -> Batch:
        """One ``Targets`` per image; its tensors are views, nothing is copied."""
        boxes, labels, areas = (t.split(self.counts) for t in (self.boxes, self.labels, self.areas))
        masks = _split_some(self.masks, self.mask_counts)
        keypoints = _split_some(self.keypoints, self.keypoint_counts)
        targets = [
            Targets(
                boxes=boxes[i],
                labels=labels[i],
                areas=areas[i],
                masks=masks[i],
                keypoints=keypoints[i],
                image_id=self.ids[i],
                size=self.sizes[i],
                labelled_classes=None
                if self.labelled_classes is None or self.labelled_classes[i].all()
                else self.labelled_classes[i],
                tasks=self.tasks[i],
            )
            for i in range(len(self.counts))
        ]
        return Batch(self.images, targets, list(self.crowds.split(self.crowd_counts)), self.skipped)


def pack(samples: Sequence[Sample]) -> PackedBatch | list[tuple[str, str]]:
    """Collate samples; where none of them could be read, only the list of (file, reason)."""
    skipped = [entry for sample in samples for entry in sample.skipped]
    good = [(s.image, s.targets, s.crowds) for s in samples if s.image is not None and s.targets is not None]
    if not good:
        return skipped
    # default_collate stacks straight into shared memory where it runs in a worker.
    images = default_collate([torch.from_numpy(image) for image, _, _ in good]).permute(0, 3, 1, 2)
    targets = [target for _, target, _ in good]
    masks = [target.masks for target in targets if target.masks is not None]
    keypoints = [target.keypoints for target in targets if target.keypoints is not None]
    return PackedBatch(
        images=images,
        boxes=torch.cat([target.boxes for target in targets]),
        labels=torch.cat([target.labels for target in targets]),
        areas=torch.cat([target.areas for target in targets]),
        crowds=torch.cat([crowds for _, _, crowds in good]),
        masks=torch.cat(masks) if masks else None,
        keypoints=torch.cat(keypoints) if keypoints else None,
        labelled_classes=_labelled_classes(targets),
        counts=[len(target) for target in targets],
        mask_counts=[None if target.masks is None else len(target) for target in targets],
        keypoint_counts=[None if target.keypoints is None else len(target) for target in targets],
        crowd_counts=[len(crowds) for _, _, crowds in good],
        ids=[target.image_id for target in targets],
        sizes=[target.size for target in targets],
        tasks=[target.tasks for target in targets],
        skipped=skipped,
    )


def _labelled_classes(targets: list[Targets]) -> Tensor | None:
    """(B, C) bool, None where everything is known in every image."""
    given = next((target.labelled_classes for target in targets if target.labelled_classes is not None), None)
    if given is None:
        return None
    return torch.stack(
        [torch.ones_like(given) if target.labelled_classes is None else target.labelled_classes for target in targets]
    )


def _split_some(values: Tensor | None, counts: list[int | None]) -> list[Tensor | None]:
    """The rows of every image, None for the images that have none to have."""
    if values is None:
        return [None] * len(counts)
    pieces = iter(values.split([count for count in counts if count is not None]))
    return [None if count is None else next(pieces) for count in counts]

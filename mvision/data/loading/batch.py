"""Batches: what the model gets, and the form in which worker processes hand it over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from mvision.data.loading.dataset import Sample
from mvision.structures import Targets

Skipped = list[tuple[str, str]]
"""(file, reason) of images that could not be read."""


@dataclass
class Batch:
    """Images and labels of one step.

    Attributes:
        images: (B, 3, H, W) uint8 RGB, in channels_last memory order.
        targets: B labels.
        skipped: (file, reason) of images that could not be read, where no batch before has named them. In training
            others took their place, in evaluation they are missing from the batch.
    """

    images: Tensor
    targets: list[Targets]
    skipped: Skipped = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its images on another device. Heads move of the labels what they need, in one copy."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))


@dataclass
class PackedBatch:
    """A batch on its way out of a worker process.

    Every tensor that leaves a worker costs a file descriptor and two system calls, and a batch of 16 has more than 60.
    So the images, which are large, are a tensor in shared memory, and all labels are arrays, which are copied with the
    message. Median times of a batch with ``tiny`` on the built-in set (16 images of 192 x 192, one worker, two busy
    cores): 10 ms against 46 ms with tensors for all labels; with masks 18 ms against 63 ms.

    Attributes:
        images: as in ``Batch``.
        targets: the fields of ``Targets`` by name.
        skipped: as in ``Batch``.
    """

    images: Tensor
    targets: list[dict[str, Any]]
    skipped: Skipped

    def pin_memory(self) -> PackedBatch:
        """Called by the DataLoader's own thread, where training is on a GPU. Labels stay: heads pack them anyway."""
        return replace(self, images=self.images.pin_memory())

    def unpack(self) -> Batch:
        """The batch; nothing is copied."""
        return Batch(self.images, [_as_targets(target) for target in self.targets], self.skipped)


def pack(samples: Sequence[Sample]) -> PackedBatch | Skipped:
    """Collate samples; where none of them could be read, only the list of (file, reason)."""
    skipped = [entry for sample in samples for entry in sample.skipped]
    good = [(s.image, s.targets) for s in samples if s.image is not None and s.targets is not None]
    if not good:
        return skipped
    # default_collate stacks straight into shared memory where it runs in a worker.
    images = default_collate([torch.from_numpy(image) for image, _ in good]).permute(0, 3, 1, 2)
    return PackedBatch(images, [_as_arrays(targets) for _, targets in good], skipped)


def _as_arrays(targets: Targets) -> dict[str, Any]:
    values = {f.name: getattr(targets, f.name) for f in fields(targets)}
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def _as_targets(arrays: dict[str, Any]) -> Targets:
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()
    }
    return Targets(**values)

"""Which images make up which batch: functions of (seed, epoch), the same for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mvision.data.dataset import SampleKey

SHUFFLE, SCALE = 1, 2  # keep the two uses of (seed, epoch) apart from each other and from the samples' own numbers
STEP = 32  # image sizes are multiples of the coarsest stride


class TrainBatches:
    """Batches of one epoch, shuffled; set ``epoch`` before iterating.

    The permutation of all images is cut into batches of the total batch size, and each process takes its part of every
    batch: one process and eight see the same batches. What does not fill a batch waits for the next epoch's shuffle. A
    data set smaller than a batch makes one batch of what there is; with fewer images in a batch than processes some are
    seen twice, so that no process is left without work.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        image_size: tuple[int, int],
        seed: int = 0,
        epochs: int | None = None,
        last_epochs: float = 0.0,
        multi_scale: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``batch_size`` is the total over processes; ``epochs`` and ``last_epochs`` say when augmentation rests."""
        self.num_images, self.batch_size, self.image_size = num_images, batch_size, image_size
        self.seed, self.multi_scale = seed, multi_scale
        self.rank, self.world_size = rank, world_size
        self.resting_from = math.inf if epochs is None else epochs - round(epochs * last_epochs)
        self.epoch = 0

    def __len__(self) -> int:
        return max(self.num_images // self.batch_size, 1)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.random.default_rng((self.seed, self.epoch, SHUFFLE)).permutation(self.num_images)
        resting = self.epoch >= self.resting_from
        for number in range(len(self)):
            members = order[number * self.batch_size : (number + 1) * self.batch_size]
            members = np.resize(members, max(len(members), self.world_size))
            size = self._size(number)
            yield [SampleKey(self.epoch, int(index), size, resting) for index in members[self.rank :: self.world_size]]

    def _size(self, number: int) -> tuple[int, int]:
        """Height and width of a batch: whole steps of the longer side, the shorter one in proportion."""
        height, width = self.image_size
        longer = max(height, width)
        steps = int(self.multi_scale * longer / STEP)
        if steps == 0:
            return self.image_size
        rng = np.random.default_rng((self.seed, self.epoch, number, SCALE))
        factor = 1 + int(rng.integers(-steps, steps + 1)) * STEP / longer
        return tuple(max(round(side * factor / STEP) * STEP, STEP) for side in (height, width))  # type: ignore[return-value]


class EvalBatches:
    """Every image once, in order; process r of n takes the images r, r + n, r + 2n, ..."""

    def __init__(
        self, num_images: int, batch_size: int, image_size: tuple[int, int], rank: int = 0, world_size: int = 1
    ) -> None:
        """``batch_size`` is the total over processes."""
        self.image_size = image_size
        self.keys = [SampleKey(0, index, image_size) for index in range(rank, num_images, world_size)]
        self.batch_size = max(batch_size // world_size, 1)

    def __len__(self) -> int:
        return math.ceil(len(self.keys) / self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.keys), self.batch_size):
            yield self.keys[start : start + self.batch_size]

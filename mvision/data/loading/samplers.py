"""The images of each batch: a function of (seed, epoch), the same for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mvision.config import AugmentConfig
from mvision.data.loading.dataset import SampleKey
from mvision.data.loading.draws import draw, number_drawn

SHUFFLE, SCALE = 1, 2  # so that shuffling, image sizes and samples do not draw the same numbers from (seed, epoch)
STEP = 32  # image sizes are multiples of the coarsest stride


class TrainBatches:
    """Batches of one epoch, shuffled; set ``epoch``, and ``start`` to leave out its first batches, before iterating.

    The permutation of all images is cut into batches of the total batch size, and each process takes its share of every
    batch: one process and eight have the same batches. The images at the end that do not fill a batch are left out of
    this epoch. A data set smaller than a batch is one batch. Where a batch has fewer images than there are processes,
    some occur twice, so that no process is without work.
    """

    def __init__(
        self,
        num_images: int | Sequence[tuple[int, float]],
        batch_size: int,
        image_size: tuple[int, int],
        seed: int = 0,
        epochs: int | None = None,
        augment: AugmentConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        factors: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Plan the batches.

        Args:
            num_images: of one data set, or for each of several the number and how often an epoch shows each image.
            batch_size: total over processes.
            image_size: (height, width) in pixels.
            seed: of shuffling and sizes.
            epochs: of the run; None: unknown, and all of them are augmented alike.
            augment: which epochs have which augmentation, and how far sizes differ; None: all of it, and one size.
            rank, world_size: this process among all.
            factors: of each data set (N,): how often an epoch shows each of its images, in place of the numbers that
                ``num_images`` has for that.
        """
        self.sources = [(num_images, 1.0)] if isinstance(num_images, int) else list(num_images)
        self.drawn = [max(1, round(count * weight)) for count, weight in self.sources]
        self.factors = factors
        if factors is not None:
            self.drawn = [number_drawn(of_set) for of_set in factors]
        self.num_images, self.batch_size, self.image_size = sum(self.drawn), batch_size, image_size
        self.seed, self.multi_scale = seed, 0.0 if augment is None else augment.multi_scale
        self.rank, self.world_size = rank, world_size
        self.light_from: float = math.inf
        self.mixing: range | None = None
        if epochs is not None and augment is not None:
            self.plan_epochs(epochs, augment)
        self.epoch = self.start = 0

    def plan_epochs(self, epochs: int, augment: AugmentConfig) -> None:
        """Let the epochs of a run differ in their augmentation: how many there are can depend on the batches of one."""
        self.light_from, self.mixing = epochs - augment.count_last(epochs), augment.mixing(epochs)

    def __len__(self) -> int:
        return max(self.num_images // self.batch_size, 1)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self._order()
        light = self.epoch >= self.light_from
        mixing = not light and (self.mixing is None or self.epoch in self.mixing)
        for number in range(self.start, len(self)):
            members = order[number * self.batch_size : (number + 1) * self.batch_size]
            members = members[np.arange(max(len(members), self.world_size)) % len(members)]
            size = self._size(number)
            own = members[self.rank :: self.world_size].tolist()
            yield [SampleKey(self.epoch, index, size, light, repeat, mixing) for index, repeat in own]

    def _order(self) -> np.ndarray:
        """(n, 2) indices of this epoch's images, and how often each occurs in it before.

        A data set of weight 2.5 is passed over twice, and half of it a third time. With ``factors`` see ``draw``.
        """
        rng = np.random.default_rng((self.seed, self.epoch, SHUFFLE))
        if self.factors is not None:
            starts = np.cumsum([0, *map(len, self.factors)])
            shown = [np.add(draw(of_set, rng), (start, 0)) for of_set, start in zip(self.factors, starts)]
            return rng.permutation(np.concatenate(shown))
        if self.drawn == [count for count, _ in self.sources]:
            images = rng.permutation(self.num_images)
            return np.stack((images, np.zeros_like(images)), axis=1)
        chosen, start = [], 0
        for (count, _), drawn in zip(self.sources, self.drawn):
            passes = [
                np.stack((start + rng.permutation(count), np.full(count, repeat)), axis=1)
                for repeat in range(-(-drawn // count))
            ]
            chosen.append(np.concatenate(passes)[:drawn])
            start += count
        return rng.permutation(np.concatenate(chosen))

    def smallest(self) -> tuple[int, tuple[int, int]]:
        """The fewest images of a process in a batch, and (height, width) of the smallest batch that can occur."""
        members = max(min(self.num_images, self.batch_size), self.world_size)
        return members // self.world_size, self._scaled(-self._scale_steps())

    def sizes(self) -> int:
        """How many sizes of images there are."""
        return 2 * self._scale_steps() + 1

    def _size(self, number: int) -> tuple[int, int]:
        """Height and width of a batch: the longer side changes in steps of 32 pixels, the shorter one in proportion."""
        steps = self._scale_steps()
        if steps == 0 or self.epoch >= self.light_from:  # the last epochs are trained at the size of predictions
            return self.image_size
        rng = np.random.default_rng((self.seed, self.epoch, number, SCALE))
        return self._scaled(int(rng.integers(-steps, steps + 1)))

    def _scale_steps(self) -> int:
        return int(self.multi_scale * max(self.image_size) / STEP)

    def _scaled(self, steps: int) -> tuple[int, int]:
        factor = 1 + steps * STEP / max(self.image_size)
        return tuple(max(round(side * factor / STEP) * STEP, STEP) for side in self.image_size)  # type: ignore[return-value]


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

"""Decoded images kept in shared memory, so that later epochs of a small data set skip the decoding."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from mvision.compat import shared_bytes
from mvision.data.formats.coco import ImageRecord
from mvision.structures.decoding import size_limit

SMALL = 2 << 30  # bytes of a data set that is decoded whole, whatever the size of its pictures
ORDINARY = 3 << 20  # bytes of a picture of a megapixel; larger ones are rather decoded at a part of their size
LARGEST = 32 << 30  # bytes; to reserve them takes seconds
SHARE_OF_MEMORY = 0.25  # of what is available when the cache is made
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
SHARED_MEMORY = Path("/dev/shm")  # torch's shared tensors live there; small in many containers, and full means a crash


class ImageCache:
    """Memory for the pixels of every image of a split, shared by all processes: each image is decoded once.

    Two processes that decode the same image at the same time write the same bytes.
    """

    def __init__(self, records: Sequence[ImageRecord], missing: Collection[int] = ()) -> None:
        sizes = _sizes(records, missing)
        self.shapes = [(record.height, record.width, 3) for record in records]
        self.start = np.cumsum([0, *sizes], dtype=np.int64)
        self.pixels = shared_bytes(int(self.start[-1]))
        self.ready = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def get(self, index: int) -> np.ndarray | None:
        """(H, W, 3) uint8, which must not be changed; None where the image has not been put in yet."""
        if not self.ready[index]:
            return None
        return self._pixels_of(index)

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep an image, unless its size differs from the one in its annotations, for which the memory was made."""
        if image.shape == self.shapes[index] and self.start[index] < self.start[index + 1]:
            self._pixels_of(index)[:] = image
            self.ready[index] = True

    def _pixels_of(self, index: int) -> np.ndarray:
        flat = self.pixels[int(self.start[index]) : int(self.start[index + 1])].numpy()
        return flat.reshape(self.shapes[index])


def make_cache(records: Sequence[ImageRecord], caches: int = 1, missing: Collection[int] = ()) -> ImageCache | None:
    """A cache if ``is_small`` and all decoded images fit into a quarter of the free memory; else None.

    Args:
        caches: how many share the memory.
        missing: positions of images without a file that can be read.
    """
    fits = sum(_sizes(records, missing)) <= _budget() // caches
    return ImageCache(records, missing) if fits and is_small(records, caches, missing) else None


def is_small(records: Sequence[ImageRecord], caches: int = 1, missing: Collection[int] = ()) -> bool:
    """Whether there is a cache for these images on a machine with enough memory: a function of the data set alone.

    That is so for small data sets, and for larger ones whose pictures are of ordinary size. Those of large photos are
    decoded at a part of their size: that takes no longer than to shrink a cached one.
    """
    sizes = [size for size in _sizes(records, missing) if size]
    total = sum(sizes)
    return total <= SMALL // caches or total <= ORDINARY * len(sizes)


def _sizes(records: Sequence[ImageRecord], missing: Collection[int]) -> list[int]:
    """Bytes to be kept for each image: none for those without a file, nor where the annotations claim a size that is
    larger than any picture that is read (one wrong number would cost the whole cache)."""
    missing, limit = frozenset(missing), size_limit()
    sizes = [record.height * record.width * 3 for record in records]
    return [0 if position in missing or size > limit else size for position, size in enumerate(sizes)]


def _budget() -> int:
    available = psutil.virtual_memory().available
    if CGROUP_LIMIT.is_file():  # a container sees the memory of the whole machine, and may use this much of it
        limit = CGROUP_LIMIT.read_text().strip()
        available = min(available, int(limit)) if limit.isdigit() else available
    free = min(available * SHARE_OF_MEMORY, LARGEST)
    if SHARED_MEMORY.is_dir():
        free = min(free, shutil.disk_usage(SHARED_MEMORY).free / 2)
    return int(free)

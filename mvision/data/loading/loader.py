"""Loaders: batches made in the background, by worker processes that start cleanly and end with the main process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from mvision.compat import stop_workers, worker_sentinels
from mvision.config import DataConfig
from mvision.data.formats.coco import CocoSplit
from mvision.data.loading.batch import Batch, PackedBatch, Skipped, pack
from mvision.data.loading.cache import is_small, make_cache
from mvision.data.loading.dataset import Dataset, MixedDataset
from mvision.data.loading.folders import needs
from mvision.data.loading.samplers import EvalBatches, TrainBatches
from mvision.data.loading.sources import DataSource
from mvision.data.loading.tiles import TileBatches, TiledDataset
from mvision.data.loading.workers import pick_workers, worker_context
from mvision.errors import UserError
from mvision.structures.images import PixelRange
from mvision.structures.messages import hide_library_messages

PREFETCH = 3  # batches that a worker makes ahead of their use
SETTLE = 5.0  # seconds to wait for the end of a process


class Loader:
    """Batches of a split. Training calls ``epoch(n)``, evaluation ``for batch in loader``, which is epoch 0.

    Attributes:
        unreadable: files that could not be read, and how often they were tried. A batch names each for the first time
            only: a run of a hundred epochs would repeat the list a hundred times.
    """

    def __init__(
        self,
        dataset: Dataset | MixedDataset,
        batches: TrainBatches | EvalBatches,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.workers = workers
        self.unreadable: Counter[str] = Counter()
        parallel: dict[str, Any] = {}
        if workers > 0:
            parallel = {
                "multiprocessing_context": worker_context(),
                "persistent_workers": True,
                "prefetch_factor": PREFETCH,
                "worker_init_fn": init_worker,
            }
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=pack,
            pin_memory=pin_memory,
            # Else every iterator draws a number of torch's global generator, from which the model takes its noise, and
            # how many iterators there are depends on workers (which go on with theirs) and on whether a run is resumed.
            generator=torch.Generator().manual_seed(0),
            **parallel,
        )
        # At exit multiprocessing ends workers that are left with SIGTERM, which they ignore, and waits for them.
        weakref.finalize(self, stop_workers, self._loader)

    @property
    def tiles(self) -> TiledDataset | None:
        """The data set, if it is one of tiles that are evaluated."""
        return self.dataset if isinstance(self.dataset, TiledDataset) and not self.dataset.augmented else None

    def __len__(self) -> int:
        """Batches per epoch in this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch; in training from number ``start`` on, where a run goes on that stopped inside an epoch.

        Raises:
            UserError: a worker process died, or not one image of a training batch (nor any replacement) can be read.
        """
        if isinstance(self.batches, TrainBatches):
            self.batches.epoch, self.batches.start = number, start
        for packed in self._guarded():
            if isinstance(packed, PackedBatch):
                yield replace(packed.unpack(), skipped=self._new(packed.skipped))
            elif not self.dataset.augmented:
                yield Batch(torch.zeros((0, 3, *self.batches.image_size), dtype=torch.uint8), [], self._new(packed))
            else:
                files = "; ".join(f"{path}: {reason}" for path, reason in packed[:3])
                raise UserError(
                    f"no image of a whole batch can be read, nor any in its place: {files}, ...; "
                    "mvision data check lists every such file"
                )

    def missing(self) -> str | None:
        """A line about the images that could not be read since the loader was made; None where all could."""
        if not self.unreadable:
            return None
        kind, times, effect = "validation", "", "left out of the figures"
        if self.dataset.augmented:
            kind, times, effect = "training", f" {self.unreadable.total()} times", "replaced by others"
        count = len(self.unreadable)
        examples = ", ".join(list(self.unreadable)[:3]) + ", ..." * (count > 3)
        return f"{count} {kind} image{'s' * (count > 1)} could not be read, {effect}{times}: {examples}"

    def _new(self, skipped: Skipped) -> Skipped:
        """Those of these (file, reason) that no batch has named yet; all are counted."""
        new = {file: reason for file, reason in skipped if file not in self.unreadable}
        self.unreadable.update(file for file, _ in skipped)
        return list(new.items())

    def close(self) -> None:
        """End the worker processes now and not with the loader."""
        stop_workers(self._loader)

    def _guarded(self) -> Iterator[PackedBatch | Skipped]:
        try:
            with main_module_hidden():
                iterator = iter(self._loader)  # starts the workers
            yield from iterator
        except UserError as error:
            # The DataLoader turns an error of a worker into the text of its traceback; the last line is the message.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("mvision.errors.UserError: ")) from error
        except (RuntimeError, OSError, EOFError) as error:
            # Which error a killed worker causes here depends on what it was doing. That it has ended can be checked.
            if not wait(worker_sentinels(self._loader), timeout=SETTLE):
                raise
            raise UserError(
                "a loading process ended unexpectedly: out of memory, or of shared memory? Try fewer --workers; "
                "0 loads in the main process"
            ) from error


def build_train_loader(
    split: CocoSplit | Sequence[DataSource],
    config: DataConfig,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    seed: int = 0,
    epochs: int | None = None,
    factors: Sequence[np.ndarray] | None = None,
    mask_stride: int = 2,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    pixel_range: PixelRange | None = None,
) -> Loader:
    """Shuffled, augmented batches.

    Args:
        split: read with the fields that the heads need; or the several data sets of a run.
        config: augmentation and number of workers.
        batch_size: total over all processes.
        image_size: (height, width) of the model's input.
        seed: of shuffling and augmentation; both depend on (seed, epoch, index) alone.
        factors: how often an epoch shows each image, see ``Repeats``; None: by the weights of the data sets.
        epochs: of the whole run; its last ones are without strong augmentation.
        mask_stride: masks are drawn at 1 / stride of the input size.
        rank, world_size: this process among all.
        device: where training happens; for CUDA the batches are in pinned memory.
        pixel_range: see ``read_image``.

    Raises:
        UserError: the annotations lack masks or keypoints that were asked for.
    """
    dataset: Dataset | MixedDataset
    images: int | list[tuple[int, float]]
    if isinstance(split, CocoSplit):
        dataset = _train_dataset(split, config, seed, mask_stride, pixel_range)
        images = len(dataset)
    else:
        datasets = [
            _train_dataset(one.train, config, seed, mask_stride, pixel_range, one.tasks, len(split)) for one in split
        ]
        dataset = MixedDataset(datasets)
        images = [(len(one), source.weight) for one, source in zip(datasets, split)]
    batches = TrainBatches(images, batch_size, image_size, seed, epochs, config.augment, rank, world_size, factors)
    on_cuda = torch.device(device).type == "cuda"
    return Loader(dataset, batches, pick_workers(config.workers, on_cuda, world_size), pin_memory=on_cuda)


def _train_dataset(
    split: CocoSplit,
    config: DataConfig,
    seed: int,
    mask_stride: int,
    pixel_range: PixelRange | None = None,
    tasks: Collection[str] | None = None,
    datasets: int = 1,
) -> Dataset:
    """The samples of one of the ``datasets`` of a run; they are the same with and without memory for a cache."""
    drawn = mask_stride if tasks is None or "masks" in needs(tasks) else None  # some are for augmentation alone
    cache = make_cache(split.records, datasets, split.broken)
    small = is_small(split.records, datasets, split.broken)
    if config.tile is not None:
        return TiledDataset(split, config.tile, config.augment, seed, drawn, cache, tasks, not small, pixel_range)
    return Dataset(split, config.augment, seed, drawn, cache, tasks=tasks, reduce=not small, pixel_range=pixel_range)


def build_eval_loader(
    split: CocoSplit,
    config: DataConfig,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    pixel_range: PixelRange | None = None,
) -> Loader:
    """Every image (or tile) once, stretched to ``image_size``, in order. Arguments as in ``build_train_loader``.

    The targets have no masks: the metric compares with the annotations themselves.
    """
    dataset: Dataset
    batches: EvalBatches
    if config.tile is not None:
        dataset = tiled = TiledDataset(split, config.tile, mask_stride=None, pixel_range=pixel_range)
        batches = TileBatches(tiled, batch_size, image_size, rank, world_size)
    else:
        dataset = Dataset(split, mask_stride=None, pixel_range=pixel_range)
        batches = EvalBatches(len(dataset), batch_size, image_size, rank, world_size)
    on_cuda = torch.device(device).type == "cuda"
    return Loader(dataset, batches, pick_workers(config.workers, on_cuda, world_size), pin_memory=on_cuda)


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep worker processes from running the user's script again.

    Python imports the main module in every process that is not a plain fork of it. A script without
    ``if __name__ == "__main__"`` then builds a loader inside the worker, and the run ends in a ``BrokenPipeError``
    (tried with Python 3.11). Workers need nothing from the main module.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        main.__file__ = None
        yield
    finally:
        for name in ("__spec__", "__file__"):
            if name in hidden:
                setattr(main, name, hidden[name])
            else:
                delattr(main, name)


def init_worker(_: int) -> None:
    """Set up a worker process: one thread, Ctrl-C and SIGTERM are left to the main process, with which it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler may send it to every process
        signal.signal(number, signal.SIG_IGN)
    hide_library_messages()
    sys.excepthook = _report_unless_parent_left
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _report_unless_parent_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Report an error as Python does, but say nothing of connections that the main process broke off.

    A thread of the worker hands batches over (``multiprocessing.resource_sharer``). If Ctrl-C reaches the main process
    while it fetches one, that thread fails with a broken connection, and its traceback would follow the user's: in 2 of
    14 runs that were interrupted at random moments. Errors in a sample do not pass through here: the DataLoader takes
    them to the main process.
    """
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _end_with_parent() -> None:
    """Wait until the main process ends, also where it is killed, and end this one.

    The DataLoader's own check compares process ids of parents, but the parent of a worker is the server, which waits
    for its workers to end.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

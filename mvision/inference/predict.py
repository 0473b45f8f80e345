"""Prediction on images in memory: files, PIL images or arrays to ``Instances``.

An image is prepared as in training: stretched to the model's input size as uint8. The model itself normalises it.

Several threads may predict with one model at once. A process that is forked after a prediction can predict too, with
one thread: the threads of OpenMP, in which torch computes, do not exist in it, and waiting for them would never end.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.inference.passes import forward_passes, pool
from mvision.inference.pictures import as_list, for_threads, picture_array
from mvision.inference.pipeline import ordered_map
from mvision.inference.selection import DEFAULT_THRESHOLD, AskedThreshold, Selection, Threshold, resolve_threshold
from mvision.machine import cores
from mvision.structures import Category, Instances
from mvision.structures.images import PixelRange, resize_image

WORKERS = min(max(4, cores()), 16)
"""Threads that decode and resize; each holds one image, and as many more wait. A GPU takes what 16 of them read."""
BATCH_SIZE_ON_GPU = 8
T = TypeVar("T")
Prepared = tuple[T, np.ndarray | None, tuple[int, int]]
"""What identifies the image to the caller; the model's input (h, w, 3) uint8, or None if the image cannot be read; and
the (height, width) of the original image."""


class Sized(Protocol):
    """The part of a model's config that prediction reads."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""

    @property
    def pixel_range(self) -> PixelRange | None:
        """The values that become 0 and 255 in pictures of more than 8 bits, see ``read_image``."""

    @property
    def categories(self) -> list[Category]:
        """The classes of the model."""


class Predictor(Protocol):
    """What prediction needs of a model; ``mvision.model.Model`` and exported models have it."""

    @property
    def config(self) -> Sized:
        """The model's config."""

    @property
    def tasks(self) -> list[str]:
        """The names of the model's tasks."""

    @property
    def device(self) -> torch.device:
        """The device that images have to be on."""

    @property
    def best_thresholds(self) -> dict[str, float]:
        """By class, see ``HasBestThresholds``."""

    @property
    def own_threads(self) -> bool:
        """Whether a runtime with threads of its own computes the forward pass, not PyTorch."""

    def head(self, task: str) -> Any:
        """The head that serves a task; of it, ``kind`` is read."""

    def modules(self) -> Iterator[nn.Module]:
        """As of every ``nn.Module``."""

    def eval(self) -> Any:
        """As of every ``nn.Module``."""

    def __call__(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Raw outputs by task name, of (B, 3, H, W) uint8 images."""

    def postprocess(
        self,
        outputs: dict[str, dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
        threshold: Threshold,
        *,
        multi_label: bool,
        nms: float | None,
    ) -> list[Instances]:
        """One ``Instances`` per image, with the results of all tasks combined; see ``Selection``."""

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> dict[str, list[Instances]]:
        """By task: the results of its head alone, one ``Instances`` per image."""


class _Evaluations:
    """The models that are in evaluation mode at the moment, each used by one thread or several."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: dict[int, int] = {}  # by the id of the model: how many use it
        self.trained: dict[int, list[nn.Module]] = {}  # its modules that were in training mode before the first
        self.computed = False  # whether this process has run a model

    def enter(self, model: Predictor) -> None:
        key = id(model)
        with self.lock:
            if key not in self.threads:
                self.trained[key] = [module for module in model.modules() if module.training]
                if self.trained[key]:  # walking through all modules once more takes as long as a small GPU model
                    model.eval()
            self.threads[key] = self.threads.get(key, 0) + 1
            self.computed = True

    def leave(self, model: Predictor) -> None:
        key = id(model)
        with self.lock:
            self.threads[key] -= 1
            if not self.threads[key]:
                del self.threads[key]
                for module in self.trained.pop(key):
                    module.training = True

    def after_fork(self) -> None:
        """In the new process: none of the threads that used a model, or held the lock, exists in it."""
        self.lock = threading.Lock()
        self.threads.clear()
        self.trained.clear()
        if self.computed:
            torch.set_num_threads(1)


_evaluations = _Evaluations()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_evaluations.after_fork)


@contextmanager
def eval_mode(model: Predictor) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its former mode (some may be frozen).

    Several threads may do this with one model at once, as long as none trains it: the first one switches the mode, and
    the last one restores it.
    """
    # Not torch.inference_mode: tensors that a module caches in it (positions, anchors) cannot be used in training.
    with modules_in_eval_mode(model), torch.no_grad():
        yield


@contextmanager
def modules_in_eval_mode(model: Predictor) -> Iterator[None]:
    """As ``eval_mode``, with gradients as they are."""
    _evaluations.enter(model)
    try:
        yield
    finally:
        _evaluations.leave(model)


def predict_images(
    model: Predictor,
    images: Sequence[str | Path | Image.Image | np.ndarray],
    threshold: AskedThreshold = DEFAULT_THRESHOLD,
    batch_size: int | None = None,
    *,
    multi_label: bool = False,
    nms: float | None = None,
) -> list[Instances]:
    """Predict on images: one result each, in order, in pixels of the (upright) original image.

    Args:
        model: in any mode, which it keeps.
        images: files, PIL images, or uint8 arrays: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey; also a single one.
            A model with a ``pixel_range`` takes arrays of other numbers too.
        threshold: instances with a lower score (0..1) are left out; or a score for each class by its name, where "*" is
            for the others (0.5 where it is not given). ``"best"``, or that for "*": of every class the threshold with
            the largest F1 on the validation images, from the weights.
        batch_size: images per forward pass; None is 1 on CPU, where more do not help, and
            ``BATCH_SIZE_ON_GPU`` elsewhere. On a CPU several passes run at once, see ``forward_passes``.
        multi_label: one place may be reported as several classes; without it only as the best one.
        nms: of two instances of any classes whose boxes have a larger IoU than this, the better one is kept.

    Raises:
        UserError: a file that cannot be read, an array of another kind, a threshold or IoU outside 0..1, a class that
            the model does not have, weights without best thresholds, or a batch size that is no whole number above 0.
    """
    chosen = Selection(resolve_threshold(threshold, model), multi_label, nms)
    chosen.check(model.config.categories)
    images = as_list(images)
    prepared = ordered_map(partial(_prepare_image, model.config), for_threads(images), WORKERS)
    count = len(images) if hasattr(images, "__len__") else None
    with eval_mode(model), closing(infer(model, prepared, [chosen], batch_size, count)) as results:
        return [replace(found[0], path=path) for path, found in results if found is not None]


def infer(
    model: Predictor,
    prepared: Iterable[Prepared[T]],
    chosen: Sequence[Selection],
    batch_size: int | None,
    images: int | None = None,
) -> Generator[tuple[T, list[Instances] | None], None, None]:
    """Run the model on batches, in the caller's thread, and the post-processing in a second one.

    On a CPU there are several ``forward_passes`` at once, in threads that each run the model and the post-processing
    of a batch. An exported model has threads of its own, which one pass at a time keeps busy.

    Args:
        images: how many there are to come; None: not known.

    Yields:
        For every prepared image, in order, what identifies it and its instances, once for every selection; None if it
        has no input.

    Raises:
        UserError: a batch size that is no whole number above 0.
    """
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise UserError(f"batch_size {batch_size!r}: a whole number above 0 is needed, or None")
    size = batch_size or (1 if model.device.type == "cpu" else BATCH_SIZE_ON_GPU)
    inputs = _batches(prepared, size)
    passes = threads = 1
    if model.device.type == "cpu" and not model.own_threads:
        passes, threads = forward_passes(torch.get_num_threads(), None if images is None else math.ceil(images / size))
    if passes > 1:
        compute = partial(_compute, model, chosen, _autocast(model.device.type))
        results = ordered_map(compute, inputs, passes, ahead=passes, pool=pool(passes, threads))
    else:
        side = _SideStream(model.device) if model.device.type == "cuda" else None
        # While results of a GPU are read, it computes the next batch, and one more is queued.
        raw, ahead = _outputs(model, inputs, side), 1 if side is None else 2
        results = ordered_map(partial(_postprocess, model, chosen, side), raw, 1, ahead)
    with closing(results) as batches:
        for batch in batches:
            yield from batch


class _SideStream:
    """The queue of the post-processing on a GPU, so that it waits for its own batch and not for those behind it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)  # its few small kernels go first

    def mark(self) -> torch.cuda.Event:
        """A mark behind what this thread has queued."""
        return torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event) -> Iterator[None]:
        """What is queued in this block runs after the mark. At its end nothing on the queue may be left to run.

        Without that the memory of the outputs could be given to another batch while they are being read. Results on the
        CPU are at hand only when all that they come from has run.
        """
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(mark)
            try:
                yield
            finally:
                self.stream.synchronize()


Raw = tuple[list[Prepared[T]], dict[str, dict[str, Tensor]], "torch.cuda.Event | None"]
"""A batch, the model's raw outputs for those of its images that have an input, and on a GPU when they are ready."""


def _outputs(
    model: Predictor, batches: Generator[list[Prepared[T]], None, None], side: _SideStream | None
) -> Generator[Raw[T], None, None]:
    full = 0
    with closing(batches):
        for batch in batches:
            # On a GPU a batch that is not full, as the last one, takes the CUDA graph of the full ones.
            full = max(full, len(batch)) if side is not None else 0
            yield batch, _run(model, batch, full), None if side is None else side.mark()


def _batches(prepared: Iterable[Prepared[T]], size: int) -> Generator[list[Prepared[T]], None, None]:
    items = iter(prepared)
    try:
        while batch := list(islice(items, size)):
            yield batch
    finally:
        if isinstance(prepared, Generator):
            prepared.close()


def _run(model: Predictor, batch: list[Prepared[T]], full: int = 0) -> dict[str, dict[str, Tensor]]:
    """The raw outputs for the images of a batch, which is filled up to ``full`` images for the forward pass."""
    inputs = [image for _, image, _ in batch if image is not None]
    if not inputs:
        return {}
    outputs = model(_to_device(inputs, model.device, max(full, len(inputs))))
    if len(inputs) >= full:
        return outputs
    return {task: {name: value[: len(inputs)] for name, value in of.items()} for task, of in outputs.items()}


def _autocast(device: str) -> Callable[[], torch.autocast]:
    """Makes a context with the caller's setting of autocast, for another thread."""
    return partial(
        torch.autocast, device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
    )


def _compute(
    model: Predictor,
    chosen: Sequence[Selection],
    autocast: Callable[[], torch.autocast],
    batch: list[Prepared[T]],
) -> list[tuple[T, list[Instances] | None]]:
    with torch.no_grad(), autocast():  # settings of a thread; these are the caller's
        return _postprocess(model, chosen, None, (batch, _run(model, batch), None))


def _to_device(inputs: Sequence[np.ndarray], device: torch.device, count: int) -> Tensor:
    """(count, 3, H, W) uint8 in channels_last, the memory format that convolutions prefer, of (H, W, 3) arrays.

    Where there are fewer arrays, the last one is repeated.
    """
    inputs = [*inputs, *[inputs[-1]] * (count - len(inputs))]
    if device.type != "cuda":
        return torch.from_numpy(np.stack(inputs)).to(device).permute(0, 3, 1, 2)
    # From pinned memory the GPU copies by itself; PyTorch does not use the memory again before that has ended.
    pinned = torch.empty((len(inputs), *inputs[0].shape), dtype=torch.uint8, pin_memory=True)
    np.stack(inputs, out=pinned.numpy())
    return pinned.to(device, non_blocking=True).permute(0, 3, 1, 2)


def _postprocess(
    model: Predictor, chosen: Sequence[Selection], side: _SideStream | None, raw: Raw[T]
) -> list[tuple[T, list[Instances] | None]]:
    batch, outputs, ready = raw
    sizes = [size for _, image, size in batch if image is not None]
    # The setting of gradients of the caller's thread does not apply to this one.
    with torch.no_grad(), nullcontext() if side is None or ready is None else side.after(ready):
        found = [
            model.postprocess(outputs, sizes, one.threshold, multi_label=one.multi_label, nms=one.nms)
            for one in (chosen if sizes else ())
        ]
    results = map(list, zip(*found))  # by image
    return [(key, None if image is None else next(results)) for key, image, _ in batch]


def _prepare_image(config: Sized, image: str | Path | Image.Image | np.ndarray) -> Prepared[str | None]:
    path = str(image) if isinstance(image, str | Path) else None
    array = picture_array(image, config.pixel_range)
    return path, resize_image(array, config.image_size), array.shape[:2]

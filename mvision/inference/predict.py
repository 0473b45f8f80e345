"""Prediction on images in memory: files, PIL images or arrays to ``Instances``.

An image is prepared as in training: stretched to the model's input size as uint8. The model itself normalises it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.inference.pipeline import ordered_map
from mvision.structures import Instances
from mvision.structures.images import BadImage, read_image, resize_image, to_rgb

WORKERS = 4
T = TypeVar("T")
Prepared = tuple[T, np.ndarray | None, tuple[int, int]]
"""What identifies the image to the caller; the model's input (h, w, 3) uint8, or None if the image cannot be read; and
the (height, width) of the original image."""


class Sized(Protocol):
    """The part of a model's config that prediction reads."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""


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

    def modules(self) -> Iterator[nn.Module]:
        """As of every ``nn.Module``."""

    def eval(self) -> Any:
        """As of every ``nn.Module``."""

    def __call__(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Raw outputs by task name, of (B, 3, H, W) uint8 images."""

    def postprocess(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """One ``Instances`` per image, with the results of all tasks combined."""

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> dict[str, list[Instances]]:
        """By task: the results of its head alone, one ``Instances`` per image."""


@contextmanager
def eval_mode(model: Predictor) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its former mode (some may be frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not torch.inference_mode: tensors that a module caches in it (positions, anchors) cannot be used in training.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def predict_images(
    model: Predictor,
    images: Sequence[str | Path | Image.Image | np.ndarray],
    threshold: float = 0.5,
    batch_size: int | None = None,
) -> list[Instances]:
    """Predict on images: one result each, in order, in pixels of the (upright) original image.

    Args:
        model: in any mode, which it keeps.
        images: files, PIL images, or uint8 arrays: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey; also a single one.
        threshold: instances with a lower score (0..1) are left out.
        batch_size: images per forward pass; None is 1 on CPU, where more do not help, and 8 elsewhere.

    Raises:
        UserError: a file that cannot be read, an array of another kind, a threshold outside 0..1.
    """
    check_threshold(threshold)
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim <= 3):
        images = [images]  # type: ignore[list-item]
    prepared = ordered_map(partial(_prepare_image, model.config.image_size), images, WORKERS)
    with eval_mode(model), closing(infer(model, prepared, threshold, batch_size)) as results:
        return [replace(instances, path=path) for path, instances in results if instances is not None]


def infer(
    model: Predictor, prepared: Iterable[Prepared[T]], threshold: float, batch_size: int | None
) -> Generator[tuple[T, Instances | None], None, None]:
    """Run the model on batches, in the caller's thread, and the post-processing in a second one.

    Yields:
        For every prepared image, in order, what identifies it and its instances; None if it has no input.
    """
    results = ordered_map(partial(_postprocess, model, threshold), _outputs(model, prepared, batch_size), 1, ahead=1)
    with closing(results) as batches:
        for batch in batches:
            yield from batch


def _outputs(
    model: Predictor, prepared: Iterable[Prepared[T]], batch_size: int | None
) -> Iterator[tuple[list[Prepared[T]], dict[str, dict[str, Tensor]]]]:
    """Batches with the model's raw outputs for those of their images that have an input."""
    size = batch_size or (1 if model.device.type == "cpu" else 8)
    items = iter(prepared)
    while batch := list(islice(items, size)):
        inputs = [image for _, image, _ in batch if image is not None]
        # The permutation is a view in channels_last, the memory format that convolutions prefer.
        images = torch.from_numpy(np.stack(inputs)).to(model.device).permute(0, 3, 1, 2) if inputs else None
        yield batch, {} if images is None else model(images)


def _postprocess(
    model: Predictor, threshold: float, raw: tuple[list[Prepared[T]], dict[str, dict[str, Tensor]]]
) -> list[tuple[T, Instances | None]]:
    batch, outputs = raw
    sizes = [size for _, image, size in batch if image is not None]
    with torch.no_grad():  # the setting of the caller's thread does not apply to this one
        results = iter(model.postprocess(outputs, sizes, threshold) if sizes else [])
    return [(key, None if image is None else next(results)) for key, image, _ in batch]


def _prepare_image(size: tuple[int, int], image: str | Path | Image.Image | np.ndarray) -> Prepared[str | None]:
    path = str(image) if isinstance(image, str | Path) else None
    array = _to_array(image)
    return path, resize_image(array, size), array.shape[:2]


def _to_array(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB of anything that ``predict_images`` takes."""
    if isinstance(image, str | Path):
        try:
            return read_image(image)
        except BadImage as error:
            raise UserError(str(error)) from error
    if isinstance(image, Image.Image):
        return np.array(to_rgb(ImageOps.exif_transpose(image)))
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image of type {type(image).__name__}: give a path, a PIL image or a numpy array")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or not image.size:
        raise UserError(f"an array of shape {image.shape} and type {image.dtype}: (H, W, 3) uint8 RGB is needed")
    return np.require(image[..., :3], requirements=["C", "W"])  # torch warns about read-only arrays


def check_threshold(threshold: float) -> None:
    """Raise a ``UserError`` if the threshold is not in 0..1."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: has to be between 0 and 1")

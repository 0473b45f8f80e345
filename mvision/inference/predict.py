"""Prediction: images in memory to ``Instances``, or any sources to a folder of pictures and ``predictions.json``.

An image is prepared as in training, stretched to the model's input size as uint8; everything else is in the model.
"""

from __future__ import annotations

import time
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
from tqdm import tqdm

from mvision.errors import UserError
from mvision.inference.output import Output, Summary
from mvision.inference.pipeline import ordered_map
from mvision.inference.sources import Frame, Source, find_sources, read_frames
from mvision.structures import Instances
from mvision.structures.images import BadImage, read_image, resize_image, to_rgb

WORKERS = 4
T = TypeVar("T")
# Something to carry along, the input of the model (h, w, 3) uint8 or None, and the size of the original image.
Prepared = tuple[T, np.ndarray | None, tuple[int, int]]


class Sized(Protocol):
    """What is read of a model's config."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        ...


class Predictor(Protocol):
    """A model that predicts: ``mvision.model.Model``, or one that was exported."""

    @property
    def config(self) -> Sized:
        """The model's description."""
        ...

    @property
    def tasks(self) -> list[str]:
        """What the model does."""
        ...

    @property
    def device(self) -> torch.device:
        """Where images are expected."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """As of every ``nn.Module``."""
        ...

    def eval(self) -> Any:
        """As of every ``nn.Module``."""
        ...

    def __call__(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Raw outputs by task name, of (B, 3, H, W) uint8 images."""
        ...

    def postprocess(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """What was found in every image, the results of all tasks together."""
        ...

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> dict[str, list[Instances]]:
        """What every head found, by task."""
        ...


@contextmanager
def eval_mode(model: Predictor) -> Iterator[None]:
    """No gradients and evaluation mode; afterwards every module is in the mode it was in (some may be frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not torch.inference_mode: what a module caches in it (positions, anchors) could never be trained with.
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
    """Find objects in images; one result each, in order, in pixels of the (upright) original.

    Args:
        model: in any mode, which it keeps.
        images: files, PIL images, or uint8 arrays: (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey. One alone will do.
        threshold: the least score, 0..1.
        batch_size: images per forward pass; None is 1 on CPU, where more do not help, and 8 elsewhere.

    Raises:
        UserError: a file that cannot be read, an array of another kind, a threshold outside 0..1.
    """
    _check_threshold(threshold)
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim <= 3):
        images = [images]  # type: ignore[list-item]
    prepared = ordered_map(partial(_prepare_image, model.config.image_size), images, WORKERS)
    with eval_mode(model), closing(_infer(model, prepared, threshold, batch_size)) as results:
        return [replace(instances, path=path) for path, instances in results if instances is not None]


def predict_sources(
    model: Predictor,
    sources: Sequence[str | Path],
    output: Path,
    threshold: float = 0.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> Summary:
    """Predict on files, folders, globs, videos and cameras; write what was found.

    ``output`` gets one picture per image under the same stem (below the same folders), one MP4 per video or camera, and
    ``predictions.json``, a COCO results list whose entries also name the file, the class and, in videos, the frame and
    its time. ``image_id`` there numbers all images from 1 in the order of the sources. Reading, inference, drawing and
    writing overlap, and memory does not grow with the number of images. Nothing is left half-written: Ctrl-C (with a
    camera the usual end, whose recording is kept) and a full disk leave complete pictures and no ``predictions.json``.

    Args:
        model: in any mode, which it keeps.
        sources: see ``find_sources``.
        output: a folder; made if missing, files of an earlier run are replaced.
        threshold: the least score, 0..1.
        batch_size: images per forward pass; None is 1 on CPU, where more do not help, and 8 elsewhere.
        progress: show a bar.

    Raises:
        UserError: a source that is missing or cannot be read (in folders and globs: if none can), a folder that cannot
            be written, a threshold outside 0..1.
    """
    _check_threshold(threshold)
    found = find_sources(sources, leave_out=output)
    writer = Output(output, found)
    started = time.monotonic()
    try:
        try:
            with eval_mode(model):
                _run(model, found, writer, threshold, batch_size, progress)
        except KeyboardInterrupt:
            if all(source.kind != "camera" for source in found):
                raise
        summary = writer.summary
        if not summary.images and summary.skipped:
            name, reason = summary.skipped[0]
            raise UserError(f"none of {len(found)} sources can be read; the first is {name}: {reason}")
        writer.finish()
    finally:
        writer.abandon()
    summary.seconds = time.monotonic() - started
    return summary


def _run(
    model: Predictor, found: list[Source], writer: Output, threshold: float, batch_size: int | None, progress: bool
) -> None:
    """Six stages: decode, resize, infer (here, in the caller's thread), post-process, draw and encode, put down."""
    frames = read_frames(found, ahead=WORKERS)
    prepared = ordered_map(partial(_prepare_frame, model.config.image_size), frames, workers=2, ahead=2)
    inferred = _infer(model, prepared, threshold, batch_size)
    numbered = ((number, frame, instances) for number, (frame, instances) in enumerate(inferred, start=1))
    rendered = ordered_map(writer.render, numbered, WORKERS, ahead=WORKERS)
    total = len(found) if all(source.kind == "image" for source in found) else None
    with closing(ordered_map(writer.add, rendered, workers=1, ahead=1)) as written:
        for _ in tqdm(
            written, desc="predicting", total=total, unit="img", disable=None if progress else True, leave=False
        ):
            pass


def _infer(
    model: Predictor, prepared: Iterable[Prepared[T]], threshold: float, batch_size: int | None
) -> Generator[tuple[T, Instances | None], None, None]:
    """The model on batches; what has no input passes through in its place. Post-processing is another thread's."""
    found = ordered_map(partial(_postprocess, model, threshold), _outputs(model, prepared, batch_size), 1, ahead=1)
    with closing(found) as batches:
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
    with torch.no_grad():  # every thread has a setting of its own
        found = iter(model.postprocess(outputs, sizes, threshold) if sizes else [])
    return [(carried, None if image is None else next(found)) for carried, image, _ in batch]


def _prepare_frame(size: tuple[int, int], frame: Frame) -> Prepared[Frame]:
    if frame.image is None:
        return frame, None, (0, 0)
    return frame, resize_image(frame.image, size), frame.image.shape[:2]


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
    return np.require(image[..., :3], requirements=["C", "W"])  # torch warns of arrays that cannot be written to


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: has to be between 0 and 1")

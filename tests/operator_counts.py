"""How many operators a prediction and a training step start on a GPU, and how often the CPU waits for it.

    python -m tests.operator_counts [--models tiny small rtdetr_r18] [--size 256] [--test]

prints a table for every model. The operators are those of the paths without Triton, with views left out; a pretended
GPU counts them, so no real one is needed. ``tests/test_operators.py`` refuses growth.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mvision import Model, create_model
from mvision.fast.biases import join_biases
from mvision.structures import Category, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from tests.decoder_inputs import DFINE
from tests.pretend_gpu import OnDevice, PretendedGpu, on_device

HEADS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "detection": (["detection"], {}),
    "detection as in D-FINE": (
        ["detection"],
        {f"heads__detection__{key}": value for key, value in {**DFINE, "shared_matches": True}.items()},
    ),
    "instance-seg": (["instance-seg"], {}),
    "keypoints": (["keypoints"], {}),
    "keypoints minimal": (["keypoints"], {"heads": {"keypoints": {"kind": "minimal"}}}),
    "semantic-seg": (["semantic-seg"], {}),
    "joint": (["detection", "instance-seg", "keypoints", "semantic-seg"], {}),
}
CATEGORIES = [Category(id=1, name="person", keypoints=["nose", "left_hand", "right_hand"]), Category(id=2, name="dog")]
BATCH = 2


@dataclass
class Counts:
    """Of one prediction (forward pass and post-processing) or one training step (with the backward pass)."""

    kernels: int
    waits: Counter[str]
    to_device: int
    to_host: int


def build(name: str, head: str, size: int) -> Model:
    """A model on the CPU whose norms have statistics."""
    tasks, settings = HEADS[head]
    torch.manual_seed(0)
    model = create_model(name, tasks, categories=CATEGORIES, image_size=size, **settings)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for momentum in (1.0, 0.1):
        for norm in norms:
            norm.momentum = momentum
        with torch.no_grad():
            model.train()(torch.rand(BATCH, 3, size, size))
    return model


def prediction(name: str, head: str, size: int = 64, batch: int = BATCH) -> Counts:
    """What one call of a prepared model and its post-processing start, when it has seen the shape before."""
    model = build(name, head, size).eval()
    model.fuse().requires_grad_(False)
    model = cast(Model, on_device(join_biases(model.to(memory_format=torch.channels_last))))  # type: ignore[call-overload]
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), PretendedGpu().counted(patch) as gpu:
        for _ in range(2):
            _reset(gpu)
            model.postprocess(model(cast(Tensor, OnDevice(images))), [(48, 80)] * batch, 0.0)
    return _counts(gpu)


def training_step(name: str, head: str, size: int = 64, objects: tuple[int, ...] = (3, 1)) -> Counts:
    """What one step without its optimiser starts, for images with these numbers of objects."""
    model = cast(Model, on_device(build(name, head, size)))
    targets = [make_targets(count) for count in objects]
    with pytest.MonkeyPatch.context() as patch, PretendedGpu().counted(patch) as gpu:
        images = cast(Tensor, OnDevice(torch.rand(len(objects), 3, size, size)))
        for _ in range(2):
            _reset(gpu)
            losses = model.loss(model(images, targets), targets)
            torch.stack(list(losses.values())).sum().backward()
    return _counts(gpu)


def make_targets(count: int) -> Targets:
    """Labels of every kind, for objects of all classes in turn."""
    generator = torch.Generator().manual_seed(count)
    boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
    labels = torch.arange(count) % len(CATEGORIES)
    corners = (32 * cxcywh_to_xyxy(boxes)).round().long()
    masks = torch.zeros(count, 32, 32, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners.tolist()):
        mask[top:bottom, left:right] = 1
    points = torch.rand(count, 3, 3, generator=generator)
    points[..., 2] = 2.0 * (labels == 0)[:, None]
    return Targets(boxes, labels, boxes[:, 2] * boxes[:, 3], masks=masks, keypoints=points, size=(48, 80))


def _reset(gpu: PretendedGpu) -> None:
    for counter in (gpu.kernels, gpu.waits, gpu.transfers):
        counter.clear()


def _counts(gpu: PretendedGpu) -> Counts:
    return Counts(gpu.kernels.total(), gpu.waits, gpu.transfers["to device"], gpu.transfers["to host"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "rtdetr_r18"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--test", action="store_true", help="print the numbers that tests/test_operators.py records")
    options = parser.parse_args()
    if options.test:
        for head in HEADS:
            steps = training_step("tiny", head), training_step("tiny", head, objects=(0, 0))
            print(f'    "{head}": {tuple(counts.kernels for counts in (prediction("tiny", head), *steps))},')
        return
    for name in options.models:
        print(f"| {name} | prediction: operators | copies to the CPU | step: operators | copies to the GPU | back |")
        print("|---|---|---|---|---|---|")
        for head in HEADS if name in ("tiny", "small") else ("detection",):
            once, step = prediction(name, head, options.size, 1), training_step(name, head, options.size)
            print(f"| {head} | {once.kernels} | {once.to_host} | {step.kernels} | {step.to_device} | {step.to_host} |")
        print(flush=True)


if __name__ == "__main__":
    main()

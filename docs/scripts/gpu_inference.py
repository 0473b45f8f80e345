"""Prediction on a GPU: models beside ``transformers`` with the same weights, and a model's tasks beside each other.

    python docs/scripts/gpu_inference.py [--models r18 r50 dfine_s dfine_m] [--batches 1 8 32] [--device cuda]

Random weights. All forms of a model take turns in one process; medians, and medians of the ratios. The reference is
eager ``transformers`` in bf16, its weights converted. ``prepared`` is what ``mvision predict`` and ``Model.predict``
run: fused and replayed as a CUDA graph. The last column is the largest difference of probabilities and coordinates from
plain eager fp32, over the quarter of the queries with the highest scores. With ``--device cpu`` and a small ``--size``
the script can be tried without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_lab import describe, milliseconds
from torch import Tensor
from transformers import AutoModelForObjectDetection
from transformers.utils import logging

from mvision import Model, create_model, load
from mvision.commands.benchmark_timing import alternate, median_ratio
from mvision.deploy.compare import difference
from mvision.fast.prepare import prepare
from mvision.structures import Category
from mvision.structures.oks import COCO_SIGMAS
from tests.dfine_reference import as_published
from tests.reference import build_reference, random_images, save_reference

TASKS = ("detection", "instance-seg", "keypoints")
CATEGORIES = [
    Category(id=1, name="person", keypoints=[f"point {index}" for index in range(len(COCO_SIGMAS))]),
    *(Category(id=index, name=f"class {index}") for index in range(2, 9)),
]


def main() -> None:
    """Print a table per architecture, and one of the tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["r18", "r50", "dfine_s", "dfine_m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tasks", nargs="*", default=["small"], help="models whose tasks are compared")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = torch.device(options.device)
    print(f"{describe(device)}\n")
    for name in options.models:
        against_reference(name, options.batches, options.size, options.repeats, device)
    for name in options.tasks:
        between_tasks(name, options.batches, options.size, options.repeats, device)


@torch.no_grad()
def against_reference(name: str, batches: list[int], size: int, repeats: int, device: torch.device) -> None:
    """The forward pass of every form at every batch size."""
    with tempfile.TemporaryDirectory() as folder:
        size_of = name.removeprefix("dfine_")
        made = as_published(size_of) if size_of != name else build_reference(name)
        saved = save_reference(made, Path(folder) / "reference")
        reference = AutoModelForObjectDetection.from_pretrained(saved).eval().to(device, torch.bfloat16)
        plain = load(saved).to(device)
    half = copy.deepcopy(plain).to(torch.bfloat16)
    precisions = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    prepared = {precision: prepare(copy.deepcopy(plain), precision) for precision in precisions}
    print(f"| {name} at {size}, images | form | ms | of the reference | largest difference |")
    print("|---|---|---|---|---|")
    for batch in batches:
        images = random_images(batch, size, size)
        inputs = images.to(device, torch.bfloat16)
        pixels = (255 * images).to(torch.uint8).permute(0, 2, 3, 1).contiguous().to(device).permute(0, 3, 1, 2)
        expected = plain(pixels)
        forms: dict[str, Callable[[], Any]] = {"eager bf16": partial(half, pixels)}
        forms |= {f"prepared {key}": partial(model, pixels) for key, model in prepared.items()}
        taken = alternate([partial(reference, inputs), *forms.values()], device, repeats, warmups=4, seconds=60)
        print(f"| {batch} | transformers bf16 | {milliseconds(taken[0])} | 1.00 | |")
        for (form, call), times in zip(forms.items(), taken[1:]):
            largest, output = difference(expected, call())
            ratio = median_ratio(times, taken[0])
            print(f"| {batch} | {form} | {milliseconds(times)} | {ratio:.2f} | {largest:.1e} ({output}) |", flush=True)
    print()


@torch.no_grad()
def between_tasks(name: str, batches: list[int], size: int, repeats: int, device: torch.device) -> None:
    """Forward pass and post-processing of one model per task, and of the joint one."""
    precision = "bf16"
    models = {task: _ready(name, (task,), size, device, precision) for task in TASKS}
    models["all three"] = _ready(name, TASKS, size, device, precision)
    print(f"| {name} at {size}, images | task | ms | of detection | ms with post-processing | of detection |")
    print("|---|---|---|---|---|---|")
    for batch in batches:
        pixels = (255 * random_images(batch, size, size)).to(torch.uint8).to(device)
        sizes = [(480, 640)] * batch

        def whole(model: Model, pixels: Tensor = pixels, sizes: list[tuple[int, int]] = sizes) -> None:
            model.postprocess(model(pixels), sizes, _threshold(model, pixels))

        forward = alternate([partial(m, pixels) for m in models.values()], device, repeats, 4, 60)
        both = alternate([partial(whole, m) for m in models.values()], device, repeats, 4, 60)
        for index, task in enumerate(models):
            first = f"{milliseconds(forward[index])} | {median_ratio(forward[index], forward[0]):.2f}"
            second = f"{milliseconds(both[index])} | {median_ratio(both[index], both[0]):.2f}"
            print(f"| {batch} | {task} | {first} | {second} |", flush=True)
    print()


def _ready(name: str, tasks: tuple[str, ...], size: int, device: torch.device, precision: Any) -> Model:
    torch.manual_seed(0)
    model = create_model(name, tasks, categories=CATEGORIES, image_size=size)
    for module in model.modules():  # norms need the statistics of a batch
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()(torch.rand(2, 3, size, size))
    return prepare(model.eval().to(device), precision)


_THRESHOLDS: dict[int, float] = {}


def _threshold(model: Model, pixels: Tensor, objects: int = 8) -> float:
    """A score that about ``objects`` results of an image reach: untrained scores are all alike."""
    if id(model) not in _THRESHOLDS:
        found = model.postprocess(model(pixels[:1]), [(480, 640)], 0.0)[0]
        _THRESHOLDS[id(model)] = float(found.scores[min(objects, len(found) - 1)])
    return _THRESHOLDS[id(model)]


if __name__ == "__main__":
    main()

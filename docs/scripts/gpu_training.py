"""Training steps on a GPU: RT-DETR beside ``transformers``, `tiny` and `small`, and a run with its loader.

    python docs/scripts/gpu_training.py [--models r18] [--steps 20] [--device cuda] [--run]

A step is the training loop's own (``train_epoch``: forward, loss, backward, clipping, optimiser, moving average,
progress bar) on one batch that is given again and again; the reference's is forward, loss, backward and AdamW under
autocast. Both take turns in blocks of ``--steps`` steps. Random weights, 8 objects an image. "GPU busy" is the share of
the time in which a kernel ran, by the driver's counter. ``--run`` also trains ``tiny`` on the built-in data set, with
its loader.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_lab import Busy, describe
from transformers import RTDetrForObjectDetection
from transformers.utils import logging

from mvision import Model, create_model, load
from mvision.config import Config, load_config
from mvision.data import Batch
from mvision.engine import train as engine
from mvision.engine.acceleration import set_for_training
from mvision.engine.epoch import train_epoch
from mvision.machine import keep_freed_memory
from mvision.structures import Category, Targets
from mvision.structures.oks import COCO_SIGMAS
from tests.reference import as_labels, build_reference, random_images, random_targets, save_reference

OBJECTS = 8
CATEGORIES = [
    Category(id=1, name="person", keypoints=[f"point {index}" for index in range(len(COCO_SIGMAS))]),
    *(Category(id=index, name=f"class {index}") for index in range(2, 9)),
]
Steps = Callable[[], None]


class Repeated:
    """A loader whose batches are all the same; they come from pinned memory as the real loader's do."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """``count`` times the batch."""
        for _ in range(start, self.count):
            yield self.batch


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["r18"])
    parser.add_argument("--ours", nargs="*", default=["tiny:detection", "tiny:all", "small:detection", "small:all"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true", help="a row with train.compile as well")
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = torch.device(options.device)
    print(f"{describe(device)}; batch {options.batch}\n")
    print("| model | form | ms a step | of the reference | GPU busy | peak memory |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            saved = save_reference(build_reference(name), Path(folder) / "reference")
            for precision in options.precisions:
                forms = {"transformers": reference_steps(saved, precision, device, options)}
                for setting in ("", "cuda_graphs", "compile") if options.compile else ("", "cuda_graphs"):
                    config = load_config(f"rtdetr_{name}", tasks=["detection"])
                    steps = our_steps(config, load(saved), precision, device, options, options.size, setting)
                    forms[f"mvision {setting}".strip()] = steps
                compare(f"{name} at {options.size}, {precision}", forms, device, options)
    for entry in options.ours:
        name, _, tasks = entry.partition(":")
        chosen = ["detection", "instance-seg", "keypoints"] if tasks == "all" else [tasks]
        config = load_config(name, tasks=chosen)
        config.model.categories = CATEGORIES
        model = create_model(name, chosen, categories=CATEGORIES)
        size = config.model.image_size[0]
        forms = {}
        for setting in ("", "cuda_graphs"):
            own = copy.deepcopy(model)
            forms[f"{'+'.join(chosen)} {setting}".strip()] = our_steps(
                copy.deepcopy(config), own, "bf16", device, options, size, setting
            )
        compare(f"{name} at {size}, bf16", forms, device, options)
    if options.run:
        whole_run(options)


def compare(title: str, forms: dict[str, Steps], device: torch.device, options: argparse.Namespace) -> None:
    """Blocks of steps in turn: the median time of a step, its share of the first form's, busy GPU, memory."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    busy: dict[str, list[float]] = {form: [] for form in forms}
    memory: dict[str, float] = {}
    for number in range(-1, options.rounds):
        for form, steps in forms.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with Busy(device) as counter:
                steps()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            if number >= 0:
                times[form].append((time.perf_counter() - start) / options.steps)
                busy[form] += [] if counter.share is None else [counter.share]
            if device.type == "cuda":
                memory[form] = torch.cuda.max_memory_allocated() / 2**30
    first = times[next(iter(forms))]
    for form, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, first)) if "transformers" in forms else None
        shown = "" if ratio is None else f"{ratio:.2f}"
        share = f"{statistics.median(busy[form]):.0%}" if busy[form] else "-"
        peak = f"{memory[form]:.1f} GiB" if form in memory else "-"
        print(f"| {title} | {form} | {1000 * statistics.median(taken):.1f} | {shown} | {share} | {peak} |", flush=True)


def our_steps(
    config: Config,
    model: Model,
    precision: Any,
    device: torch.device,
    options: argparse.Namespace,
    size: int,
    setting: str,
) -> Steps:
    """``train_epoch`` over one batch; ``setting`` is one of ``train`` that is switched on, or empty."""
    config.train.precision = precision
    config.train.warmup_steps = 10**6  # a learning rate near zero: random weights and labels lead nowhere
    config.train.cuda_graphs = setting == "cuda_graphs"
    accelerator = engine._accelerator(config, str(device))
    trainer = engine._trainer(config, model, accelerator, options.steps)
    if setting == "compile":
        for part in (trainer.bare_model.backbone, trainer.bare_model.neck):
            part.compile(dynamic=False)
    images = (
        (255 * random_images(options.batch, size, size)).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    )
    if device.type == "cuda":
        images = images.pin_memory()
    targets = labels(model, options.batch, size)
    loader: Any = Repeated(Batch(images, targets), options.steps)

    def steps() -> None:
        with set_for_training(accelerator):
            losses = train_epoch(trainer, loader, 0)
        assert all(map(math.isfinite, losses.values())), losses
        trainer.progress.batch, trainer.progress.sums = 0, {}

    return steps


def labels(model: Model, batch: int, size: int) -> list[Targets]:
    """Random objects, with masks and keypoints where a head learns them."""
    targets = random_targets([OBJECTS] * batch, len(model.categories), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for target in targets:
        if {"instance-seg", "semantic-seg"} & set(model.tasks):
            target.masks = (torch.rand(OBJECTS, size // 2, size // 2, generator=generator) > 0.5).to(torch.uint8)
        if "keypoints" in model.tasks:
            points = torch.rand(OBJECTS, len(COCO_SIGMAS), 3, generator=generator)
            points[..., 2] = 2
            target.keypoints = points
    return targets


def reference_steps(saved: Path, precision: str, device: torch.device, options: argparse.Namespace) -> Steps:
    """``options.steps`` steps of the reference."""
    model = RTDetrForObjectDetection.from_pretrained(saved).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-9, fused=True)
    images = random_images(options.batch, options.size, options.size).to(device)
    targets = random_targets([OBJECTS] * options.batch, 80, torch.float32)
    moved = [{key: value.to(device) for key, value in one.items()} for one in as_labels(targets)]

    def steps() -> None:
        for _ in range(options.steps):
            with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
                loss = model(images, labels=moved).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def whole_run(options: argparse.Namespace) -> None:
    """``tiny`` on the built-in set: seconds to the first step, and steps a second of later epochs."""
    epochs = 4
    config = load_config("tiny", tasks=["detection"], overrides={"train.epochs": epochs, "train.val_interval": epochs})
    with tempfile.TemporaryDirectory() as folder:
        run = engine.train(config, output=Path(folder) / "run", device=options.device)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    seconds = [record["seconds"] for record in records]
    steps = records[0]["step"]
    print(f"\ntiny on the built-in set, batch {config.train.batch_size}: first epoch {seconds[0]:.1f} s, ", end="")
    print(f"then {steps / (seconds[2] - seconds[1]):.1f} steps a second")


if __name__ == "__main__":
    main()

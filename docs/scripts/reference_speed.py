"""RT-DETR and D-FINE in every runtime compared with ``transformers``: the same weights and images, taking turns.

    python docs/scripts/reference_speed.py [--models r18 dfine_s] [--batches 1 8] [--training] [--our-allocator]

Models are r18, r34, r50 and r101, with v2_ in front in their second version, and dfine_n, _s, _m, _l and _x.

The weights are random, saved by the reference and read by ``mvision.load``. Needs transformers, openvino and
onnxruntime. ``mvision predict`` uses PyTorch in bf16, or openvino in bf16 where there is an export. The last column is
the largest difference of probabilities and coordinates from PyTorch in fp32, over the quarter of the queries with the
highest scores. The effect of bf16 on AP can only be measured with trained weights.

The reference runs in its own process with glibc's default settings. ``mvision`` lets glibc keep freed memory
(``keep_freed_memory``); with ``--our-allocator`` the reference's process does so too.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision import Model, load
from mvision.commands.benchmark_timing import alternate, median_ratio
from mvision.commands.export import export
from mvision.deploy.compare import difference
from mvision.deploy.exported import ExportedModel
from mvision.fast.prepare import PRECISIONS, prepare
from mvision.machine import keep_freed_memory
from tests.dfine_reference import as_published
from tests.reference import as_labels, build_reference, random_images, random_targets, save_reference

CPU = torch.device("cpu")
Call = Callable[[Tensor], Any]
OBJECTS, BATCH, SIDE = 8, 4, 320  # of the training step
RATE, CURVE = 1e-4, (0, 5, 10, 15, 20)  # learning rate, and the steps whose loss is printed


def main() -> None:
    """Print a table per model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["r18", "r50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--training", action="store_true", help="the training step instead")
    parser.add_argument("--our-allocator", action="store_true", help="for the reference as well")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            size = name.removeprefix("dfine_")
            made = as_published(size) if size != name else build_reference(name)
            saved = save_reference(made, folder / "reference")
            with Reference(saved, options.our_allocator) as reference:
                if options.training:
                    training(name, reference, load(saved), options.repeats)
                    continue
                calls = runtimes(saved, folder)
                for batch in options.batches:
                    inference(name, reference, calls, batch, options.size, options.repeats)


class Reference:
    """The reference's model in another process, which is idle between two requests."""

    def __init__(self, saved: Path, our_allocator: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        arguments = (other, saved, torch.get_num_threads(), our_allocator)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Run the request ``name`` in the other process and return its answer."""
        self.connection.send((name, *arguments))
        return self.connection.recv()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, saved: Path, threads: int, our_allocator: bool) -> None:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if our_allocator:
        keep_freed_memory()
    model = AutoModelForObjectDetection.from_pretrained(saved).eval()
    step: Callable[[], float] | None = None
    images = torch.empty(0)
    while True:
        name, *arguments = connection.recv()
        answer = None
        if name == "images":
            images = random_images(*arguments)
        elif name == "predict":
            with torch.no_grad():
                model(images)
        elif name == "step":
            step = step or _reference_step(model)
            answer = step()
        connection.send(answer)


def _reference_step(model: nn.Module) -> Callable[[], float]:
    images, targets = random_images(BATCH, SIDE, SIDE), random_targets([OBJECTS] * BATCH, 80, torch.float32)
    labels = as_labels(targets)
    model.train()
    return stepper(model, lambda: model(images, labels=labels).loss)


def runtimes(saved: Path, folder: Path) -> dict[str, Call]:
    """By runtime and precision, a function from uint8 images (B, 3, H, W) to raw outputs."""
    calls: dict[str, Call] = {f"PyTorch {precision}": prepare(load(saved), precision) for precision in PRECISIONS}
    for format in ("onnx", "openvino"):
        export(str(saved), format=format, output=folder / f"model.{format}", log=lambda line: None)
        for precision in PRECISIONS if format == "openvino" else PRECISIONS[:1]:
            calls[f"{format} {precision}"] = ExportedModel(folder / f"model.{format}", precision=precision)
    return calls


def inference(
    name: str, reference: Reference, candidates: dict[str, Call], batch: int, size: int, repeats: int
) -> None:
    """Print the table of one model and batch size."""
    pixels = (255 * random_images(batch, size, size)).to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as predict makes them
    reference.ask("images", batch, size, size)
    with torch.no_grad():
        expected = candidates["PyTorch fp32"](pixels)
        calls = [lambda: reference.ask("predict"), *(lambda call=call: call(pixels) for call in candidates.values())]
        taken = alternate(calls, CPU, repeats, warmups=2, seconds=240)
        print(f"| {name}, batch {batch}, {size} x {size} | milliseconds | of the reference | largest difference |")
        print("|---|---|---|---|")
        print(f"| transformers fp32 | {_milliseconds(taken[0])} | 1.00 | |")
        for (runtime, call), times in zip(candidates.items(), taken[1:]):
            largest, output = difference(expected, call(pixels))
            ratio = median_ratio(times, taken[0])
            print(f"| {runtime} | {_milliseconds(times)} | {ratio:.2f} | {largest:.1e} ({output}) |", flush=True)
    print()


def training(name: str, reference: Reference, model: Model, repeats: int) -> None:
    """Print times and losses of training steps on four images of 320 x 320 with eight objects each.

    A step is forward, loss, backward and optimiser.
    """
    images, targets = random_images(BATCH, SIDE, SIDE), random_targets([OBJECTS] * BATCH, 80, torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)

    def ours(precision: str) -> Callable[[], float]:
        copied = copy.deepcopy(model).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                outputs = copied(images, targets)
            return torch.stack([value.float() for value in copied.loss(outputs, targets).values()]).sum()

        return stepper(copied, loss)

    losses: dict[str, list[float]] = {"transformers fp32": [], "mvision fp32": [], "mvision bf16": []}
    steps = [lambda: reference.ask("step"), ours("fp32"), ours("bf16")]
    calls = [lambda step=step, curve=curve: curve.append(step()) for step, curve in zip(steps, losses.values())]
    rounds = max(repeats, CURVE[-1] + 1)
    taken = alternate(calls, CPU, rounds - 2, warmups=2)
    steps_printed = " | ".join(f"step {step}" for step in CURVE)
    print(f"| {name}, training step | milliseconds | of the reference | loss at {steps_printed} |")
    print("|---" * (3 + len(CURVE)) + "|")
    for (runtime, curve), times in zip(losses.items(), taken):
        values = " | ".join(f"{curve[step]:.2f}" for step in CURVE)
        print(f"| {runtime} | {_milliseconds(times)} | {median_ratio(times, taken[0]):.2f} | {values} |")
    print(flush=True)


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """A function that makes one training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def _milliseconds(times: list[float]) -> str:
    return f"{1000 * sorted(times)[len(times) // 2]:.0f}"


if __name__ == "__main__":
    main()

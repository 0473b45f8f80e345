"""Every way of running RT-DETR here beside ``transformers``: the same weights, the same images, in turn.

    python docs/scripts/reference_speed.py [--models r18 r50] [--batches 1 8] [--training]

Random weights that the reference saved and ``mvision.load`` read. Needs transformers, and openvino and onnxruntime for
their rows. ``PyTorch`` and ``openvino`` in bf16 are what ``mvision predict`` takes without and with an export. The last
column is the largest difference from PyTorch in fp32 (of the better quarter of the queries: probabilities and
coordinates); what bf16 costs is told by AP on trained weights, not by it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision import Model
from mvision.deploy.compare import difference
from mvision.deploy.export import export
from mvision.deploy.fast import prepare
from mvision.deploy.runtime import ExportedModel
from mvision.deploy.timing import alternate, median_ratio
from mvision.engine.machine import keep_freed_memory
from tests.comparison import Pair, make_pair
from tests.reference import as_labels, random_images, random_targets

CPU = torch.device("cpu")
Call = Callable[[Tensor], Any]


def main() -> None:
    """One table per model and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["r18", "r50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--training", action="store_true", help="the training step instead")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            pair = make_pair(Path(folder) / "reference", name)
            if options.training:
                training(name, pair, options.repeats)
                continue
            ways = roads(pair, Path(folder))
            for batch in options.batches:
                inference(name, pair, ways, batch, options.size, options.repeats)


def roads(pair: Pair, folder: Path) -> dict[str, Call]:
    """By name: from uint8 images (B, 3, H, W) to raw outputs."""
    ways: dict[str, Call] = {}
    for precision in ("fp32", "bf16"):
        ways[f"PyTorch {precision}"] = prepare(copy.deepcopy(pair.ours), precision)
    for format in ("onnx", "openvino"):
        export(str(folder / "reference"), format=format, output=folder / format)
        for precision in ("fp32", "bf16") if format == "openvino" else ("fp32",):
            ways[f"{format} {precision}"] = ExportedModel(folder / format, precision=precision)
    return ways


def inference(name: str, pair: Pair, ways: dict[str, Call], batch: int, size: int, repeats: int) -> None:
    """A table."""
    pixels = (255 * random_images(batch, size, size)).to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as predict makes them
    images = pixels.float().contiguous() / 255
    theirs: nn.Module = pair.theirs
    with torch.no_grad():
        expected = pair.ours(pixels)
        calls = [lambda: theirs(images), *(lambda call=call: call(pixels) for call in ways.values())]
        taken = alternate(calls, CPU, repeats, warmups=2, seconds=240)
        print(f"| {name}, batch {batch}, {size} x {size} | milliseconds | of the reference | largest difference |")
        print("|---|---|---|---|")
        print(f"| transformers fp32 | {1000 * sorted(taken[0])[len(taken[0]) // 2]:.0f} | 1.00 | |")
        for (way, call), times in zip(ways.items(), taken[1:]):
            found, where = difference(expected, call(pixels))
            middle = 1000 * sorted(times)[len(times) // 2]
            print(f"| {way} | {middle:.0f} | {median_ratio(times, taken[0]):.2f} | {found:.1e} ({where}) |", flush=True)
    print()


def training(name: str, pair: Pair, repeats: int) -> None:
    """Forward, loss, backward and optimiser on four images of 320 x 320 with eight objects each."""
    images, targets = random_images(4, 320, 320), random_targets([8] * 4, 80, torch.float32)

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

        def run() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def ours(model: Model, pixels: Tensor, precision: str) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                outputs = model(pixels, targets)
            return torch.stack([value.float() for value in model.loss(outputs, targets).values()]).sum()

        return loss

    last = images.contiguous(memory_format=torch.channels_last)
    theirs = pair.theirs.train()
    calls = {"transformers fp32": step(theirs, lambda: theirs(images, labels=as_labels(targets)).loss)}
    for precision in ("fp32", "bf16"):
        model = copy.deepcopy(pair.ours).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls[f"mvision {precision}"] = step(model, ours(model, last, precision))
    taken = alternate(list(calls.values()), CPU, repeats, warmups=2)
    print(f"| {name}, training step | milliseconds | of the reference |\n|---|---|---|")
    for way, times in zip(calls, taken):
        print(f"| {way} | {1000 * sorted(times)[len(times) // 2]:.0f} | {median_ratio(times, taken[0]):.2f} |")
    print(flush=True)


if __name__ == "__main__":
    main()

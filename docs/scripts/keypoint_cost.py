"""Time of keypoint models compared with their backbone and neck alone, and the time that fusing RepBlocks saves.

    python docs/scripts/keypoint_cost.py

All variants of a model alternate in one process. Times are medians; ratios are medians of ratios of neighbouring times.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch

from mvision import create_model
from mvision.machine import keep_freed_memory
from mvision.model import Model
from mvision.structures import Category
from mvision.structures.oks import COCO_SIGMAS

PERSON = Category(id=1, name="person", keypoints=list(COCO_SIGMAS))


def main() -> None:
    """Print a Markdown table with one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, fp32, one image\n")
    print("| model | size | encoder | with keypoints | ratio | not fused | ratio to fused |")
    print(f"|{'---|' * 7}")
    for name in ("tiny", "rtkeypoint_192", "small", "base"):
        print(row(name, repeats), flush=True)


def row(name: str, repeats: int) -> str:
    """The times of one model."""
    plain = build(name)
    fused = copy.deepcopy(plain).fuse()
    height, width = plain.config.image_size
    images = torch.rand(1, 3, height, width)
    calls = [lambda: fused.features(images), lambda: fused(images), lambda: plain(images)]
    encoder, whole, unfused = times(calls, repeats)
    over, saved = ratio(whole, encoder), ratio(unfused, whole)
    return f"| {name} | {width} x {height} | {ms(encoder)} | {ms(whole)} | {over:.2f} | {ms(unfused)} | {saved:.2f} |"


def build(name: str) -> Model:
    """A shipped model for people with COCO's 17 points, ready for inference."""
    torch.manual_seed(0)
    model = create_model(name, ["keypoints"], categories=[PERSON])
    # The norms need the statistics of a batch: without these, activations of random weights shrink to denormal numbers,
    # which are slow on CPUs.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.rand(2, 3, *model.config.image_size))
    return model.eval()


@torch.inference_mode()
def times(calls: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every repetition of every call; the calls take turns."""
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, taken):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return taken


def ms(seconds: list[float]) -> str:
    """Their median, for the table."""
    return f"{1000 * statistics.median(seconds):.1f} ms"


def ratio(over: list[float], under: list[float]) -> float:
    """The median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(over, under))


if __name__ == "__main__":
    main()

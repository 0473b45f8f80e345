"""``Model.predict`` on a thousand JPEGs from end to end, on a GPU: images a second, and how busy the GPU was.

    python docs/scripts/gpu_predict.py [--models rtdetr_r18 small] [--count 1000] [--device cuda]

The pictures are those of the built-in data set, again and again. Random weights; the threshold is the score that about
eight objects of an image reach. ``alone`` is the prepared model's forward pass on batches that are on the GPU already.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from pathlib import Path

import torch
from gpu_lab import Busy, describe

from mvision import Model, create_model
from mvision.builtin.store import ensure_builtin
from mvision.fast.prepare import prepare
from mvision.inference.predict import eval_mode
from mvision.inference.predict_sources import predict_sources
from mvision.machine import keep_freed_memory
from mvision.structures import Category
from mvision.structures.oks import COCO_SIGMAS

CATEGORIES = [
    Category(id=1, name="person", keypoints=[f"point {index}" for index in range(len(COCO_SIGMAS))]),
    *(Category(id=index, name=f"class {index}") for index in range(2, 9)),
]


def main() -> None:
    """One row per model and way of predicting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["rtdetr_r18", "small"])
    parser.add_argument("--tasks", nargs="+", default=["detection"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    keep_freed_memory()
    device = torch.device(options.device)
    print(f"{describe(device)}\n")
    root = ensure_builtin()
    files = list(itertools.islice(itertools.cycle(sorted((root / "images").glob("*.jpg"))), options.count))
    print("| model | tasks | batch | way | images/s | GPU busy |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        model = create_model(name, options.tasks, categories=CATEGORIES).eval().to(device)
        threshold = threshold_for(model, [str(file) for file in files[:8]])
        for batch in options.batches:
            row = f"| {name} | {'+'.join(options.tasks)} | {batch} |"
            rate, busy = alone(model, device, batch, options.count)
            print(f"{row} alone | {rate:.0f} | {busy} |", flush=True)
            rate, busy = whole(model, device, files, threshold, batch)
            print(f"{row} Model.predict | {rate:.0f} | {busy} |", flush=True)
            rate, busy = command(model, device, files, threshold, batch)
            print(f"{row} mvision predict, with pictures | {rate:.0f} | {busy} |", flush=True)


def threshold_for(model: Model, files: list[str], objects: int = 8) -> float:
    """A score that about ``objects`` results of an image reach: untrained scores are all alike."""
    scores = [found.scores[min(objects, len(found) - 1)] for found in model.predict(files, threshold=0.0)]
    return float(sorted(scores)[len(scores) // 2])


def alone(model: Model, device: torch.device, batch: int, count: int) -> tuple[float, str]:
    """The prepared model's forward pass."""
    prepared = prepare(create_model_like(model).to(device), "bf16")
    images = torch.randint(0, 256, (batch, *model.config.image_size, 3), dtype=torch.uint8).to(device)
    images = images.permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(5):
            prepared(images)
        synchronize(device)
        start = time.perf_counter()
        with Busy(device) as busy:
            for _ in range(count // batch):
                prepared(images)
            synchronize(device)
    return count // batch * batch / (time.perf_counter() - start), str(busy)


def create_model_like(model: Model) -> Model:
    """A second model with the same weights."""
    other = Model(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def whole(model: Model, device: torch.device, files: list[Path], threshold: float, batch: int) -> tuple[float, str]:
    """``Model.predict`` on all files, after a first call on some."""
    paths = [str(file) for file in files]
    model.predict(paths[: 4 * batch], threshold=threshold, batch_size=batch)
    synchronize(device)
    start = time.perf_counter()
    with Busy(device) as busy:
        found = model.predict(paths, threshold=threshold, batch_size=batch)
    rate = len(found) / (time.perf_counter() - start)
    return rate, str(busy)


def command(model: Model, device: torch.device, files: list[Path], threshold: float, batch: int) -> tuple[float, str]:
    """What ``mvision predict`` does after it has loaded the model: pictures and predictions.json."""
    prepared = prepare(create_model_like(model).to(device), "bf16")
    with tempfile.TemporaryDirectory() as folder, Busy(device) as busy, eval_mode(prepared):
        sources = Path(folder) / "sources"
        sources.mkdir()
        for number, file in enumerate(files):
            shutil.copy(file, sources / f"{number:06}.jpg")
        summary = predict_sources(prepared, [sources], Path(folder) / "out", threshold, batch, progress=False)
    return summary.images / summary.seconds, str(busy)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""The cost of masks: latency compared with detection alone, and memory with large images and many objects.

    python docs/scripts/mask_cost.py

All in one run, in which the models take turns; medians, and ratios of paired times.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from mvision import create_model
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.loading.dataset import Dataset, SampleKey
from mvision.machine import keep_freed_memory
from mvision.model import Model
from mvision.structures import Targets


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--crowded", metavar="DIR", help="a data set with masks, to time its loading")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    large_image_memory()  # before training's memory, which stays with the process
    latency(arguments.repeats)
    training_memory()
    if arguments.crowded:
        loading(arguments.crowded)


def build(name: str, task: str) -> Model:
    """A shipped model for 80 classes, ready for inference."""
    torch.manual_seed(0)
    model = create_model(name, [task], num_classes=80)
    # Norms need the statistics of a batch: else activations become denormal numbers, with which a CPU is slow.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.rand(2, 3, *model.config.image_size))
    return model.eval().fuse()


def latency(repeats: int) -> None:
    """Network and post-processing of one image, with masks and without, alternating."""
    print("| model | size | detection, network | with masks | ratio | post-processing of 20 found: boxes | masks |")
    print("|---|---|---|---|---|---|---|")
    for name in ("tiny", "small", "base"):
        models = [build(name, task) for task in ("detection", "instance-seg")]
        height, width = models[0].config.image_size
        images = torch.rand(1, 3, height, width)
        times: list[list[float]] = [[], []]
        after: list[list[float]] = [[], []]
        with torch.no_grad():
            for model in models:
                model(images)
            for _ in range(repeats):
                for model, network, rest in zip(models, times, after):
                    seconds, outputs = clock(lambda m=model, i=images: m(i))
                    network.append(seconds)
                    (task,) = outputs
                    outputs[task]["logits"][:] = -9
                    outputs[task]["logits"][:, :20, 0] = 9
                    seconds, _ = clock(lambda m=model, o=outputs: m.postprocess(o, [(480, 640)], 0.5))
                    rest.append(seconds)
        plain, masks = (statistics.median(column) for column in times)
        ratio = statistics.median(b / a for a, b in zip(*times))
        boxes, drawn = (statistics.median(column) * 1e3 for column in after)
        print(
            f"| {name} | {height} x {width} | {plain * 1e3:.1f} ms | {masks * 1e3:.1f} ms | {ratio:.2f} "
            f"| {boxes:.2f} ms | {drawn:.2f} ms |"
        )
    print()


def clock(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Peak:
    """Largest resident memory of this process inside the block, over what it was before."""

    def __enter__(self) -> Peak:
        self.process = psutil.Process()
        self.before = self.highest = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.gigabytes = (self.highest - self.before) / 1e9

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, self.process.memory_info().rss)


def training_memory(objects: int = 200, side: int = 1024) -> None:
    """One training step on one image with many objects."""
    keep_freed_memory()
    torch.manual_seed(0)
    boxes = torch.rand(objects, 4) * 0.05 + 0.03
    boxes[:, :2] = torch.rand(objects, 2) * 0.9 + 0.05
    masks = torch.zeros(objects, side // 2, side // 2, dtype=torch.uint8)
    for mask, (x, y, w, h) in zip(masks, (boxes * side / 2).tolist()):
        mask[int(y - h / 2) : int(y + h / 2) + 1, int(x - w / 2) : int(x + w / 2) + 1] = 1
    labels = torch.zeros(objects, dtype=torch.int64)
    targets = [Targets(boxes=boxes, labels=labels, areas=boxes[:, 2] * boxes[:, 3], masks=masks)]
    images = torch.rand(1, 3, side, side)
    print(f"One training step, one image of {side} x {side} with {objects} objects, fp32:\n")
    for task in ("detection", "instance-seg"):
        model = create_model("small", [task], num_classes=80, image_size=side).train()
        with Peak() as peak:
            seconds, _ = clock(lambda model=model: step(model, images, targets))
        print(f"- {task}: {peak.gigabytes:.2f} GB over the model, {seconds:.1f} s")
    print()


def step(model: Model, images: torch.Tensor, targets: list[Targets]) -> None:
    """Forward, loss, backward."""
    terms = model.loss(model(images, targets), targets)
    torch.stack(list(terms.values())).sum().backward()


def large_image_memory(count: int = 300, size: tuple[int, int] = (3000, 4000)) -> None:
    """Masks of many instances at the full size of a large image, from the model's grid to a drawn picture."""
    model = build("small", "instance-seg")
    grid = torch.full((1, count, 160, 160), -4.0)
    rng = np.random.default_rng(0)
    for mask in grid[0]:
        y, x = rng.integers(0, 110, 2)
        mask[y : y + 50, x : x + 50] = 4.0  # a tenth of the image each
    logits = torch.full((1, count, 80), -9.0)
    logits[..., 0] = 9.0
    outputs = {"instance-seg": {"logits": logits, "boxes": torch.rand(1, count, 4), "masks": grid}}
    picture = np.full((*size, 3), 128, np.uint8)
    with Peak() as peak:
        found_in, results = clock(lambda: model.postprocess(outputs, [size], 0.5))
        (found,) = results  # type: ignore[misc]
        drawn_in, _ = clock(lambda: found.draw(picture))
        written_in, entries = clock(lambda: found.to_coco(1))
    print(
        f"{count} instances on {size[1]} x {size[0]}: {peak.gigabytes:.2f} GB for post-processing ({found_in:.1f} s), "
        f"drawing ({drawn_in:.1f} s) and COCO's run lengths of all {len(entries)} ({written_in:.3f} s)\n"  # type: ignore[arg-type]
    )


def loading(root: str, objects: int = 500) -> None:
    """A training sample with many objects: the labels of many images of a data set put on one."""
    split = CocoSplit(find_layout(root).split("train"), ("boxes", "masks"))
    split.start[1:] = min(objects, len(split.labels))
    for stride, side in ((2, 640), (2, 1024)):
        dataset = Dataset(split, mask_stride=stride)
        with Peak() as peak:
            seconds, sample = clock(lambda d=dataset, s=side: d[SampleKey(0, 0, (s, s))])
        masks = sample.targets.masks  # type: ignore[attr-defined]
        print(
            f"- sample of {len(masks)} objects at {side} x {side}: {seconds * 1e3:.0f} ms, "
            f"masks {masks.nbytes / 1e6:.0f} MB, peak {peak.gigabytes * 1e3:.0f} MB ({Path(root).name})"
        )


if __name__ == "__main__":
    main()

"""Time of one forward pass of a joint model for three tasks, compared with those of three models for one task each.

    python docs/scripts/joint_latency.py
    python docs/scripts/joint_latency.py --poses own shared

Random weights, fused, one image; all models of a size take turns in one run; medians of the ratios. The last column is
the time in which ``Model.postprocess`` makes results of the joint model's outputs (threshold 0.5, with drawn scores of
which about ten objects of an image reach it): poses with queries of the objects are linked by them, others by overlap.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time

import torch

from mvision import create_model
from mvision.machine import keep_freed_memory
from mvision.model import Model
from mvision.structures import Category
from mvision.structures.oks import COCO_SIGMAS

POSES = {"dense": {}, "own": {"kind": "query"}, "shared": {"kind": "query", "queries": "shared"}}
TASKS = ("detection", "instance-seg", "keypoints")
# The classes of the built-in set, one of which has keypoints.
CATEGORIES = [
    Category(id=1, name="person", keypoints=list(COCO_SIGMAS)),
    *(Category(id=index, name=str(index)) for index in range(2, 9)),
]


def main() -> None:
    """One row per model and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument(
        "--poses", nargs="+", choices=list(POSES), default=["dense"],
        help="heads for poses: dense, or from queries of their own, or from those of the objects  [default: dense]",
    )  # fmt: skip
    options = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, one image\n")
    tasks = "detection | instance-seg | keypoints | joint | to the slowest | to all three"
    print(f"| model | poses | size | precision | {tasks} | post-processing |")
    print(f"|{'---|' * 11}")
    for name, poses in itertools.product(options.models, options.poses):
        size = create_model(name, TASKS, categories=CATEGORIES).config.image_size
        models = [build(name, tasks, size, poses) for tasks in (*((task,) for task in TASKS), TASKS)]
        for precision in (torch.float32, torch.bfloat16):
            print(row(f"{name} | {poses}", models, precision, options.repeats), flush=True)


def build(name: str, tasks: tuple[str, ...], size: tuple[int, int], poses: str) -> Model:
    """A model of a size that all share, ready for inference. Poses alone always have queries of their own."""
    torch.manual_seed(0)
    settings = {f"heads__keypoints__{key}": value for key, value in POSES[poses].items() if "keypoints" in tasks}
    if tasks == ("keypoints",):
        settings.pop("heads__keypoints__queries", None)
    model = create_model(name, tasks, categories=CATEGORIES, image_size=size, **settings)
    # Norms need the statistics of a batch: else activations become denormal numbers, with which a CPU is slow.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.rand(2, 3, *size))
    return model.eval().fuse()


@torch.inference_mode()
def row(name: str, models: list[Model], precision: torch.dtype, repeats: int) -> str:
    """Seconds of every model in turn, ``repeats`` times."""
    height, width = models[0].config.image_size
    images = torch.rand(1, 3, height, width)
    taken: list[list[float]] = [[] for _ in models]
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for number in range(-2, repeats):
            for model, seconds in zip(models, taken):
                start = time.perf_counter()
                model(images)
                if number >= 0:
                    seconds.append(time.perf_counter() - start)
    medians = [1000 * statistics.median(seconds) for seconds in taken]
    *singles, joint = taken
    slowest = statistics.median(both / max(single) for both, *single in zip(joint, *singles))
    together = statistics.median(both / sum(single) for both, *single in zip(joint, *singles))
    cells = " | ".join(f"{value:.1f} ms" for value in medians)
    kind = str(precision).removeprefix("torch.")
    results = 1000 * post_processing(models[-1], images, repeats)
    ratios = f"{slowest:.2f} | {together:.2f}"
    return f"| {name} | {width} x {height} | {kind} | {cells} | {ratios} | {results:.1f} ms |"


def post_processing(model: Model, images: torch.Tensor, repeats: int) -> float:
    """The median of the seconds that results take."""
    outputs = model(images)
    sizes = [(images.shape[2], images.shape[3])]
    for found in outputs.values():
        scores = torch.randn(found["logits"].shape, generator=torch.Generator().manual_seed(0)) - 4
        scores.flatten()[:: scores.numel() // 10] = 2.0
        found["logits"] = scores
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.postprocess(outputs, sizes, 0.5)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()

"""A whole model, from a picture to results: where the time goes, and what each way of running it costs."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvision.commands.benchmark_timing import alternate, median_ratio
from mvision.config import load_config
from mvision.deploy.export import export
from mvision.deploy.exported import ExportedModel
from mvision.deploy.fast import PRECISIONS, Precision, prepare
from mvision.errors import UserError
from mvision.machine import cpu_name, keep_freed_memory, resolve_device
from mvision.model import Model
from mvision.structures.coco_names import coco_with_keypoints
from mvision.structures.images import resize_image
from mvision.weights import load, save_weights

PICTURE = (480, 640)  # height and width of the pictures that are prepared
ROADS = ("eager", "compiled", "onnx", "openvino")
REFERENCE = ("eager", "fp32")


def benchmark_model(
    *,
    model: str | None = None,
    weights: str | None = None,
    tasks: Sequence[str] = (),
    batches: Sequence[int] = (1, 8),
    precisions: Sequence[str] = ("fp32", "bf16"),
    roads: Sequence[str] = ROADS,
    repeats: int = 15,
    device: str | None = None,
    output: Path = Path("benchmark"),
    log: Callable[[str], None] = print,
) -> str:
    """Measure, write ``model.json`` and ``model.md`` into ``output``, and return the tables.

    Args:
        model: a shipped model or timm backbone with random weights and COCO's 80 classes; or give ``weights``.
        tasks: of it; none: detection, or all that the weights do.
        batches: images per call.
        precisions: ``fp32``, ``bf16``.
        roads: of ``ROADS``; the exported ones on a CPU alone.
        repeats: rounds at most.
        device: None is the first GPU, else the CPU.
        log: gets a line per road.

    Raises:
        UserError: an unknown model, road or precision, or a package that a road needs is missing.
    """
    for given, known, option in ((roads, ROADS, "--road"), (precisions, PRECISIONS, "--precision")):
        for name in given:
            if name not in known:
                raise UserError(f"{option} {name}: choose one of {', '.join(known)}")
    if model is not None and weights is not None:
        raise UserError("--model and --weights: give one of them")
    keep_freed_memory()
    chosen = resolve_device(device)
    plain = load(weights, list(tasks) or None) if weights is not None else _random(model or "base", tasks)
    log(f"{', '.join(plain.tasks)} of {weights or model or 'base'} at {_size(plain)}")
    asked = [precision for precision in PRECISIONS if precision in precisions]
    needed = [precision for precision in PRECISIONS if precision in (*asked, REFERENCE[1])]
    ready = {precision: prepare(copy.deepcopy(plain).to(chosen), precision) for precision in needed}
    parts = [{"precision": p, **_parts(ready[p], batch, repeats)} for batch in batches for p in asked]
    log("parts: done")
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(plain, ready, roads, asked, Path(folder), log)
        totals = [_totals(ways, ready["fp32"], batch, repeats) for batch in batches]
    where = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else cpu_name()
    machine = f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    document = {
        "model": weights or model or "base",
        "tasks": plain.tasks,
        "size": list(plain.config.image_size),
        "machine": machine,
        "parts": parts,
        "totals": [row for rows in totals for row in rows],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "model.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = _page(document)
    (output / "model.md").write_text(text, encoding="utf-8")
    return text


def _random(name: str, tasks: Sequence[str]) -> Model:
    """A shipped model for COCO's classes; its norms have seen a batch, or activations fade to slow tiny numbers."""
    config = load_config(name, tasks=list(tasks) or None).model
    config.backbone.pretrained = False
    config.categories = coco_with_keypoints()
    torch.manual_seed(0)
    model = Model(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.rand(2, 3, *config.image_size))
    return model.eval()


def _parts(model: Model, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of every stage of one batch, stage after stage in every round."""
    size = model.config.image_size
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*PICTURE, 3), dtype=np.uint8) for _ in range(batch)]

    def read() -> Tensor:
        stacked = np.stack([resize_image(picture, size) for picture in pictures])
        return torch.from_numpy(stacked).to(model.device).permute(0, 3, 1, 2)

    images = read()
    with torch.no_grad():
        maps = model.backbone(images)
        features = model.features(images)
        outputs = model(images)

    stages: dict[str, Callable[[], Any]] = {
        "preparation": read,
        "backbone": lambda: model.backbone(images),
        "neck": lambda: model.neck(maps[len(features.laterals) :]),
        **{f"head {task}": partial(model.run_head, task, features) for task in model.heads},
        "post-processing": lambda: model.postprocess(outputs, [PICTURE] * batch, 0.5),
        "all of it": lambda: model.postprocess(model(read()), [PICTURE] * batch, 0.5),
    }
    with torch.no_grad():
        taken = alternate(list(stages.values()), model.device, repeats, seconds=120)
    return {
        "batch": batch,
        "milliseconds": {name: 1000 * statistics.median(times) for name, times in zip(stages, taken)},
    }


Way = tuple[str, str, Callable[[Tensor], Any]]


def _ways(
    plain: Model,
    ready: Mapping[Precision, Model],
    roads: Sequence[str],
    precisions: Sequence[Precision],
    folder: Path,
    log: Callable[[str], None],
) -> list[Way]:
    """Road, precision and call of everything that is compared."""
    ways: list[Way] = []
    device = ready["fp32"].device
    for road in dict.fromkeys(("eager", *roads)):
        if road in ("onnx", "openvino") and device.type != "cpu":
            continue
        path = folder / ("model.onnx" if road == "onnx" else "openvino")
        if road in ("onnx", "openvino"):
            save_weights(plain, folder / "model.safetensors")
            export(str(folder / "model.safetensors"), format=road, output=path, log=log)
        for precision in precisions:
            if road == "onnx" and precision != "fp32":
                continue
            if road in ("onnx", "openvino"):
                call: Callable[[Tensor], Any] = ExportedModel(path, precision=precision)
            elif road == "compiled":
                call = partial(_run, torch.compile(prepare(copy.deepcopy(plain).to(device), precision, packed=False)))
            else:
                call = partial(_run, ready[precision])
            ways.append((road, precision, call))
    return ways


def _run(module: Any, images: Tensor) -> Any:
    with torch.no_grad():
        return module(images)


def _totals(ways: Sequence[Way], model: Model, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of all ways for one batch, in turn, and their ratios to eager fp32 (or to the first)."""
    images = torch.randint(0, 256, (batch, *model.config.image_size, 3), dtype=torch.uint8)
    images = images.to(model.device).permute(0, 3, 1, 2)
    taken = alternate([partial(call, images) for _, _, call in ways], model.device, repeats, seconds=240)
    names = [way[:2] for way in ways]
    base = taken[names.index(REFERENCE) if REFERENCE in names else 0]
    return [
        {
            "batch": batch,
            "road": road,
            "precision": precision,
            "milliseconds": 1000 * statistics.median(times),
            "ratio": median_ratio(times, base),
        }
        for (road, precision), times in zip(names, taken)
    ]


def _size(model: Model) -> str:
    height, width = model.config.image_size
    return f"{width} x {height}"


def _page(document: dict[str, Any]) -> str:
    height, width = document["size"]
    lines = [
        f"# {document['model']}: {', '.join(document['tasks'])} at {width} x {height}",
        "",
        f"One run, in turn, medians; as predict runs it. {document['machine']}.",
        "",
        "| eager | " + " | ".join(f"batch {p['batch']}, {p['precision']}" for p in document["parts"]) + " |",
        "|---" * (1 + len(document["parts"])) + "|",
    ]
    for stage in document["parts"][0]["milliseconds"]:
        cells = [f"{part['milliseconds'][stage]:.1f} ms" for part in document["parts"]]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "From pixels to raw outputs:",
        "",
        "| batch | road | precision | time | of eager fp32 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['batch']} | {row['road']} | {row['precision']} | {row['milliseconds']:.1f} ms | {row['ratio']:.2f} |"
        for row in document["totals"]
    ]
    return "\n".join([*lines, ""])

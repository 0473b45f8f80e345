"""``mvision benchmark model``: time of every part of a model, and of the whole model in every runtime."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvision.commands.benchmark_timing import alternate, median_ratio
from mvision.commands.export import export
from mvision.config import load_config
from mvision.deploy.exported import ExportedModel
from mvision.deploy.formats import ENDINGS, MOBILE
from mvision.errors import UserError, did_you_mean
from mvision.evaluation.tables import markdown_table, markdown_text
from mvision.fast.prepare import PRECISIONS, prepare
from mvision.machine import (
    Precision,
    computes_in_bf16,
    device_name,
    inference_precision,
    keep_freed_memory,
    resolve_device,
)
from mvision.model import Features, Model
from mvision.storage.atomic import write_text
from mvision.structures.coco_names import coco_with_keypoints
from mvision.structures.images import resize_image
from mvision.weights import load, save_weights

PICTURE = (480, 640)  # height and width of the images that are resized to the model's input
BATCHES = (1, 8)
RUNTIMES = ("eager", "compiled", "onnx", "openvino")
MORE = MOBILE  # measured where they are asked for: they are for other machines, and their converters are large
EXPORTED = ("onnx", "openvino", *MORE)
REFERENCE = ("eager", "fp32")


class Candidate(NamedTuple):
    """A model in one runtime and precision; ``call`` takes (B, 3, H, W) uint8."""

    runtime: str
    precision: Precision
    call: Callable[[Tensor], Any]


def benchmark_model(
    *,
    model: str | None = None,
    weights: str | None = None,
    family: str | None = None,
    tasks: Sequence[str] = (),
    batches: Sequence[int] = (),
    precisions: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    repeats: int = 15,
    device: str | None = None,
    output: Path = Path("benchmark"),
    log: Callable[[str], None] = print,
) -> str:
    """Measure, write ``model.json`` and ``model.md`` into ``output``, and return the tables.

    Args:
        model: a shipped model or timm backbone, with random weights and COCO's 80 classes; or give ``weights``.
        weights, family: any source that ``mvision.load`` takes.
        tasks: of the model; empty: detection, or all that the weights have.
        batches: images per call; empty: ``BATCHES``.
        precisions: ``fp32`` or ``bf16``; empty: both, where the device computes in bf16.
        runtimes: of ``RUNTIMES`` and ``MORE``; empty: ``RUNTIMES``. Exports run on a CPU only; ``eager`` always runs.
        repeats: most rounds.
        device: None: the first GPU, else the CPU.
        log: is called with a line per step.

    Raises:
        UserError: an unknown model, a runtime or precision that does not exist here, or a missing package.
    """
    _check_choice("--runtime", runtimes, (*RUNTIMES, *MORE))
    _check_choice("--precision", precisions, PRECISIONS)
    if model is not None and weights is not None:
        raise UserError("--model and --weights: give one of them")
    keep_freed_memory()
    chosen, name = resolve_device(device), weights or model or "base"
    plain = load(weights, list(tasks) or None, family=family) if weights is not None else _random_model(name, tasks)
    height, width = plain.config.image_size
    log(f"{', '.join(plain.tasks)} of {name} at {width} x {height}")
    asked = _precisions(precisions, chosen, log)
    eager = {p: prepare(copy.deepcopy(plain).to(chosen), p) for p in dict.fromkeys((*asked, "fp32"))}
    batches = batches or BATCHES
    parts = [{"precision": p, "batch": batch, **_parts(eager[p], batch, repeats)} for batch in batches for p in asked]
    log("parts: done")
    with tempfile.TemporaryDirectory() as folder:
        candidates = _candidates(plain, eager, runtimes or RUNTIMES, asked, Path(folder), log)
        totals = [row for batch in batches for row in _totals(candidates, eager["fp32"], batch, repeats)]
    document = {
        "model": name,
        "tasks": plain.tasks,
        "size": [height, width],
        "machine": f"{device_name(chosen)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "parts": parts,
        "totals": totals,
    }
    text = _page(document)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "model.json", json.dumps(document, indent=1) + "\n")
    write_text(output / "model.md", text)
    return text


def _precisions(given: Sequence[str], device: torch.device, log: Callable[[str], None]) -> list[Precision]:
    """Those that were asked for, by default all that the device computes in."""
    if given:
        return [inference_precision(precision, device) for precision in PRECISIONS if precision in given]
    if computes_in_bf16(device):
        return list(PRECISIONS)
    log(f"bf16: not measured, {device_name(device)} does not compute in it")
    return ["fp32"]


def _check_choice(option: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise UserError(f"{option} {value}: {did_you_mean(value, choices)}")


def _random_model(name: str, tasks: Sequence[str]) -> Model:
    """A shipped model with random weights for COCO's classes.

    One batch in training mode sets the statistics of its norms. Without that, activations shrink from layer to layer to
    denormal numbers, which a CPU computes slowly.
    """
    config = load_config(name, tasks=list(tasks) or None).model
    config.backbone.forget_weights()
    config.categories = coco_with_keypoints()
    torch.manual_seed(0)
    model = Model(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.rand(2, 3, *config.image_size))
    return model.eval()


def _head_call(model: Model, task: str, features: Features) -> Callable[[], Any]:
    """A call of one head alone; the queries that it takes of another head are computed here."""
    source = model.takes_queries_of.get(task)
    if source is None:
        return partial(model.run_head, task, features)
    _, queries = model.run_head(source, features, hand_over=True)
    return partial(model.run_head, task, features, queries=queries)


def _parts(model: Model, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of every part of the model on one batch; all parts take turns."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*PICTURE, 3), dtype=np.uint8) for _ in range(batch)]

    def resize() -> Tensor:
        stacked = np.stack([resize_image(picture, model.config.image_size) for picture in pictures])
        return torch.from_numpy(stacked).to(model.device).permute(0, 3, 1, 2)

    images = resize()
    with torch.no_grad():
        maps = model.backbone(images)
        features = model.features(images)
        outputs = model(images)
        calls: dict[str, Callable[[], Any]] = {
            "preparation": resize,
            "backbone": lambda: model.backbone(images),
            "neck": lambda: model.neck(maps[len(features.laterals) :]),
            **{f"head {task}": _head_call(model, task, features) for task in model.heads},
            "post-processing": lambda: model.postprocess(outputs, [PICTURE] * batch, 0.5),
            "all of it": lambda: model.postprocess(model(resize()), [PICTURE] * batch, 0.5),
        }
        times = alternate(list(calls.values()), model.device, repeats, seconds=120)
    return {"milliseconds": {name: 1000 * statistics.median(of_part) for name, of_part in zip(calls, times)}}


def _candidates(
    plain: Model,
    eager: Mapping[Precision, Model],
    runtimes: Sequence[str],
    precisions: Sequence[Precision],
    folder: Path,
    log: Callable[[str], None],
) -> list[Candidate]:
    """Every runtime in every precision that it has on this device; exports are written into ``folder``."""
    candidates: list[Candidate] = []
    device = next(iter(eager.values())).device
    for runtime in dict.fromkeys((REFERENCE[0], *runtimes)):
        path = folder / f"model.{runtime}"
        if runtime in EXPORTED:
            if device.type != "cpu":
                continue
            save_weights(plain, folder / "model.safetensors")
            path = path.with_name(f"model{ENDINGS.get(runtime, '')}")
            export(str(folder / "model.safetensors"), format=runtime, output=path, log=log)
        for precision in precisions:
            if runtime in ENDINGS and precision != "fp32":
                continue
            call: Callable[[Tensor], Any]
            if runtime in EXPORTED:
                call = ExportedModel(path, precision=precision)
            elif runtime == "compiled":
                model = prepare(copy.deepcopy(plain).to(device), precision, packed=False)
                call = partial(_without_gradients, torch.compile(model))
            else:
                call = partial(_without_gradients, eager[precision])
            candidates.append(Candidate(runtime, precision, call))
    return candidates


def _without_gradients(call: Callable[[Tensor], Any], images: Tensor) -> Any:
    with torch.no_grad():
        return call(images)


def _totals(candidates: Sequence[Candidate], model: Model, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of all candidates for one batch, and their ratio to eager fp32, or to the first without that."""
    images = torch.randint(0, 256, (batch, *model.config.image_size, 3), dtype=torch.uint8)
    images = images.to(model.device).permute(0, 3, 1, 2)
    calls = [partial(candidate.call, images) for candidate in candidates]
    times = alternate(calls, model.device, repeats, seconds=240)
    names = [(candidate.runtime, candidate.precision) for candidate in candidates]
    base = times[names.index(REFERENCE) if REFERENCE in names else 0]
    return [
        {
            "batch": batch,
            "runtime": runtime,
            "precision": precision,
            "milliseconds": 1000 * statistics.median(of_candidate),
            "ratio": median_ratio(of_candidate, base),
        }
        for (runtime, precision), of_candidate in zip(names, times)
    ]


def _page(document: Mapping[str, Any]) -> str:
    height, width = document["size"]
    parts = document["parts"]
    stages = [
        [stage, *(f"{part['milliseconds'][stage]:.1f} ms" for part in parts)] for stage in parts[0]["milliseconds"]
    ]
    totals = [
        [str(row["batch"]), row["runtime"], row["precision"], f"{row['milliseconds']:.1f} ms", f"{row['ratio']:.2f}"]
        for row in document["totals"]
    ]
    lines = [
        f"# {markdown_text(document['model'])}: {', '.join(document['tasks'])} at {width} x {height}",
        "",
        "Everything takes turns in one run; medians. The model is prepared as for `mvision predict`. "
        f"{document['machine']}.",
        "",
        *markdown_table(["eager", *(f"batch {part['batch']}, {part['precision']}" for part in parts)], stages),
        "",
        "From pixels to raw outputs:",
        "",
        *markdown_table(["batch", "runtime", "precision", "time", "of eager fp32"], totals),
        "",
    ]
    return "\n".join(lines)

"""INT8 for OpenVINO: calibrated on real images, and measured before it is called done.

The heads stay in floating point: RT-DETR's decoder, whose boxes are sums of small corrections, loses nearly everything.
What else must differs from model to model, so the candidates below are tried from the most to the least that is
quantised, and the first whose loss of AP is small enough is kept; the best of them otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from mvision.config import DataConfig
from mvision.data import build_eval_loader, read_validation
from mvision.deploy.coordinates import coordinate_operators, mark
from mvision.deploy.exported import DESCRIPTION, XML, ExportedModel, openvino_core, require
from mvision.errors import UserError
from mvision.evaluation.evaluate import Validation, evaluate_all, make_metrics
from mvision.heads import head_class
from mvision.machine import cpu_has_bf16

IMAGES = 300  # to calibrate with, at most
ALLOWED = 0.01  # relative loss of a task's main figure
# What stays in floating point: parts of the names of nodes, which begin with the path of their module.
CANDIDATES: dict[str, list[str]] = {
    "backbone and neck": ["model.heads.*"],
    "backbone and neck without their first layers": ["model.heads.*", "model.backbone/.*", "model.neck.projections.*"],
    "backbone": ["model.heads.*", "model.neck.*", "model.backbone/.*"],
}


@dataclass
class Quantised:
    """``before`` and ``after``: each task's main figure; ``kept``: the candidate's name; ``lines``: what was tried."""

    kept: str
    before: dict[str, float]
    after: dict[str, float]
    lines: list[str]

    @property
    def loss(self) -> float:
        """The largest relative loss of a task."""
        return _loss(self.before, self.after)


def quantise(folder: Path, data: str | None, log: Callable[[str], None]) -> Quantised:
    """Replace the OpenVINO model in ``folder`` by one in INT8.

    Args:
        data: a data folder: training images to calibrate with, validation images to measure on. None: the built-in set.
        log: gets a line per candidate.

    Raises:
        UserError: nncf is missing, or anything wrong with the data.
    """
    require("nncf")
    import nncf
    import openvino

    model = ExportedModel(folder)
    _, parts = read_validation(DataConfig(root=data), None, model.tasks)
    sizes: dict[str, Any] = {"batch_size": 16, "image_size": model.config.image_size}
    validation = [
        Validation(name, build_eval_loader(part, DataConfig(), **sizes), make_metrics(model, part, tasks))
        for name, tasks, part in parts
    ]
    before = _figures(model, validation)
    images = list(_calibration(data, model))
    if not images:
        raise UserError(f"--data {data}: no image to calibrate with")
    source = openvino_core().read_model(folder / XML)
    description = source.get_rt_info([DESCRIPTION]).astype(str)
    found: list[tuple[float, str, dict[str, float], Path]] = []
    lines = []
    for number, (name, floating) in enumerate(CANDIDATES.items()):
        place = folder.with_name(f"{folder.name}.int8-{number}")
        place.mkdir()
        with _silence():
            made = nncf.quantize(
                source,
                nncf.Dataset(images, lambda batch: {"images": batch}),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(patterns=floating, validate=False),
            )
        made.set_rt_info(description, [DESCRIPTION])
        openvino.save_model(made, place / XML, compress_to_fp16=False)
        mark(place / XML, coordinate_operators(made))
        # What is left in floating point is computed as predict does.
        after = _figures(ExportedModel(place, precision="bf16" if cpu_has_bf16() else "fp32"), validation)
        loss = _loss(before, after)
        told = ", ".join(f"{task} {before[task]:.4f} -> {after[task]:.4f}" for task in before)
        lines.append(f"INT8, {name}: {told} ({loss:+.2%} at most)")
        log(lines[-1])
        found.append((loss, name, after, place))
        if loss <= ALLOWED:
            break
    _, kept, after, place = min(found)
    for file in place.iterdir():
        file.replace(folder / file.name)
    return Quantised(kept, before, after, lines)


@contextmanager
def _silence() -> Iterator[None]:
    """nncf lists every node that it leaves alone, and draws bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(level)


def _figures(model: ExportedModel, validation: list[Validation]) -> dict[str, float]:
    figures = evaluate_all(model, validation)
    return {task: found[head_class(task).primary_metric] for task, found in figures.items()}


def _loss(before: dict[str, float], after: dict[str, float]) -> float:
    return max((before[task] - after[task]) / max(before[task], 1e-9) for task in before)


def _calibration(data: str | None, model: ExportedModel) -> Iterable[np.ndarray]:
    """Training images as the model sees them, one at a time."""
    _, parts = read_validation(DataConfig(root=data), "train", model.tasks)
    for _, _, part in parts:
        part.records = part.records[:: max(1, len(part.records) // IMAGES)][:IMAGES]
        loader = build_eval_loader(part, DataConfig(workers=0), batch_size=1, image_size=model.config.image_size)
        for batch in loader:
            if len(batch):
                yield batch.images.contiguous().numpy()

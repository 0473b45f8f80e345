"""INT8 for OpenVINO: calibrated on training images, and measured on validation images before it replaces the model.

The heads stay in floating point: RT-DETR's decoder adds up small corrections of boxes and loses nearly all of its AP in
INT8. Which other layers have to stay in floating point differs from model to model. So the candidates below are tried
in turn, the one with the most quantised layers first; the first that loses little enough AP is kept, or else the best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mvision.config import DataConfig
from mvision.data import build_eval_loader, read_validation
from mvision.deploy.export import write_openvino
from mvision.deploy.exported import ExportedModel
from mvision.deploy.output import writing
from mvision.deploy.sessions import DESCRIPTION, XML, openvino_core, require
from mvision.deploy.tracing import quiet
from mvision.errors import UserError
from mvision.evaluation import Validation, evaluate_all, make_metrics
from mvision.heads import head_class
from mvision.machine import resolve_precision

MOST_IMAGES = 300  # of each data set, to calibrate with
ALLOWED = 0.01  # relative loss of a task's primary metric
# By the quantised part: patterns for the names of the nodes that stay in floating point, which begin with the path of
# their module.
CANDIDATES: dict[str, list[str]] = {
    "backbone and neck": ["model.heads.*"],
    "backbone and neck without their first layers": ["model.heads.*", "model.backbone/.*", "model.neck.projections.*"],
    "backbone": ["model.heads.*", "model.neck.*", "model.backbone/.*"],
}


@dataclass
class Quantised:
    """One quantised model: the name of its candidate, and the primary metric of each task before and after."""

    candidate: str
    before: dict[str, float]
    after: dict[str, float]

    @property
    def loss(self) -> float:
        """The largest relative loss over all tasks; negative if every task gained."""
        return max((self.before[task] - self.after[task]) / max(self.before[task], 1e-9) for task in self.before)

    @property
    def warning(self) -> str | None:
        """What the user should know: the loss is larger than ``ALLOWED``, or there was nothing to lose."""
        if all(value <= 0 for value in self.before.values()):
            return "the model finds nothing in the validation images before INT8 either: what INT8 loses is not known"
        return f"INT8 lost {self.loss:.1%} of AP, more than {ALLOWED:.0%}" if self.loss > ALLOWED else None


def quantise(folder: Path, data: str | None, log: Callable[[str], None], output: Path) -> Quantised:
    """Replace the OpenVINO model in ``folder`` by one in INT8.

    Args:
        data: data folder: its training images are calibrated with, its validation images are measured on. None: the
            built-in data set.
        log: is called with a line per candidate.
        output: what errors call the folder.

    Raises:
        UserError: nncf is missing, or the data cannot be used.
    """
    require("nncf")
    model = ExportedModel(folder)
    validation = _validation(data, model)
    before = _primary_metrics(model, validation)
    images = list(_calibration_images(data, model))
    if not images:
        raise UserError(f"--data {data}: no image to calibrate with")
    tried: list[tuple[Quantised, Path]] = []
    for number, (candidate, floating) in enumerate(CANDIDATES.items()):
        path = folder.with_name(f"{folder.name}.int8-{number}")
        _write_int8(folder, path, images, floating, output)
        # The layers in floating point are measured in the precision that prediction uses.
        quantised_model = ExportedModel(path, precision=resolve_precision("auto", torch.device("cpu")))
        result = Quantised(candidate, before, _primary_metrics(quantised_model, validation))
        changes = ", ".join(f"{task} {before[task]:.4f} -> {result.after[task]:.4f}" for task in before)
        log(f"INT8, {candidate}: {changes} (largest loss {result.loss:+.2%})")
        tried.append((result, path))
        if result.loss <= ALLOWED:
            break
    best, path = min(tried, key=lambda entry: entry[0].loss)
    with writing(output):
        for file in path.iterdir():
            file.replace(folder / file.name)
    return best


def _validation(data: str | None, model: ExportedModel) -> list[Validation]:
    _, parts = read_validation(DataConfig(root=data), None, model.tasks)
    size = model.config.image_size
    return [
        Validation(
            name,
            build_eval_loader(
                split, DataConfig(), batch_size=16, image_size=size, pixel_range=model.config.pixel_range
            ),
            make_metrics(model, split, tasks),
        )
        for name, tasks, split in parts
    ]


def _primary_metrics(model: ExportedModel, validation: list[Validation]) -> dict[str, float]:
    metrics = evaluate_all(model, validation)
    return {task: values[head_class(task).primary_metric] for task, values in metrics.items()}


def _calibration_images(data: str | None, model: ExportedModel) -> Iterator[np.ndarray]:
    """Training images as the model's input, each (1, 3, H, W) uint8."""
    _, parts = read_validation(DataConfig(root=data), "train", model.tasks)
    for _, _, split in parts:
        count = len(split.records)
        chosen = np.linspace(0, count - 1, min(count, MOST_IMAGES)).round().astype(int)  # from all over the data set
        split.records = [split.records[index] for index in chosen.tolist()]
        config = model.config
        loader = build_eval_loader(
            split, DataConfig(workers=0), batch_size=1, image_size=config.image_size, pixel_range=config.pixel_range
        )
        for batch in loader:
            if len(batch):
                yield batch.images.contiguous().numpy()


def _write_int8(source: Path, target: Path, images: list[np.ndarray], floating: list[str], output: Path) -> None:
    """Quantise the model in the folder ``source``, except for the nodes that match one of the patterns ``floating``."""
    import nncf

    model = openvino_core().read_model(source / XML)
    description = json.loads(model.get_rt_info([DESCRIPTION]).astype(str)) | {"precision": "int8"}
    with quiet():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(images, lambda batch: {"images": batch}),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(patterns=floating, validate=False),
        )
    with writing(output):
        write_openvino(quantised, target, json.dumps(description))

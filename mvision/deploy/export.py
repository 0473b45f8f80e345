"""Export to ONNX and OpenVINO: the whole model from uint8 pixels to raw outputs, compared with PyTorch first.

The graph takes ``images`` (B, 3, H, W) uint8 RGB with a free batch and gives one tensor per output, named
``TASK.OUTPUT`` (``detection.boxes``, ``instance-seg.masks``, ...). Normalisation is inside; post-processing, which is a
matter of thresholds and original sizes, stays outside. The model's config travels in the file.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvision
from mvision.config import parse_model_config
from mvision.deploy.compare import TOLERANCE, difference
from mvision.deploy.coordinates import coordinate_operators, mark
from mvision.deploy.exported import DESCRIPTION, XML, ExportedModel, place_beside, require
from mvision.deploy.quantise import Quantised, quantise
from mvision.errors import UserError
from mvision.model import Model
from mvision.weights import load, resolve_weights

FORMATS = ("onnx", "openvino")
BATCHES = (1, 4)
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which module a node comes from
STEP = 32  # sizes are multiples of the coarsest stride


class _Flat(nn.Module):
    """All outputs in a fixed order."""

    def __init__(self, model: Model, names: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        return tuple(outputs[task][name] for task, name in self.names)


def export(
    weights: str,
    *,
    format: str = "onnx",
    tasks: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    int8: bool = False,
    data: str | None = None,
    output: Path | None = None,
    log: Callable[[str], None] = print,
) -> Quantised | None:
    """Write a model for another runtime; it is there only if what it gives is what PyTorch gives.

    Args:
        weights: any source that ``mvision.load`` takes.
        format: ``onnx``, a file, or ``openvino``, a folder.
        tasks: which of the weights' tasks; none: all.
        image_size: (height, width); None is the model's own.
        dynamic_size: any size of multiples of 32, not one alone.
        int8: quantise the OpenVINO model, and measure what that costs.
        data: to calibrate and measure with; None: the built-in data set.
        output: the file or folder; None: beside the weights, or in the working folder for those of the Hub.
        log: gets what was written, and the largest difference from PyTorch for each shape that was tried.

    Returns:
        What INT8 costs, where it was asked for.

    Raises:
        UserError: no such weights or format, a package is missing, the place cannot be written, or the outputs differ.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    if int8 and format != "openvino":
        raise UserError(f"--int8 with --format {format}: INT8 is made for openvino")
    require("onnxscript", "onnxruntime" if format == "onnx" else "openvino", *(["nncf"] if int8 else []))
    model = load(weights, tasks=list(tasks) or None)
    if image_size is not None:
        described = {**model.config.model_dump(), "image_size": image_size}
        model.config.image_size = parse_model_config(described).image_size
    model.fuse()
    target = output or _beside(weights, f"{format}_int8" if int8 else format)
    quantised = None
    height, width = model.config.image_size
    sizes = [(height, width), (height + STEP, max(width - STEP, STEP))] if dynamic_size else [(height, width)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as folder:
            made = _write(model, Path(folder) / target.name, format, dynamic_size)
            for line in _check(model, made, sizes):
                log(line)
            if int8:
                quantised = quantise(made, data, log)
                log(f"kept: {quantised.kept}")
            _replace(made, target)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror or error}); choose another") from error
    log(f"{format}: {target}")
    return quantised


def _write(model: Model, path: Path, format: str, dynamic_size: bool) -> Path:
    height, width = model.config.image_size
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(images)
    names = [(task, name) for task in model.tasks for name in outputs[task]]
    shape: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if dynamic_size:
        rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
        shape |= {2: STEP * rows, 3: STEP * columns}
    file = path if format == "onnx" else path.with_name("model.onnx")
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Flat(model, names).eval(),
            (images,),
            dynamo=True,
            dynamic_shapes=(shape,),
            input_names=["images"],
            output_names=[f"{task}.{name}" for task, name in names],
            verbose=False,
        )
    assert program is not None
    _name_by_module(program.model.graph)
    description = json.dumps({"version": mvision.__version__, "model": model.config.model_dump(mode="json")})
    program.model.metadata_props[DESCRIPTION] = description
    program.save(str(file))
    if format == "onnx":
        return file
    import openvino

    converted = openvino.convert_model(str(file))
    converted.set_rt_info(description, [DESCRIPTION])
    path.mkdir()
    openvino.save_model(converted, path / XML, compress_to_fp16=False)
    mark(path / XML, coordinate_operators(converted))
    return path


def _name_by_module(graph: Any) -> None:
    """Put the path of its module before every node's name: what is to stay in floating point is told by that."""
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope.startswith("model.")), "")
        node.name = f"{module}/{node.name}"


def _check(model: Model, made: Path, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Outputs of both on the same images; a line per shape."""
    exported = ExportedModel(made)
    lines = []
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        for height, width in sizes:
            # Blobs of all sizes: noise of single pixels looks like nothing that was ever learned.
            coarse = [torch.rand(batch, 3, side, side, generator=generator) for side in (3, 9, 27)]
            mixed = sum(F.interpolate(x, size=(height, width), mode="bicubic") for x in coarse) / len(coarse)
            images = (255 * torch.as_tensor(mixed)).clamp(0, 255).to(torch.uint8)
            with torch.no_grad():
                found, name = difference(model(images), exported(images))
            lines.append(f"batch {batch}, {width} x {height}: largest difference from PyTorch {found:.1e} ({name})")
            if not found <= TOLERANCE:
                raise UserError(f"the export differs: {lines[-1]}, allowed is {TOLERANCE}; nothing was written")
    return lines


def _beside(weights: str, format: str) -> Path:
    path = resolve_weights(weights)
    if path.is_file():
        return place_beside(path, format)
    return place_beside((path if Path(weights).is_dir() else Path()) / "model", format)


def _replace(made: Path, target: Path) -> None:
    """Put what was made in its place, all of it (large ONNX models have a second file)."""
    if made.is_dir():
        if target.exists():
            shutil.rmtree(target)
        made.replace(target)
        return
    for file in sorted(made.parent.glob(f"{made.name}*"), reverse=True):
        file.replace(target.with_name(file.name))


class _quiet:
    """The exporter reports every pass through logging."""

    def __enter__(self) -> None:
        self.level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self.environment = os.environ.get("TORCH_LOGS")

    def __exit__(self, *_: object) -> None:
        logging.disable(self.level)

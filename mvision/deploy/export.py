"""Writing a model for another runtime, and comparing the file with PyTorch.

The graph contains the whole model up to its raw outputs. It takes ``images`` (B, 3, H, W) uint8 RGB with any batch size
(in files for phones: one image) and returns one tensor per output, named ``TASK.OUTPUT`` (``detection.boxes``,
``instance-seg.masks``, ...). Normalisation is part of the graph; post-processing is not, because it depends on the
threshold and on the sizes of the original images. The model's config is stored in the file.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision import __version__
from mvision.compat import ONNX_NAME_SCOPES
from mvision.deploy.compare import TOLERANCE, difference
from mvision.deploy.coordinates import coordinate_operators, mark
from mvision.deploy.exported import ExportedModel
from mvision.deploy.formats import MOBILE
from mvision.deploy.mobile_export import write_mobile
from mvision.deploy.opset import TORCH_OPSET, check_file, set_opset
from mvision.deploy.output import data_name
from mvision.deploy.sessions import DESCRIPTION, XML
from mvision.deploy.tracing import FlatOutputs, output_names, quiet
from mvision.errors import UserError
from mvision.model import Model
from mvision.weights.stored import first_line

BATCHES = (1, 4)  # batch sizes that are compared
LARGE = 1_800_000_000  # bytes of weights from which on they get a file of their own: one ONNX file holds 2 GB
STEP = 32  # image sides are multiples of the coarsest stride


def write_export(
    model: Model, path: Path, format: str, dynamic_size: bool = False, weights: str = "", opset: int | None = None
) -> None:
    """Write a fused model.

    Args:
        path: a new folder for ``openvino``, a file for the others.
        format: one of ``FORMATS``.
        dynamic_size: the graph takes images of any size in multiples of 32; otherwise of ``config.image_size`` only,
            as files for phones always do.
        weights: SHA-256 of the weights file; by it a run's folder knows the export of its weights.
        opset: version of ONNX's operators, see ``set_opset``; None: torch's choice.

    Raises:
        UserError: the model cannot be written with this opset, or in this format.
        OSError: the disk is full, or its folder cannot be written.
    """
    model_described = model.config.model_dump(mode="json")
    described = {"version": __version__, "weights": weights, "precision": "fp32", "model": model_described}
    if format in MOBILE:
        write_mobile(model, path, format, described)
        return
    import onnx_ir

    graph = _onnx_program(model, dynamic_size, opset).model
    if opset is not None:
        set_opset(graph, opset)
    description = json.dumps(described)
    graph.metadata_props[DESCRIPTION] = description
    file = path if format == "onnx" else path.with_name("model.onnx")
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(graph, file, external_data=data_name(file) if size > LARGE else None)
    if opset is not None:
        check_file(file, opset)
    if format == "openvino":
        import openvino

        write_openvino(openvino.convert_model(str(file)), path, description)


def write_openvino(model: Any, folder: Path, description: str) -> None:
    """Write an ``openvino.Model`` into a new folder, with coordinates marked to stay in float32; raises OSError."""
    import openvino

    folder.mkdir()
    model.set_rt_info(description, [DESCRIPTION])
    try:
        openvino.save_model(model, folder / XML, compress_to_fp16=False)
    except RuntimeError as error:  # this is what OpenVINO raises when a disk is full
        raise OSError(f"OpenVINO: {first_line(error)}; the disk may be full") from error
    mark(folder / XML, coordinate_operators(model))


def compare_with_pytorch(model: Model, path: Path, dynamic_size: bool = False) -> list[str]:
    """Run both on the same images, of several batch sizes and, with ``dynamic_size``, of two image sizes.

    Returns:
        One line per shape, with the largest difference of the raw outputs.

    Raises:
        UserError: a difference is larger than ``TOLERANCE``.
    """
    height, width = model.config.image_size
    sizes = [(height, width), (height + STEP, max(width - STEP, STEP))] if dynamic_size else [(height, width)]
    exported = ExportedModel(path)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for batch in BATCHES:
        for height, width in sizes:
            images = _random_blobs(batch, height, width, generator)
            with torch.no_grad():
                largest, output = difference(model(images), exported(images))
            lines.append(f"batch {batch}, {width} x {height}: largest difference from PyTorch {largest:.1e} ({output})")
            if not largest <= TOLERANCE:  # written so that NaN is refused
                raise UserError(f"the export differs: {lines[-1]}, allowed is {TOLERANCE}; nothing was written")
    return lines


def _onnx_program(model: Model, dynamic_size: bool, opset: int | None) -> torch.onnx.ONNXProgram:
    height, width = model.config.image_size
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    shape: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if dynamic_size:
        rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
        shape |= {2: STEP * rows, 3: STEP * columns}
    with quiet(), torch.no_grad():
        names = output_names(model, images)
        program = torch.onnx.export(
            FlatOutputs(model, names).eval(),
            (images,),
            dynamo=True,
            dynamic_shapes=(shape,),
            input_names=["images"],
            output_names=[f"{task}.{name}" for task, name in names],
            verbose=False,
            opset_version=None if opset is None else max(opset, TORCH_OPSET),
        )
    assert program is not None
    _name_by_module(program.model.graph)
    return program


def _name_by_module(graph: Any) -> None:
    """Put the path of its module before every node's name: quantisation leaves nodes out by that path."""
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(ONNX_NAME_SCOPES, "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope.startswith("model.")), "")
        node.name = f"{module}/{node.name}"


def _random_blobs(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(batch, 3, height, width) uint8 with blobs of several sizes; noise in single pixels activates few features."""
    coarse = [torch.rand(batch, 3, side, side, generator=generator) for side in (3, 9, 27)]
    mixed = sum(F.interpolate(x, size=(height, width), mode="bicubic") for x in coarse) / len(coarse)
    return (255 * torch.as_tensor(mixed)).clamp(0, 255).to(torch.uint8)

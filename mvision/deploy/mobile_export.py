"""Writing a model for phones: a ``.pte`` file of ExecuTorch, or a ``.tflite`` file of LiteRT.

The graph takes ``images`` (1, 3, H, W) uint8 RGB and returns the raw outputs, as an ONNX file does. See ``mobile`` for
the description in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvision.deploy.formats import NAMES
from mvision.deploy.mobile import append_description
from mvision.deploy.tracing import SimpleOutputs, output_names, quiet
from mvision.errors import UserError
from mvision.model import Model
from mvision.weights.stored import first_line


def write_mobile(model: Model, path: Path, format: str, described: dict[str, Any]) -> None:
    """Write a fused model.

    Args:
        path: the file.
        format: ``executorch`` or ``litert``.
        described: what the file has to tell about the model.

    Raises:
        UserError: the format lacks an operator of this model.
        OSError: the disk is full, or its folder cannot be written.
    """
    images = torch.zeros(1, 3, *model.config.image_size, dtype=torch.uint8)
    names = output_names(model, images)
    convert = _executorch if format == "executorch" else _litert
    try:
        with quiet(), torch.no_grad():
            content = convert(SimpleOutputs(model, names).eval(), images)
    except Exception as error:  # what converters raise has no common base
        raise UserError(
            f"--format {format}: {NAMES[format]} cannot carry {', '.join(model.tasks)} of this model "
            f"({first_line(error)}); nothing was written, --format onnx carries every task"
        ) from error
    path.write_bytes(content)
    append_description(path, {**described, "outputs": [f"{task}.{name}" for task, name in names]})


def _executorch(model: SimpleOutputs, images: Tensor) -> bytes:
    """With XNNPACK, ExecuTorch's fast operators for CPUs, wherever it has them, and portable ones for the rest."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, (images,), strict=False)
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def _litert(model: SimpleOutputs, images: Tensor) -> bytes:
    import litert_torch

    return litert_torch.convert(model, (images,)).model_content()

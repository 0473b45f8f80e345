"""A PyTorch model prepared for fast prediction."""

from __future__ import annotations

from typing import get_args

import torch

from mvision.compat import has_packed_convolutions
from mvision.deploy.packed import pack
from mvision.machine import InferencePrecision, torch_dtype
from mvision.model import Model

PRECISIONS: tuple[InferencePrecision, ...] = get_args(InferencePrecision)


def prepare(model: Model, precision: InferencePrecision = "fp32", packed: bool = True) -> Model:
    """Fuse the model, convert its weights to ``precision`` and order them for convolutions, in place.

    With bf16 the weights themselves are converted, once; autocast would convert them in every call. Coordinates stay in
    float32. The model cannot be trained afterwards.

    Args:
        packed: on a CPU, also replace convolutions, see ``mvision.deploy.packed``. Not before ``torch.compile``, which
            does the same itself.
    """
    model.fuse().eval().requires_grad_(False)
    model.to(torch_dtype(precision))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pack(model) if packed and model.device.type == "cpu" and has_packed_convolutions() else model

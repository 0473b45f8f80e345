"""A PyTorch model made ready to predict, and to do nothing else."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mvision.deploy.packed import can_pack, pack
from mvision.model import Model

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def prepare(model: Model, precision: Precision = "fp32", packed: bool = True) -> Model:
    """Fuse, lay out and (``bf16``) convert the weights, in place; coordinates stay in float32 whatever the weights.

    Weights in bf16 are not autocast's: nothing is converted in every call.

    Args:
        packed: on a CPU, lay out weights for good; not before ``torch.compile``, which does that itself.
    """
    model.fuse().eval().requires_grad_(False)
    if precision == "bf16":
        model.to(torch.bfloat16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pack(model) if packed and model.device.type == "cpu" and can_pack() else model

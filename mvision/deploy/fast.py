"""A PyTorch model made ready to predict, and to do nothing else."""

from __future__ import annotations

from typing import Literal

import torch

from mvision.model import Model


def prepare(model: Model, precision: Literal["fp32", "bf16"] = "fp32") -> Model:
    """Fuse, lay out and (``bf16``) convert the weights, in place; coordinates stay in float32 whatever the weights.

    Weights in bf16 are not autocast's: nothing is converted in every call.
    """
    model.fuse().eval().requires_grad_(False)
    if precision == "bf16":
        model.to(torch.bfloat16)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

"""What a convolution for prediction leaves to be done on a GPU: its bias and the activation, in one pass over the map.

PyTorch adds the bias in one kernel and applies the activation in a second, and each reads and writes the whole map.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.machine import has_triton, with_triton

Activation = Literal["none", "relu", "silu"]


def add_bias_activation_(x: Tensor, bias: Tensor, activation: Activation = "none", floor: float = 0.0) -> Tensor:
    """``activation(x + bias)``, written over ``x`` and returned; without gradients.

    On a GPU it is one kernel where Triton works and ``x`` is in channels-last order. That one computes in float32 and
    rounds once.

    Args:
        x: (B, C, H, W) of any floating-point type.
        bias: (C,).
        activation: ``none``, ``relu`` or ``silu``.
        floor: what ``relu`` gives for numbers below it.

    Raises:
        ValueError: the activation is another one.
    """
    if activation not in ("none", "relu", "silu"):
        raise ValueError(f"activation {activation!r} is not one of none, relu, silu")
    on_gpu = x.device.type == "cuda" and has_triton() and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if on_gpu and x.is_contiguous(memory_format=torch.channels_last):
        return with_triton(
            partial(_by_kernel, x, bias, activation, floor), partial(_by_operators, x, bias, activation, floor)
        )
    return _by_operators(x, bias, activation, floor)


def _by_kernel(x: Tensor, bias: Tensor, activation: Activation, floor: float) -> Tensor:
    # The import takes a second, which machines without a GPU are spared.
    from mvision.fast.bias_activation_triton import launch

    with torch.cuda.device_of(x):
        launch(x, bias.contiguous(), activation, floor)
    return x


def _by_operators(x: Tensor, bias: Tensor, activation: Activation, floor: float) -> Tensor:
    x.add_(bias[:, None, None])
    if activation == "relu":
        x.clamp_(min=floor)
    elif activation == "silu":
        F.silu(x, inplace=True)
    return x

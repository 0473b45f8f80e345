"""Layers for prediction on x86 CPUs: weights in oneDNN's own order, and the activation inside the layer.

An ordinary convolution of PyTorch reorders its weights in every call, and the activation after it reads and writes the
whole map once more. ``torch.compile`` uses the same two operators. Linear layers in fp32 are products of MKL there,
which takes twice as long as oneDNN on processors that are not Intel's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from mvision.backbone.affine import Floor
from mvision.backbone.folding import observe
from mvision.compat import pack_convolution_weight, pack_linear_weight, packed_convolution, packed_linear
from mvision.inference.predict import Predictor
from mvision.neck.layers import MLP

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}
MLP_ACTIVATIONS = ACTIVATIONS | {nn.GELU: "gelu"}
FEWEST_WEIGHTS = 2048
"""Of a linear layer in fp32 that is packed: the call of the packed operator takes longer, which smaller ones feel."""

M = TypeVar("M", bound=nn.Module)


class PackedConv2d(nn.Module):
    """A convolution for prediction only, with the activation that follows it.

    Args:
        shape: (B, C, H, W) of the inputs that the weights are ordered for. Inputs of other shapes give the same
            results, but can be slower than with an ordinary convolution.
        activation, limits: see ``mvision.compat.packed_convolution``.
    """

    def __init__(
        self, conv: nn.Conv2d, shape: list[int], activation: str = "none", limits: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.settings = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.activation, self.limits = activation, tuple(limits)
        self.weight = pack_convolution_weight(conv.weight.detach(), self.settings, shape)
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return packed_convolution(x, self.weight, self.bias, self.settings, self.activation, self.limits)


class PackedLinear(nn.Module):
    """A linear layer for prediction only, (..., in) -> (..., out), with the activation that follows it.

    Args:
        rows: of the inputs that the weights are ordered for; others give the same results.
        activation: see ``mvision.compat.packed_linear``.
    """

    def __init__(self, linear: nn.Linear, rows: int, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.weight = pack_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias, self.activation)


def pack(model: M) -> M:
    """Replace the convolutions and linear layers of a fused model on a CPU, in place.

    Outputs stay the same except for rounding.
    """
    size, dtype = (1, 3, *cast(Predictor, model).config.image_size), next(model.parameters()).dtype
    seen = observe(model, lambda watched: watched(torch.empty(size, dtype=dtype, device="meta")))
    for name, shape in seen.shapes.items():
        conv = model.get_submodule(name)
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        activation, limits = "none", list[float]()
        follower = model.get_submodule(seen.followers[name]) if name in seen.followers else None
        if isinstance(follower, Floor):
            activation, limits = "hardtanh", [follower.floor, torch.finfo(torch.float32).max]
        elif follower is not None and type(follower) in ACTIVATIONS:
            activation = ACTIVATIONS[type(follower)]
        if activation != "none":
            model.set_submodule(seen.followers[name], nn.Identity())
        model.set_submodule(name, PackedConv2d(conv, shape, activation, limits))
    _pack_linears(model, seen.rows)
    return model


def _pack_linears(model: nn.Module, rows: dict[str, int]) -> None:
    """Replace the linear layers with these names, each for inputs of so many rows."""
    activations: dict[str, str] = {}  # by the name of the layer that is followed by it
    for name, mlp in model.named_modules():
        if not isinstance(mlp, MLP) or type(mlp.act) not in MLP_ACTIVATIONS:
            continue
        hidden = [f"{name}.layers.{index}" for index in range(len(mlp.layers) - 1)]
        if all(layer in rows for layer in hidden):
            activations |= dict.fromkeys(hidden, MLP_ACTIVATIONS[type(mlp.act)])
            mlp.act = nn.Identity()
    for name, count in rows.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        large = linear.weight.dtype != torch.float32 or linear.weight.numel() >= FEWEST_WEIGHTS
        if large or name in activations:
            model.set_submodule(name, PackedLinear(linear, count, activations.get(name, "none")))

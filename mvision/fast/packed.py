"""Convolutions for prediction on x86 CPUs: weights in oneDNN's own order, and the activation inside the convolution.

An ordinary convolution of PyTorch reorders its weights in every call, and the activation after it reads and writes the
whole map once more. ``torch.compile`` uses the same two operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from mvision.backbone.affine import Floor
from mvision.backbone.folding import observe
from mvision.compat import pack_convolution_weight, packed_convolution
from mvision.inference.predict import Predictor

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}


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


def pack(model: M) -> M:
    """Replace the convolutions of a fused model on a CPU, in place; outputs stay the same except for rounding."""
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
    return model

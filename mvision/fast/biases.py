"""Convolutions for prediction on a GPU: bias and activation in one pass over the map.

cuDNN's convolution is followed by a kernel for the bias and one for the activation, each of which reads and writes the
whole map: a quarter of the time of RT-DETR r18 at 32 images.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from mvision.backbone.affine import Floor
from mvision.backbone.folding import observe
from mvision.fast.bias_activation import Activation, add_bias_activation_
from mvision.inference.predict import Predictor

ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", Floor: "relu", nn.SiLU: "silu"}

M = TypeVar("M", bound=nn.Module)


class BiasActivation(nn.Module):
    """``activation(x + bias)`` for prediction only; it is written over x (B, C, H, W).

    Args:
        after: the module whose work it does besides adding the bias: a ReLU, a SiLU, a ``Floor``, or None.
    """

    def __init__(self, bias: Tensor, after: nn.Module | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.activation: Activation = "none" if after is None else ACTIVATIONS[type(after)]
        self.floor = after.floor if isinstance(after, Floor) else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return add_bias_activation_(x, self.bias, self.activation, self.floor)


def join_biases(model: M) -> M:
    """Take the biases out of the convolutions of a fused model, in place; outputs stay the same except for rounding.

    A bias goes into one operator with the activation that follows. In a residual block, where the sum with the shortcut
    comes between the two, it is added after the sum, together with that of the shortcut's convolution.
    """
    size, dtype = (1, 3, *cast(Predictor, model).config.image_size), next(model.parameters()).dtype
    seen = observe(model, lambda watched: watched(torch.empty(size, dtype=dtype, device="meta")))
    for name in seen.shapes:
        conv = model.get_submodule(name)
        if type(conv) is not nn.Conv2d or conv.bias is None:
            continue
        bias, conv.bias = conv.bias, None
        if name in seen.after_sums and _takes_bias(model, seen.after_sums[name], bias):
            continue
        after = model.get_submodule(seen.followers[name]) if name in seen.followers else None
        if type(after) in ACTIVATIONS:
            model.set_submodule(seen.followers[name], nn.Identity())
        else:
            after = None
        model.set_submodule(name, nn.Sequential(conv, BiasActivation(bias, after)))
    return model


def _takes_bias(model: nn.Module, name: str, bias: Tensor) -> bool:
    """Give an activation a bias to add first, or one more; False if it is another kind of module."""
    module = model.get_submodule(name)
    if isinstance(module, BiasActivation):
        module.bias.add_(bias)
        return True
    if type(module) not in ACTIVATIONS:
        return False
    model.set_submodule(name, BiasActivation(bias, module))
    return True

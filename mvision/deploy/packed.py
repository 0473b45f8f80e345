"""Convolutions as oneDNN wants them: weights laid out once, and the activation computed with the sum.

Without it PyTorch lays the weights out again in every call, and goes over every map once more for the activation.
These are the operators that ``torch.compile`` calls on x86.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

from mvision.backbone.folding import watch
from mvision.model import Model

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}


class PackedConv2d(nn.Module):
    """A convolution for prediction alone, with the activation that follows it.

    Args:
        shape: (B, C, H, W) of the inputs that it is made for; it takes others as well. Weights that were laid out for
            another size can be slower than those that were not laid out at all.
    """

    def __init__(self, conv: nn.Conv2d, shape: list[int], activation: str = "none") -> None:
        super().__init__()
        self.settings = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.activation = activation
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.settings, shape)
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.settings, self.activation, [], ""
        )


def can_pack() -> bool:
    """Whether this build of PyTorch has the operators."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def pack(model: Model) -> Model:
    """Replace the convolutions of a fused model on a CPU, in place; outputs stay the same to rounding."""
    size, dtype = (1, 3, *model.config.image_size), next(model.parameters()).dtype
    seen = watch(model, lambda watched: watched(torch.empty(size, dtype=dtype, device="meta")))
    for name, shape in seen.shapes.items():
        conv = model.get_submodule(name)
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        activation = "none"
        follower = seen.followers.get(name)
        if follower is not None and type(model.get_submodule(follower)) in ACTIVATIONS:
            activation = ACTIVATIONS[type(model.get_submodule(follower))]
            model.set_submodule(follower, nn.Identity())
        model.set_submodule(name, PackedConv2d(conv, shape, activation))
    return model

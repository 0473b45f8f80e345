"""HGNetV2's scaled activations folded into the convolutions before them, for prediction.

The small networks of the family multiply every activation by one learned number and add another ("learnable affine
block", Cui et al., "PP-HGNetV2", PaddleClas): two more passes over every map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Floor(nn.Module):
    """``max(x, floor)``: a ReLU that ends at another number than 0."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(self.floor)

    def extra_repr(self) -> str:
        return f"{self.floor:.4g}"


@torch.no_grad()
def fold_affine(net: nn.Module) -> nn.Module:
    """Fold them, in place, in a network whose norms have been folded; outputs in eval mode stay the same.

    For a scale s above 0, ``s * relu(y) + b`` is ``max(s * y + b, b)``, and the convolution computes ``s * y + b``. A
    block with another scale stays as it is.
    """
    from timm.models.hgnet import ConvBNAct, LearnableAffineBlock

    for block in net.modules():
        if not isinstance(block, ConvBNAct) or not isinstance(block.lab, LearnableAffineBlock):
            continue
        conv, scale, bias = block.conv, float(block.lab.scale), float(block.lab.bias)
        folded = isinstance(block.bn, nn.Identity) and type(conv) is nn.Conv2d and conv.bias is not None
        if not folded or type(block.act) is not nn.ReLU or scale <= 0:
            continue
        conv.weight *= scale
        conv.bias.mul_(scale).add_(bias)
        block.act, block.lab = Floor(bias), nn.Identity()  # type: ignore[assignment]
    return net

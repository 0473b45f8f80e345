"""A pyramid from a plain ViT, whose maps have one stride, without weights of its own; and fine details beside it.

EdgeCrafter and DEIMv2 (Huang et al., "Real-Time Object Detection Meets DINOv3", 2025) make their pyramids by bilinear
resizing. DEIMv2 adds the maps of a few convolutions, because patches of 16 x 16 pixels hide what is small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.neck.aifi import is_static
from mvision.neck.layers import ConvNorm

WIDEST = 4  # widths of the branch of details, relative to its first


def pyramid_scales(patch: int, strides: Sequence[int]) -> list[float]:
    """How much larger than the ViT's map the map of every stride is: powers of two, 2 for half the stride.

    Of patches that are no power of two the nearest ones are taken: 14 gives strides 7, 14 and 28 for 8, 16 and 32.

    Raises:
        UserError: two strides would be the same, or one no whole number.
    """
    steps = [round(math.log2(patch / stride)) for stride in strides]
    halved = max(steps, default=0)
    if not steps or steps != sorted(set(steps), reverse=True) or patch % 2 ** max(0, halved):
        raise UserError(
            f"model.backbone.strides: {list(strides)} cannot be made from the patches of {patch} pixels that the "
            f"backbone has: give rising strides near {patch} times or divided by 2, 4, ..., such as "
            f"{[patch // 2 if patch % 2 == 0 else patch, patch, 2 * patch]}"
        )
    return [2.0**step for step in steps]


class MeanPyramid(nn.Module):
    """Maps (B, C, h, w) of the last blocks of a ViT -> their mean, bilinearly resized to every scale, finest first.

    Args:
        scales: sizes relative to h and w, see ``pyramid_scales``; sizes are rounded down.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        super().__init__()
        self.scales = list(scales)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        mean = torch.stack(maps).mean(0)
        height, width = mean.shape[-2:]
        return [mean if scale == 1 else resized(mean, *_scaled(height, width, scale)) for scale in self.scales]


class Detail(nn.Module):
    """Images (B, 3, H, W) -> maps (B, C, ceil(H / stride), ceil(W / stride)) by 3x3 convolutions of stride 2.

    Their widths are ``width`` up to stride 4, then twice and four times as much.

    Args:
        width: channels of the first convolution.
        strides: of the wanted maps, rising powers of two.

    Attributes:
        channels: of the wanted maps.
    """

    def __init__(self, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        self._wanted = [int(math.log2(stride)) - 1 for stride in strides]
        widths = [3, *(width * min(WIDEST, 2 ** max(0, level - 1)) for level in range(self._wanted[-1] + 1))]
        self.convs = nn.ModuleList(ConvNorm(a, b, 3, stride=2, act="gelu") for a, b in itertools.pairwise(widths))
        self.channels = [widths[level + 1] for level in self._wanted]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for level, conv in enumerate(self.convs):
            images = conv(images)
            if level in self._wanted:
                maps.append(images)
        return maps


def detail_strides(strides: Sequence[int]) -> list[int]:
    """The strides of the branch of details for a pyramid; UserError where they are no powers of two from 2."""
    if any(stride < 2 or stride & (stride - 1) for stride in strides):
        raise UserError(
            f"model.backbone.detail: its maps have strides 2, 4, 8, ..., and model.backbone.strides are "
            f"{list(strides)}: choose from those, or set detail to 0"
        )
    return list(strides)


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """x (B, C, h, w) bilinearly resized, or as it is where it has the size already."""
    if is_static(height * width) and x.shape[-2:] == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """In whole numbers, because a side can be a symbol when a graph is exported."""
    if scale >= 1:
        return height * int(scale), width * int(scale)
    return height // int(1 / scale), width // int(1 / scale)

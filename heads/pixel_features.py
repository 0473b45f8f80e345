"""Pixel features: one fine map made from all maps of the neck, for masks and for keypoint heatmaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mvision.neck.layers import ConvNorm, RepBlock

STRIDE = 4  # of the pixel features, relative to the image


class PixelFeatures(nn.Module):
    """The neck's maps, added at the size of the finest, then enlarged and added to the backbone's lateral if given.

    The result has stride 4, or that of the neck's finest map if that is smaller.

    Args:
        channels, strides: of the neck's maps, finest first.
        lateral: channels of the backbone's map of stride 4, or None.
        width: channels of the layers inside.
        out_channels: of the result.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], lateral: int | None, width: int, out_channels: int
    ) -> None:
        super().__init__()
        self.scale = max(1, strides[0] // STRIDE)
        self.projections = nn.ModuleList(ConvNorm(count, width, act=None) for count in channels)
        self.fuse_scales = RepBlock(width, width)
        self.lateral = None if lateral is None else ConvNorm(lateral, width, act=None)
        self.refine = RepBlock(width, width)
        self.out = nn.Conv2d(width, out_channels, 1)

    def forward(self, maps: list[Tensor], lateral: Tensor | None) -> Tensor:
        """Maps (B, C_i, h_i, w_i), finest first, to (B, out_channels, h, w).

        Args:
            lateral: the backbone's map, where the module was built with its channels.
        """
        x = self.projections[0](maps[0])
        for projection, other in zip(self.projections[1:], maps[1:]):
            x = x + resize(projection(other), (x.shape[-2], x.shape[-1]))
        x = self.fuse_scales(x)
        if self.lateral is not None and lateral is not None:
            x = self.lateral(lateral) + resize(x, (lateral.shape[-2], lateral.shape[-1]))
        elif self.scale > 1:
            x = resize(x, (x.shape[-2] * self.scale, x.shape[-1] * self.scale))
        return self.out(self.refine(x))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, ..) at another (height, width), bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

"""One fine map from all of the neck's, for masks and for the exact places of keypoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mvision.neck.layers import ConvNorm, RepBlock


class PixelFeatures(nn.Module):
    """The neck's maps, and the backbone's lateral where there is one, as one map for what is done pixel by pixel.

    Args:
        channels, strides: of the neck's maps, finest first.
        lateral: channels of the backbone's map of stride ``stride``, or None.
        stride: of the result; the map is enlarged to it.
        width: of the layers inside.
        out_channels: of the result.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        lateral: int | None,
        stride: int,
        width: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.scale = max(1, strides[0] // stride)
        self.projections = nn.ModuleList(ConvNorm(count, width, act=None) for count in channels)
        self.fuse_scales = RepBlock(width, width)
        self.lateral = None if lateral is None else ConvNorm(lateral, width, act=None)
        self.refine = RepBlock(width, width)
        self.out = nn.Conv2d(width, out_channels, 1)

    def forward(self, maps: list[Tensor], lateral: Tensor | None) -> Tensor:
        """(B, out_channels, h, w)."""
        x = self.projections[0](maps[0])
        for projection, other in zip(self.projections[1:], maps[1:]):
            x = x + _enlarge(projection(other), (x.shape[-2], x.shape[-1]))
        x = self.fuse_scales(x)
        if self.lateral is not None and lateral is not None:
            x = self.lateral(lateral) + _enlarge(x, (lateral.shape[-2], lateral.shape[-1]))
        elif self.scale > 1:
            x = _enlarge(x, (x.shape[-2] * self.scale, x.shape[-1] * self.scale))
        return self.out(self.refine(x))


def _enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

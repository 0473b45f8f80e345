"""Mask-RT-DETR's pixel features, and boxes around masks, from which its decoder starts.

Source: PaddleDetection's Mask-RT-DETR (``MaskFeatFPN`` is the semantic branch of Panoptic FPN, Kirillov et al., CVPR
2019, section 3). A mask there is the product of its embedding and the pixel features, without anything added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvision.heads.pixel_features import resize
from mvision.heads.query.anchors import box_dtype
from mvision.neck.layers import ConvNorm


class PrototypeFeatures(nn.Module):
    """The neck's maps, each brought to the finest one's size in steps of two, added, and enlarged to stride 4.

    Args:
        channels, strides: of the neck's maps, finest first.
        lateral: channels of the backbone's map of stride 4, or None.
        width: channels of the layers on the neck's maps.
        fine: channels of the layers after their sum.
        out_channels: of the result.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        lateral: int | None,
        width: int,
        fine: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for count, stride in zip(channels, strides):
            steps = max(1, (stride // strides[0]).bit_length() - 1)
            self.scales.append(nn.Sequential(*(ConvNorm(width if i else count, width, 3) for i in range(steps))))
        self.merge = ConvNorm(width, fine, 3)
        self.lateral = None if lateral is None else ConvNorm(lateral, fine, 3)
        self.refine = ConvNorm(fine, fine, 3)
        self.out = nn.Conv2d(fine, out_channels, 1)

    def forward(self, maps: list[Tensor], lateral: Tensor | None) -> Tensor:
        """Maps (B, C_i, h_i, w_i), finest first, to (B, out_channels, 2 h_0, 2 w_0).

        Args:
            lateral: the backbone's map, where the module was built with its channels.
        """
        total = self.scales[0](maps[0])
        size = (total.shape[-2], total.shape[-1])
        for scale, x in zip(self.scales[1:], maps[1:]):
            for conv in scale.children():
                x = conv(x)
                x = resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))
            total = total + (x if x.shape[-2:] == size else resize(x, size))
        x = resize(self.merge(total), (2 * size[0], 2 * size[1]))
        if self.lateral is not None and lateral is not None:
            x = x + self.lateral(lateral)
        return self.out(self.refine(x))


def boxes_of_masks(masks: Tensor) -> Tensor:
    """(B, Q, 4) cxcywh in 0..1, around the positive logits of masks (B, Q, h, w); zeros where none is."""
    sides = []
    for over in (-2, -1):
        inside = masks.amax(over) > 0  # columns, then rows
        length = inside.shape[-1]
        index = torch.arange(length, device=masks.device, dtype=box_dtype(masks))
        end = torch.where(inside, index + 1, 0).amax(-1)
        start = torch.where(inside, index, length).amin(-1).minimum(end)
        sides.append(((start + end) / (2 * length), (end - start) / length))
    (x, width), (y, height) = sides
    return torch.stack((x, y, width, height), -1)

"""Encoders for the benchmark to compare with: plain or deformable attention over the tokens of all scales.

Both take and return the same lists of maps as ``HybridEncoder``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.heads.query.anchors import grid_centres
from mvision.heads.query.deformable import DeformableAttention
from mvision.neck.aifi import SincosPosition


class _AllScales(nn.Module):
    """A projection for each scale, then layers on the tokens of all scales as one sequence."""

    def __init__(self, in_channels: Sequence[int], embed_dim: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(count, embed_dim, 1) for count in in_channels)
        self.levels = nn.Parameter(torch.zeros(len(in_channels), embed_dim))
        self.position = SincosPosition(embed_dim)
        self.layers = nn.ModuleList(layers)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(B, embed_dim, H / s, W / s) for each of the maps."""
        maps = [projection(x) for projection, x in zip(self.projections, maps)]
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        position = torch.cat([self.position(x).flatten(1, 2) + level for x, level in zip(maps, self.levels)], 1)
        for layer in self.layers:
            tokens = layer(tokens, position, shapes)
        rows = tokens.split([height * width for height, width in shapes], dim=1)
        return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(rows, shapes)]


class PlainEncoder(_AllScales):
    """Transformer layers as in DETR (Carion et al., ECCV 2020, appendix A.4) over the tokens of all scales.

    Args:
        fused: use PyTorch's attention, which never stores the whole matrix of weights; otherwise compute that matrix.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        embed_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 6,
        fused: bool = True,
    ) -> None:
        super().__init__(in_channels, embed_dim, [_PlainLayer(embed_dim, num_heads, fused) for _ in range(num_layers)])


class DeformableEncoder(_AllScales):
    """Layers of multi-scale deformable attention (Zhu et al., ICLR 2021): every token samples four points a scale."""

    def __init__(
        self, in_channels: Sequence[int], embed_dim: int = 256, num_heads: int = 8, num_layers: int = 6
    ) -> None:
        scales = len(in_channels)
        super().__init__(
            in_channels, embed_dim, [_DeformableLayer(embed_dim, num_heads, scales) for _ in range(num_layers)]
        )


class _Layer(nn.Module):
    """Post-norm; the feed-forward network is four times as wide as the tokens."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.ReLU(), nn.Linear(4 * embed_dim, embed_dim)
        )
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = self.norm1(tokens + attended)
        return self.norm2(tokens + self.feed_forward(tokens))


class _PlainLayer(_Layer):
    def __init__(self, embed_dim: int, num_heads: int, fused: bool) -> None:
        super().__init__(embed_dim)
        self.num_heads, self.fused = num_heads, fused
        self.query_key = nn.Linear(embed_dim, 2 * embed_dim)
        self.value, self.out = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, position: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        parts = (*self.query_key(tokens + position).chunk(2, -1), self.value(tokens))
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            scale = query.shape[-1] ** -0.5
            mixed = (query * scale @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.finish(tokens, self.out(mixed.transpose(1, 2).flatten(2)))


class _DeformableLayer(_Layer):
    def __init__(self, embed_dim: int, num_heads: int, num_levels: int) -> None:
        super().__init__(embed_dim)
        self.attention = DeformableAttention(embed_dim, num_heads, num_levels, num_points=4)

    def forward(self, tokens: Tensor, position: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        centres = grid_centres(shapes, tokens.device, tokens.dtype)
        # References are boxes of one grid cell of the token's own scale, so that offsets are in such cells.
        sides = torch.cat([centres.new_tensor([1 / w, 1 / h]).expand(h * w, 2) for h, w in shapes])
        references = torch.cat((centres, sides), -1).expand(len(tokens), -1, -1)
        return self.finish(tokens, self.attention(tokens + position, references, tokens, shapes))

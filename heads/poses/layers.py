"""A layer of the pose decoder. T = 1 + K tokens of every query: one for the instance, then one for each point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvision.heads.poses.settings import PoseConfig
from mvision.heads.query.deformable import DeformableAttention
from mvision.heads.query.layers import LARGEST, Gate
from mvision.heads.query.sampling import Shapes
from mvision.neck.layers import MLP, SelfAttention


class PoseLayer(nn.Module):
    """Attention within each instance, across instances and to the memory, then a feed-forward network.

    The positions of the points are added to the tokens themselves, and not to queries and keys alone: so do the
    original implementations, and the published weights were trained with it.
    """

    def __init__(self, config: PoseConfig, num_levels: int) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.within = SelfAttention(dim, heads, config.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.across = SelfAttention(dim, heads, config.dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, num_levels, config.num_points, projections=False)
        self.gate = Gate(dim)
        self.ffn = MLP(dim, config.ffn_dim, dim, 2, act=config.act, dropout=config.dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Tensor, position: Tensor, references: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor | None
    ) -> Tensor:
        """Refine tokens (B, N, T, D), to which the position was added already.

        Args:
            position: (B, N, T, D), embeddings of the points, zeros for the instance.
            references: (B, N, T, 2) x, y in 0..1: the centre of the points, and the points.
            memory, shapes: see ``DeformableAttention.forward``.
            mask: (N, N), see ``SelfAttention.forward``; between instances alone.
        """
        batch, queries, own, _ = tokens.shape
        tokens = tokens.flatten(0, 1)
        tokens = self.norm1(tokens + self.dropout(self.within(tokens))).unflatten(0, (batch, queries))
        tokens = tokens.transpose(1, 2).flatten(0, 1)
        tokens = self.norm2(tokens + self.dropout(self.across(tokens, mask=mask))).unflatten(0, (batch, own))
        tokens = (tokens.transpose(1, 2) + position).flatten(1, 2)
        attended = self.cross_attention(tokens, references.flatten(1, 2), memory, shapes)
        tokens = self.gate(tokens, self.dropout(attended))
        tokens = self.norm3((tokens + self.dropout(self.ffn(tokens))).clamp(-LARGEST, LARGEST))
        return tokens.unflatten(1, (queries, own))


def embed_points(points: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines of x and y in 0..1: (..., 2) to (..., 4 F), those of y first, of F frequencies."""
    angles = points.flip(-1)[..., None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-3)

"""A layer of the query decoder: attention between queries, attention to the memory, feed-forward network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvision.heads.query.deformable import DeformableAttention, Shapes
from mvision.heads.query.settings import DecoderConfig
from mvision.neck.layers import MLP, SelfAttention

LARGEST = 65504.0
"""The largest number of fp16: with a gate, the last norm of a layer works on values up to it."""


class DecoderLayer(nn.Module):
    """Self-attention between queries, deformable attention to the memory, feed-forward network; a norm after each.

    With ``config.gate`` a ``Gate`` takes the place of the sum and the norm after the attention to the memory.
    """

    def __init__(self, config: DecoderConfig, num_levels: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.self_attention = SelfAttention(dim, config.num_heads, config.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(
            dim,
            config.num_heads,
            num_levels,
            config.num_points,
            config.sampling,
            config.offset_scale,
            config.attention_projections,
        )
        self.gate = Gate(dim) if config.gate else None
        self.norm2 = nn.LayerNorm(dim) if not config.gate else None
        self.ffn = MLP(dim, config.ffn_dim, dim, 2, act=config.act, dropout=config.dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, queries: Tensor, position: Tensor, references: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor | None
    ) -> Tensor:
        """Refine queries (B, Q, D).

        Args:
            position: (B, Q, D), embeddings of the reference boxes.
            references: (B, Q, 4) cxcywh in 0..1.
            memory, shapes: see ``DeformableAttention.forward``.
            mask: (Q, Q) bool, True where the query of a row may attend to that of a column; None: everywhere.
        """
        queries = self.norm1(queries + self.dropout(self.self_attention(queries, position, mask)))
        attended = self.dropout(self.cross_attention(queries + position, references, memory, shapes))
        if self.gate is not None:
            queries = self.gate(queries, attended)
            return self.norm3((queries + self.dropout(self.ffn(queries))).clamp(-LARGEST, LARGEST))
        assert self.norm2 is not None
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.dropout(self.ffn(queries)))

    def start_as_identity(self) -> None:
        """Zero the last linear layer of every branch: apart from its norms the layer returns its queries unchanged.

        Without a projection at the end of the attention to the memory, its gate lets little of it pass; without either
        of them the layer cannot start as the identity.
        """
        for branch in (self.self_attention.out_proj, self.cross_attention.output_proj, self.ffn.layers[-1]):
            if isinstance(branch, nn.Linear):
                zero(branch)
            elif self.gate is not None:
                self.gate.mostly_first()


class Gate(nn.Module):
    """LN(g1 * x + g2 * y), where x and y decide on the weights g1 and g2 in 0..1 of every channel.

    Source: Peng et al., "D-FINE", ICLR 2025 (the "target gating layer").
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        zero(self.linear)  # both weights are 0.5

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors (..., dim) to one."""
        gate_x, gate_y = self.linear(torch.cat((x, y), -1)).sigmoid().chunk(2, -1)
        return self.norm(torch.addcmul(gate_x * x, gate_y, y))

    def mostly_first(self) -> None:
        """Let y have a tenth of x's weight: as little as is left to learn from it in a short time."""
        with torch.no_grad():
            self.linear.bias.chunk(2)[1].fill_(math.log(0.05 / 0.95))


def zero(linear: nn.Module) -> None:
    """Set weight and bias of a linear layer to zero."""
    assert isinstance(linear, nn.Linear)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)

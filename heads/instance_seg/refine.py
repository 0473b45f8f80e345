"""Masks from the neck's finest map, enlarged to stride 4 and refined by a block for every decoder layer.

This is the form of ECSeg (Liu et al., "EdgeCrafter") and RF-DETR's segmentation: it needs no map of the backbone with
stride 4, so plain ViTs have all of it, and no prior.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.heads.pixel_features import STRIDE, resize
from mvision.neck.layers import MLP, ConvNorm


class RefinedMasks(nn.Module):
    """Pixel features of every decoder layer, and the embeddings of queries that go with them.

    The features of layer i have gone through the blocks 0 to i. The mask of a query is the product of two projections,
    one of its embedding and one of the features (``spatial``), plus ``bias``. The one of the features is applied to the
    embedding instead, transposed: the product is the same, and queries are a few hundred, pixels many thousands.

    Args:
        channels, stride: of the neck's finest map.
        dim: width of the queries.
        blocks: number of blocks.
        lateral: channels of a map of the backbone with stride 4 to add to the enlarged map, or None. Its layer starts
            at zero, so that weights that were trained without it give the same masks at first.

    Raises:
        ValueError: the map has not the width of the queries.
    """

    def __init__(self, channels: int, stride: int, dim: int, blocks: int, lateral: int | None) -> None:
        super().__init__()
        if channels != dim:
            raise ValueError(
                f"mask_form: refine needs maps of the neck as wide as the queries: set embed_dim={channels} or "
                f"model.neck.embed_dim={dim}"
            )
        self.scale = max(1, stride // STRIDE)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.spatial = nn.Conv2d(dim, dim, 1)
        self.query_mlp = QueryMLP(dim, 4 * dim, dim, 2, act="gelu")
        self.query = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(1))
        self.lateral = None if lateral is None else ConvNorm(lateral, dim, act=None)
        if self.lateral is not None and isinstance(self.lateral.norm, nn.BatchNorm2d):
            nn.init.zeros_(self.lateral.norm.weight)

    def forward(self, finest: Tensor, lateral: Tensor | None, blocks: int, every: bool) -> list[Tensor]:
        """The features (B, dim, h, w) after each of the first ``blocks`` blocks, or, unless ``every``, after the last.

        Args:
            finest: (B, dim, h, w), the neck's finest map.
            lateral: the backbone's map, where the module was built with its channels.
        """
        # In this order of memory, convolutions on maps and linear layers on their pixels take no copies.
        x = finest.contiguous(memory_format=torch.channels_last)
        if self.lateral is not None and lateral is not None:
            x = self.lateral(lateral) + resize(x, (lateral.shape[-2], lateral.shape[-1]))
        elif self.scale > 1:
            x = resize(x, (x.shape[-2] * self.scale, x.shape[-1] * self.scale))
        found = []
        for block in list(self.blocks)[:blocks]:
            x = block(x)
            found.append(x)
        return found if every else found[-1:]

    def embed(self, queries: Tensor) -> Tensor:
        """(..., dim) queries to (..., dim + 1): what the features are multiplied by, and what is added everywhere."""
        embeddings = self.query(self.query_mlp(queries))
        weight, bias = self.spatial.weight.flatten(1), self.spatial.bias
        assert bias is not None
        joined = torch.cat((weight, bias[:, None]), 1)
        return embeddings @ joined + F.pad(self.bias, (weight.shape[1], 0))


class Block(nn.Module):
    """Depth-wise 3x3 convolution, norm, linear layer, GELU, added to the input: ConvNeXt's block without its MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, h, w) to the same shape."""
        pixels = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        # Added in place: GELU's gradient needs its input alone, and new memory for a large map takes long on a CPU.
        return F.gelu(self.linear(pixels)).permute(0, 3, 1, 2).add_(x)


class QueryMLP(MLP):
    """An MLP on normed queries, added to them: (..., dim) to (..., dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, *, act: str = "gelu") -> None:
        super().__init__(in_dim, hidden_dim, out_dim, num_layers, act=act)
        self.norm = nn.LayerNorm(in_dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))

"""The RT-DETR query decoder: the best-scored tokens of the feature maps become queries, which layers refine into boxes.

A token is one position of one of the neck's maps; the memory is the sequence of all tokens, the finest map first.
Detection and instance segmentation share the decoder. Source: Zhao et al., "DETRs Beat YOLOs on Real-time Object
Detection", CVPR 2024, sections 4.3 and 4.4; iterative box refinement and two-stage query selection come from Deformable
DETR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mvision.heads.query.deformable import DeformableAttention, Shapes
from mvision.heads.query.denoising import Denoising
from mvision.neck.cached import ShapeCache, in_graph
from mvision.neck.layers import MLP, ConvNorm, SelfAttention
from mvision.settings import MAX_LAYERS, MAX_OBJECTS, MAX_WIDTH, Replacement, Settings
from mvision.structures.boxes import inverse_sigmoid


class DecoderConfig(Settings):
    """Settings of the query decoder.

    Attributes:
        embed_dim: width of queries and memory.
        num_queries: largest number of objects that can be predicted in an image; may be changed after training.
        num_layers: decoder layers.
        num_heads, ffn_dim, dropout: of every decoder layer.
        num_points: sampled points per attention head and level.
        sampling, offset_scale: see ``DeformableAttention``.
        shared_class_head: one classifier for the tokens and for all layers, and layers that start as the identity, so
            that in the first step the decoder classifies its queries as the tokens were classified. Trains faster from
            random weights; published weights have one classifier per layer.
    """

    embed_dim: int = Field(256, gt=0, le=MAX_WIDTH)
    num_queries: int = Field(300, gt=0, le=MAX_OBJECTS)
    num_layers: int = Field(6, ge=1, le=MAX_LAYERS)
    num_heads: int = Field(8, gt=0, le=MAX_WIDTH)
    ffn_dim: int = Field(1024, gt=0, le=8 * MAX_WIDTH)
    num_points: int = Field(4, gt=0, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    sampling: Literal["default", "discrete"] = "default"
    offset_scale: float = Field(0.5, gt=0)
    shared_class_head: bool = False

    retired = {"learned_queries": [Replacement(False)]}


class DenseOutputs(NamedTuple):
    """Predictions of all S tokens, for one-to-many supervision.

    ``logits`` (B, S, C) before the sigmoid, ``boxes`` (B, S, 4) and ``anchors`` (S, 4) cxcywh in 0..1.
    """

    logits: Tensor
    boxes: Tensor
    anchors: Tensor


@dataclass
class Decoded:
    """Outputs of the decoder; D denoising queries, where there are any, come before the Q selected ones.

    Attributes:
        logits: (L, B, D + Q, C) before the sigmoid, of all L layers, or of the last one alone (L = 1), see
            ``QueryDecoder.forward``.
        boxes: (L, B, D + Q, 4) cxcywh in 0..1.
        queries: (L, B, D + Q, embed_dim), the layers' outputs, from which logits and boxes were computed.
        encoder_logits, encoder_boxes: (B, Q, C) and (B, Q, 4) of the selected tokens.
        encoder_queries: (B, Q, embed_dim), the features of the selected tokens.
        dense: of all tokens, in training and where the decoder was built with ``dense``; else None.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    encoder_queries: Tensor
    dense: DenseOutputs | None


class QueryDecoder(nn.Module):
    """Query selection and decoder layers on the neck's maps.

    Args:
        config: the settings.
        in_channels: channels of the maps, finest first.
        num_classes: C.
        num_denoising: above 0 the decoder gets a class embedding, which denoising queries need.
        dense: add a second classifier and box head on the tokens, for one-to-many supervision in training.
    """

    def __init__(
        self,
        config: DecoderConfig,
        in_channels: Sequence[int],
        num_classes: int,
        num_denoising: int = 0,
        dense: bool = False,
    ) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.num_classes = num_classes
        self.input_proj = nn.ModuleList(ConvNorm(channels, dim, 1, act=None) for channels in in_channels)
        self.memory_proj = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.memory_class = nn.Linear(dim, num_classes)
        self.memory_box = MLP(dim, dim, 4, 3)
        # Not the heads above: one-to-many supervision makes the scores of many tokens of an object high, and selecting
        # by such scores would turn all of them into queries.
        self.dense_class = nn.Linear(dim, num_classes) if dense else None
        self.dense_box = MLP(dim, dim, 4, 3) if dense else None
        self.position = MLP(4, 2 * dim, dim, 2)
        self.layers = nn.ModuleList(DecoderLayer(config, len(in_channels)) for _ in range(config.num_layers))
        own_heads = 0 if config.shared_class_head else config.num_layers
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(own_heads))
        self.box_heads = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(config.num_layers))
        # The additional row, zeros, is for padding.
        self.label_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes) if num_denoising else None
        self._anchors = ShapeCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial scores are 0.01, and initial boxes are the reference boxes, as in focal loss and Deformable DETR."""
        for head in (self.memory_class, self.dense_class, *self.class_heads):
            if isinstance(head, nn.Linear):
                nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
        for mlp in (self.memory_box, self.dense_box, *self.box_heads):
            if isinstance(mlp, MLP):
                _zero(mlp.layers[-1])
        if self.config.shared_class_head:
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                layer.start_as_identity()
        for linear in (self.memory_proj[0], *self.position.layers):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, maps: list[Tensor], denoising: Denoising | None = None, *, every_layer: bool = False) -> Decoded:
        """Select queries and refine them.

        Args:
            maps: each (B, C_i, h_i, w_i), finest first.
            denoising: queries to put before the selected ones.
            every_layer: return the predictions of all layers and of all tokens, as the loss needs them.

        Raises:
            ValueError: denoising queries for a decoder that was built without an embedding for them.
        """
        projected = [proj(feature) for proj, feature in zip(self.input_proj, maps)]
        shapes: Shapes = [(feature.shape[-2], feature.shape[-1]) for feature in projected]
        memory = torch.cat([feature.flatten(2).transpose(1, 2) for feature in projected], 1)
        # The loss is of the selected tokens alone, unless one-to-many supervision needs all: in training those few are
        # computed a second time, which is less work than gradients for thousands.
        few = every_layer and self.dense_class is None
        anchors, features = self._tokens(memory.detach() if few else memory, shapes)
        scores = self.memory_class(features.detach() if every_layer else features)
        count = min(self.config.num_queries, memory.shape[1])
        index = scores.detach().amax(-1).topk(count, dim=1).indices.unsqueeze(-1)
        selected_anchors = anchors.expand(memory.shape[0], -1, -1).gather(1, index.expand(-1, -1, 4))
        selected = (memory if few else features).gather(1, index.expand(-1, -1, features.shape[-1]))
        if few:
            inside = selected_anchors[..., :1] < torch.finfo(anchors.dtype).max
            selected = self.memory_proj(torch.where(inside, selected, 0))
        # Boxes are computed for the selected tokens only: nothing needs those of the others.
        classes = self.num_classes
        encoder_logits = self.memory_class(selected) if every_layer else scores.gather(1, index.expand(-1, -1, classes))
        encoder_boxes = (self.memory_box(selected).to(anchors.dtype) + selected_anchors).sigmoid()

        queries = selected.detach()
        references = encoder_boxes.detach()
        mask = None
        if denoising is None and every_layer and self.label_embed is not None:
            # A batch without objects has no denoising queries, but distributed training needs a gradient for every
            # parameter.
            queries = queries + 0 * self.label_embed.weight.sum()
        if denoising is not None:
            if self.label_embed is None:
                raise ValueError("denoising queries need a decoder built with num_denoising > 0")
            queries = torch.cat((self.label_embed(denoising.labels).to(queries.dtype), queries), 1)
            noisy = inverse_sigmoid(denoising.boxes.to(references.dtype)).sigmoid()
            references = torch.cat((noisy, references), 1)
            mask = _additive(denoising.mask, queries)
        logits, boxes, contents = self._refine(queries, references, memory, shapes, mask, every_layer)
        return Decoded(
            logits=logits,
            boxes=boxes,
            queries=contents,
            encoder_logits=encoder_logits,
            encoder_boxes=encoder_boxes,
            encoder_queries=selected,
            dense=self._dense(features, anchors) if every_layer else None,
        )

    def _tokens(self, memory: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """The tokens' anchors, (1, S, 4) logits, and their features for the selection, (B, S, embed_dim)."""
        dtype = box_dtype(memory)
        if in_graph():
            anchors, valid = make_anchors(shapes, memory.device, dtype)
            return anchors, self.memory_proj(memory * valid.to(memory.dtype))
        key = (tuple(shapes), dtype, memory.device)
        anchors, border = self._anchors.get(key, partial(_anchors_and_border, shapes, dtype, memory.device))
        linear, norm = self.memory_proj
        features = linear(memory)
        if len(border):
            # The same as zeros in the memory, of which that would need a copy: these rows are a few of thousands.
            features[:, border] = linear(torch.zeros_like(memory[0, 0]))
        return anchors, norm(features)

    def _dense(self, features: Tensor, anchors: Tensor) -> DenseOutputs | None:
        if self.dense_class is None or self.dense_box is None:
            return None
        boxes = (self.dense_box(features).to(anchors.dtype) + anchors).sigmoid()
        return DenseOutputs(self.dense_class(features), boxes, anchors[0].sigmoid())

    def _refine(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        mask: Tensor | None,
        every_layer: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, boxes and queries, each (L, B, Q, ...), of all layers or of the last one alone (L = 1)."""
        boxes, contents = [], []
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            position = self.position(references.to(queries.dtype))
            queries = layer(queries, position, references, memory, shapes, mask)
            refined = (self.box_heads[index](queries).to(references.dtype) + inverse_sigmoid(references)).sigmoid()
            if every_layer or index == last:
                boxes.append(refined)
                contents.append(queries)
            references = refined.detach()
        every = _stack(contents)
        if not self.class_heads:
            return self.memory_class(every), _stack(boxes), every
        heads = list(self.class_heads)[-len(contents) :]
        return _stack([head(of_layer) for head, of_layer in zip(heads, contents)]), _stack(boxes), every


class DecoderLayer(nn.Module):
    """Self-attention between queries, deformable attention to the memory, feed-forward network; a norm after each."""

    def __init__(self, config: DecoderConfig, num_levels: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.self_attention = SelfAttention(dim, config.num_heads, config.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(
            dim, config.num_heads, num_levels, config.num_points, config.sampling, config.offset_scale
        )
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = MLP(dim, config.ffn_dim, dim, 2, act="relu", dropout=config.dropout)
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
        attended = self.cross_attention(queries + position, references, memory, shapes)
        queries = self.norm2(queries + self.dropout(attended))
        return self.norm3(queries + self.dropout(self.ffn(queries)))

    def start_as_identity(self) -> None:
        """Zero the last linear layer of every branch: apart from its norms the layer returns its queries unchanged."""
        for branch in (self.self_attention.out_proj, self.cross_attention.output_proj, self.ffn.layers[-1]):
            _zero(branch)


def _stack(tensors: list[Tensor]) -> Tensor:
    """``torch.stack`` without a copy of a single tensor."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _additive(mask: Tensor, queries: Tensor) -> Tensor:
    """A bool mask (N, N) as what attention adds to its logits, which every layer would have to compute anew.

    Its rows start at multiples of 16 elements, without which GPU kernels of attention take a copy.
    """
    device, size = queries.device.type, len(mask)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    bias = torch.zeros(size, math.ceil(size / 16) * 16, dtype=dtype, device=mask.device)[:, :size]
    return bias.masked_fill_(~mask, -torch.inf)


def _anchors_and_border(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """``make_anchors``, and the indices (int64) of the tokens whose features are set to zero."""
    anchors, valid = make_anchors(shapes, torch.device("cpu"), dtype)
    return anchors.to(device), (~valid.flatten()).nonzero().flatten().to(device)


def make_anchors(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of one square box per token, centred on it: 0.05 wide on the finest level, twice as wide on each next one.

    Returns:
        (1, S, 4) logits of cxcywh in 0..1, and (1, S, 1) bool: False where a coordinate lies outside 0.01..0.99. The
        features of such tokens are set to zero, and their logits here are the largest finite number (the convention
        of the reference implementation). At 640 x 640 these are the 316 tokens at the border of the finest level.
    """
    boxes = []
    for level, (height, width) in enumerate(shapes):
        centres = grid_centres([(height, width)], device, dtype)
        boxes.append(torch.cat((centres, torch.full_like(centres, 0.05 * 2.0**level)), -1))
    anchors = torch.cat(boxes).unsqueeze(0)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return torch.where(valid, torch.log(anchors / (1 - anchors)), torch.finfo(dtype).max), valid


def grid_centres(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(S, 2) x, y in 0..1 of the centre of every position of maps of these (height, width), map by map, row by row."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), -1).flatten(0, 1))
    return torch.cat(centres)


def box_dtype(memory: Tensor) -> torch.dtype:
    """Boxes are kept in float32 or better: neighbouring bf16 numbers are up to two pixels apart at 640."""
    return torch.promote_types(memory.dtype, torch.float32)


def _zero(linear: nn.Module) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)

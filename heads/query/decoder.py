"""The query decoder: the best-scored tokens of the feature maps become queries, which layers refine into boxes.

A token is one position of one of the neck's maps; the memory is the sequence of all tokens, the finest map first.
Detection and instance segmentation share the decoder. With the default settings it is RT-DETR's (Zhao et al., "DETRs
Beat YOLOs on Real-time Object Detection", CVPR 2024, sections 4.3 and 4.4; iterative box refinement and two-stage query
selection come from Deformable DETR). Other settings make it D-FINE's, DEIM's or EdgeCrafter's, see ``DecoderConfig``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvision.heads.query.anchors import anchors_and_border, box_dtype, make_anchors
from mvision.heads.query.denoising import Denoising
from mvision.heads.query.distribution import STATISTICS, BoxDistribution, statistics
from mvision.heads.query.layers import DecoderLayer, zero
from mvision.heads.query.sampling import Shapes
from mvision.heads.query.settings import DecoderConfig
from mvision.neck.cached import ShapeCache, in_graph
from mvision.neck.layers import MLP, ConvNorm
from mvision.structures.boxes import inverse_sigmoid


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
        queries: (L, B, D + Q, embed_dim), the layers' outputs, from which logits and boxes were computed; after
            ``output_norm``, if there is one.
        encoder_logits, encoder_boxes: (B, Q, C) and (B, Q, 4) of the selected tokens.
        encoder_queries: (B, Q, embed_dim), the features of the selected tokens; after ``output_norm`` likewise.
        dense: of all tokens, in training and where the decoder was built with ``dense``; else None.
        corners: (L, B, D + Q, 4 * (num_bins + 1)), of all layers the logits of the distributions of the left, upper,
            right and lower sides, relative to ``initial``, in float32 or better. This and the next three are None
            unless the boxes are distributions and all layers were asked for.
        initial: (B, D + Q, 4) cxcywh, without gradient: ``pre_boxes``.
        pre_logits, pre_boxes: (B, D + Q, C) and (B, D + Q, 4), what the first layer predicts on its own: classes
            without the estimate of the location's quality, and the boxes that all layers refine.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    encoder_queries: Tensor
    dense: DenseOutputs | None
    corners: Tensor | None = None
    initial: Tensor | None = None
    pre_logits: Tensor | None = None
    pre_boxes: Tensor | None = None


@dataclass
class _Refined:
    """What the layers give, in the order of the layers; ``pre_boxes`` and ``corners`` are those of ``Decoded``."""

    boxes: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    corners: list[Tensor] = field(default_factory=list)
    qualities: list[Tensor] = field(default_factory=list)
    pre_boxes: Tensor | None = None


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
        dim, act = config.embed_dim, config.act
        self.config = config
        self.num_classes = num_classes
        as_it_is = dim if config.input_projection == "if_needed" else None
        self.input_proj = nn.ModuleList(
            nn.Identity() if channels == as_it_is else ConvNorm(channels, dim, 1, act=None) for channels in in_channels
        )
        self.memory_proj: nn.Module = (
            nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim)) if config.memory_projection else nn.Identity()
        )
        self.memory_class = nn.Linear(dim, num_classes)
        self.memory_box = MLP(dim, dim, 4, 3, act=act)
        # Not the heads above: one-to-many supervision makes the scores of many tokens of an object high, and selecting
        # by such scores would turn all of them into queries.
        self.dense_class = nn.Linear(dim, num_classes) if dense else None
        self.dense_box = MLP(dim, dim, 4, 3, act=act) if dense else None
        deep = config.position_mlp == "deep"
        self.position = MLP(4, dim, dim, 3, act=act) if deep else MLP(4, 2 * dim, dim, 2, act=act)
        self.layers = nn.ModuleList(DecoderLayer(config, len(in_channels)) for _ in range(config.num_layers))
        self.output_norm: nn.Module = nn.LayerNorm(dim) if config.output_norm else nn.Identity()
        own_heads = 0 if config.shared_class_head else config.num_layers
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(own_heads))
        self.distribution = (
            BoxDistribution(config.num_bins, config.bin_scale, config.bin_reach)
            if config.box_refinement == "distribution"
            else None
        )
        sides = 4 if self.distribution is None else 4 * (config.num_bins + 1)
        self.pre_box = None if self.distribution is None else MLP(dim, dim, 4, 3, act=act)
        own_heads = 0 if config.shared_box_head else config.num_layers
        self.box_heads = nn.ModuleList(MLP(dim, dim, sides, 3, act=act) for _ in range(own_heads))
        own_heads = config.num_layers if config.location_quality else 0
        self.quality_heads = nn.ModuleList(MLP(STATISTICS, 64, 1, 2, act=act) for _ in range(own_heads))
        # The additional row, zeros, is for padding.
        self.label_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes) if num_denoising else None
        self._anchors = ShapeCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial scores are 0.01, and initial boxes are the reference boxes, as in focal loss and Deformable DETR."""
        for head in (self.memory_class, self.dense_class, *self.class_heads):
            if isinstance(head, nn.Linear):
                nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
        for mlp in (self.memory_box, self.dense_box, self.pre_box, *self.box_heads, *self.quality_heads):
            if isinstance(mlp, MLP):
                zero(mlp.layers[-1])
        if self.config.shared_class_head:
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                layer.start_as_identity()
        for linear in (*self.memory_proj.children(), *self.position.layers):
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        maps: list[Tensor],
        denoising: Denoising | None = None,
        *,
        every_layer: bool = False,
        boxes_of: Callable[[Tensor], Tensor] | None = None,
    ) -> Decoded:
        """Select queries and refine them.

        Args:
            maps: each (B, C_i, h_i, w_i), finest first.
            denoising: queries to put before the selected ones.
            every_layer: return the predictions of all layers and of all tokens, as the loss needs them.
            boxes_of: gives the boxes (B, Q, 4) that the layers start from in place of the tokens' own, cxcywh in 0..1,
                for the selected tokens' features (B, Q, embed_dim) after ``output_norm``.

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
        classes, normed = self.num_classes, self.output_norm(selected)
        encoder_logits = self.memory_class(normed) if every_layer else scores.gather(1, index.expand(-1, -1, classes))
        encoder_boxes = (self.memory_box(selected).to(anchors.dtype) + selected_anchors).sigmoid()
        first_boxes = encoder_boxes if boxes_of is None else boxes_of(normed).to(anchors.dtype)

        queries, references, mask = self._start(selected, first_boxes, denoising, every_layer)
        refined = self._refine(queries, references, memory, shapes, mask, every_layer)
        contents = self.output_norm(_stack(refined.queries))
        logits = self._classify(refined.queries, contents)
        first = refined.pre_boxes
        return Decoded(
            logits=logits + _stack(refined.qualities) if refined.qualities else logits,
            boxes=_stack(refined.boxes),
            queries=contents,
            corners=_stack(refined.corners) if refined.corners else None,
            initial=None if first is None else first.detach(),
            pre_logits=None if first is None else logits[0],
            pre_boxes=first,
            encoder_logits=encoder_logits,
            encoder_boxes=encoder_boxes,
            encoder_queries=normed,
            dense=self._dense(features, anchors) if every_layer else None,
        )

    def _start(
        self, selected: Tensor, boxes: Tensor, denoising: Denoising | None, every_layer: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, reference boxes and attention mask of the first layer, those of denoising before the selected."""
        queries, references = selected.detach(), boxes.detach()
        if denoising is None:
            if every_layer and self.label_embed is not None:
                # A batch without objects has no denoising queries, but distributed training needs a gradient for every
                # parameter.
                queries = queries + 0 * self.label_embed.weight.sum()
            return queries, references, None
        if self.label_embed is None:
            raise ValueError("denoising queries need a decoder built with num_denoising > 0")
        queries = torch.cat((self.label_embed(denoising.labels).to(queries.dtype), queries), 1)
        noisy = inverse_sigmoid(denoising.boxes.to(references.dtype)).sigmoid()
        return queries, torch.cat((noisy, references), 1), additive_mask(denoising.mask, queries)

    def _tokens(self, memory: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """The tokens' anchors, (1, S, 4) logits, and their features for the selection, (B, S, embed_dim)."""
        dtype = box_dtype(memory)
        if in_graph():
            anchors, valid = make_anchors(shapes, memory.device, dtype)
            return anchors, self.memory_proj(memory * valid.to(memory.dtype))
        key = (tuple(shapes), dtype, memory.device)
        anchors, border = self._anchors.get(key, partial(anchors_and_border, shapes, dtype, memory.device))
        if not isinstance(self.memory_proj, nn.Sequential):
            return anchors, memory.index_fill(1, border, 0) if len(border) else memory
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
    ) -> _Refined:
        """Run the layers; without ``every_layer`` keep what the last one gives alone."""
        found = _Refined()
        initial = position = corners = probabilities = previous = None
        for index, layer in enumerate(self.layers):
            if position is None or not self.config.position_once:
                position = self._position(references, queries.dtype)
            queries = layer(queries, position, references, memory, shapes, mask)
            if self.distribution is None or self.pre_box is None:
                box_head = self.box_heads[index] if self.box_heads else self.memory_box
                boxes = _moved(references, box_head(queries))
            else:
                if initial is None:
                    first = _moved(references, self.pre_box(queries))
                    initial, found.pre_boxes = first.detach(), first if every_layer else None
                change = self.box_heads[index](queries if previous is None else queries + previous)
                change = change.to(references.dtype)
                corners, previous = change if corners is None else corners + change, queries.detach()
                probabilities = self.distribution.probabilities(corners)
                boxes = self.distribution.boxes(probabilities, initial)
                if every_layer:
                    found.corners.append(corners)
            references = boxes.detach()
            if every_layer or index == len(self.layers) - 1:
                found.boxes.append(boxes)
                found.queries.append(queries)
                if self.quality_heads and probabilities is not None:
                    of_sides = statistics(probabilities).to(queries.dtype)
                    found.qualities.append(self.quality_heads[index](of_sides))
        return found

    def _position(self, references: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, Q, embed_dim) the embedding of the reference boxes (B, Q, 4)."""
        position, limit = self.position(references.to(dtype)), self.config.position_limit
        return position if limit is None else position.clamp(-limit, limit)

    def _classify(self, of_layers: list[Tensor], stacked: Tensor) -> Tensor:
        """(L, B, Q, C) logits of the queries of the last L layers, given one by one, and together and normed."""
        if not self.class_heads:
            return self.memory_class(stacked)
        heads = list(self.class_heads)[-len(of_layers) :]
        if self.config.output_norm:
            of_layers = list(stacked.unbind())
        return _stack([head(queries) for head, queries in zip(heads, of_layers)])


def _moved(references: Tensor, change: Tensor) -> Tensor:
    """Boxes (..., 4) in 0..1, from reference boxes and what is added to their logits."""
    return (change.to(references.dtype) + inverse_sigmoid(references)).sigmoid()


def _stack(tensors: list[Tensor]) -> Tensor:
    """``torch.stack`` without a copy of a single tensor."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def additive_mask(mask: Tensor, queries: Tensor) -> Tensor:
    """A bool mask (N, N) as what attention adds to its logits, which every layer would have to compute anew.

    Its rows start at multiples of 16 elements, without which GPU kernels of attention take a copy.
    """
    device, size = queries.device.type, len(mask)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    bias = torch.zeros(size, math.ceil(size / 16) * 16, dtype=dtype, device=mask.device)[:, :size]
    return bias.masked_fill_(~mask, -torch.inf)

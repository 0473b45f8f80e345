"""The pose decoder: the best-scored tokens of the feature maps become instances, whose points layers refine.

A token of the memory is one position of one of the neck's maps. A query is an instance; it has T = 1 + K tokens of its
own, one for the instance as a whole and one for each of its K points.

Source: Janampa and Pattichis, "DETRPose: Real-time end-to-end transformer model for multi-person pose estimation",
2025. ECPose (EdgeCrafter) has the same decoder. Boxes and visibility are mvision's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.heads.poses.layers import PoseLayer, embed_points
from mvision.heads.poses.outputs import Decoded, DensePoses, PoseDenoising
from mvision.heads.poses.points import STATISTICS, PointDistribution, boxes_around, features_at, logit_of_points
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.query.anchors import box_dtype, grid_centres, make_anchors
from mvision.heads.query.decoder import additive_mask
from mvision.heads.query.layers import zero
from mvision.heads.query.sampling import Shapes
from mvision.neck.cached import ShapeCache
from mvision.neck.layers import MLP, ConvNorm

BORDER = 0.01
"""The features of tokens nearer to a side of the image than this fraction of it are zeros in the selection."""


class Selected(NamedTuple):
    """Features (B, Q, D) of the selected tokens, their logits (B, Q, C) and points (B, Q, K, 2); ``Decoded.dense``."""

    features: Tensor
    logits: Tensor
    points: Tensor
    dense: DensePoses | None = None


class Objects(NamedTuple):
    """Queries of another decoder as instances: their features (B, N, D) and boxes (B, N, 4) cxcywh in 0..1."""

    features: Tensor
    boxes: Tensor


class PoseDecoder(nn.Module):
    """Selection of instances and decoder layers on the neck's maps.

    Args:
        config: the settings.
        in_channels: channels of the maps, finest first.
        point_counts: the number of points of each of the C classes; K is the largest.
    """

    # Not persistent, since it follows from the classes.
    point_exists: Tensor | None  # (C, K) bool, None where all classes have K points

    def __init__(self, config: PoseConfig, in_channels: Sequence[int], point_counts: Sequence[int]) -> None:
        super().__init__()
        dim, act, layers = config.embed_dim, config.act, config.num_layers
        classes, number = len(point_counts), max(point_counts)
        self.config, self.num_classes, self.num_points = config, classes, number
        exists = torch.arange(number) < torch.tensor(point_counts)[:, None]
        self.register_buffer("point_exists", None if min(point_counts) == number else exists, persistent=False)
        self.input_proj = nn.ModuleList(
            nn.Identity() if channels == dim else ConvNorm(channels, dim, 1, act=None) for channels in in_channels
        )
        self.memory_proj = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.memory_class = nn.Linear(dim, classes)
        self.memory_points = MLP(dim, 2 * dim, 2 * number, 4, act=act)
        dense = config.dense_weight > 0 and config.queries == "own"
        self.dense_class = nn.Linear(dim, classes) if dense else None
        self.instance_token = nn.Parameter(torch.empty(1, dim))
        self.point_tokens = nn.Parameter(torch.empty(number, dim))
        learned = config.learned_queries
        self.query_embed = nn.Parameter(torch.empty(config.num_queries, dim)) if learned else None
        # The additional row, zeros, is for padding.
        denoising = config.num_denoising > 0
        self.label_embed = nn.Embedding(classes + 1, dim, padding_idx=classes) if denoising else None
        self.point_label_embed = nn.Parameter(torch.empty(number, dim)) if denoising else None
        self.position = MLP(dim, dim, dim, 2, act=act)
        self.layers = nn.ModuleList(PoseLayer(config, len(in_channels)) for _ in range(layers))
        self.distribution = PointDistribution(config.num_bins, config.bin_scale, config.bin_reach)
        self.pre_points = MLP(dim, dim, 2, 3, act=act)
        self.point_heads = nn.ModuleList(MLP(dim, dim, 2 * (config.num_bins + 1), 3, act=act) for _ in range(layers))
        self.class_heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(layers))
        self.quality_heads = nn.ModuleList(MLP(STATISTICS * number, 256, 1, 2, act=act) for _ in range(layers))
        self.box_head = MLP(dim, dim, 4, 3, act=act) if config.queries == "own" else None
        self.visible = nn.Linear(dim, 1) if config.visibility else None
        self._cache = ShapeCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial scores are 0.01; initial points are the anchors, initial boxes the extent of the points."""
        for head in (self.memory_class, self.dense_class, *self.class_heads):
            if isinstance(head, nn.Linear):
                nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
        for mlp in (self.memory_points, self.pre_points, self.box_head, *self.point_heads, *self.quality_heads):
            if isinstance(mlp, MLP):
                zero(mlp.layers[-1])
        for tokens in (self.instance_token, self.point_tokens, self.query_embed, self.point_label_embed):
            if tokens is not None:
                nn.init.xavier_uniform_(tokens)
        for linear in self.position.layers:
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        maps: list[Tensor],
        denoising: PoseDenoising | None = None,
        *,
        every_layer: bool = False,
        objects: Objects | None = None,
    ) -> Decoded:
        """Select instances and refine their points.

        Args:
            maps: each (B, C_i, h_i, w_i), finest first.
            denoising: queries to put before the selected ones.
            every_layer: return the predictions of all layers and of the selected tokens, as the loss needs them.
            objects: the instances, with ``queries: shared``, in place of selected tokens.

        Raises:
            ValueError: denoising queries for a decoder that was built without embeddings for them.
        """
        projected = [proj(feature) for proj, feature in zip(self.input_proj, maps)]
        shapes: Shapes = [(feature.shape[-2], feature.shape[-1]) for feature in projected]
        memory = torch.cat([feature.flatten(2).transpose(1, 2) for feature in projected], 1)
        selected = self._select(memory, shapes, every_layer) if objects is None else self._adopt(objects)
        tokens, references, mask = self._start(selected, denoising, every_layer)
        found = self._refine(tokens, references, mask, memory, shapes, every_layer)
        if objects is not None:
            found = found._replace(boxes=_with_boxes(found.boxes, objects.boxes.detach()))
        if not every_layer:
            return found
        return found._replace(encoder_logits=selected.logits, encoder_points=selected.points, dense=selected.dense)

    def _select(self, memory: Tensor, shapes: Shapes, every_layer: bool) -> Selected:
        """The tokens with the best scores.

        The loss is of the selected tokens alone, unless one-to-many supervision needs all: in training
        (``every_layer``) those few are computed a second time, which is less work than gradients for thousands.
        """
        dtype, device = box_dtype(memory), memory.device
        centres = self._cache.get(
            ("centres", tuple(shapes), dtype, device), lambda: grid_centres(shapes, device, dtype)
        )
        # Known from the shapes alone: the outermost centres are half a position from the sides.
        has_border = any(0.5 / max(shape) <= BORDER for shape in shapes)
        outside = ((centres <= BORDER) | (centres >= 1 - BORDER)).any(-1, keepdim=True) if has_border else None

        def features_of(tokens: Tensor, is_outside: Tensor | None) -> Tensor:
            return self.memory_proj(tokens if is_outside is None else tokens.masked_fill(is_outside, 0))

        few = every_layer and self.dense_class is None
        features = features_of(memory.detach() if few else memory, outside)
        scores = self.memory_class(features.detach() if every_layer else features)
        count = min(self.config.num_queries, memory.shape[1])
        index = scores.detach().amax(-1).topk(count, dim=1).indices
        row = index.unsqueeze(-1)
        chosen = memory if few else features
        chosen = chosen.gather(1, row.expand(-1, -1, chosen.shape[-1]))
        if few:
            chosen = features_of(chosen, None if outside is None else outside[index])
        logits = self.memory_class(chosen) if every_layer else scores.gather(1, row.expand(-1, -1, self.num_classes))
        points = self._points_near(centres[index], chosen)
        return Selected(chosen, logits, points, self._dense(features, centres, shapes) if every_layer else None)

    def _points_near(self, centres: Tensor, features: Tensor) -> Tensor:
        """(B, N, K, 2) what tokens with these features (B, N, D) and centres (B, N, 2) or (N, 2) predict."""
        moved = self.memory_points(features).to(centres.dtype).unflatten(-1, (self.num_points, 2))
        return (moved + centres.logit().unsqueeze(-2)).sigmoid()

    def _dense(self, features: Tensor, centres: Tensor, shapes: Shapes) -> DensePoses | None:
        if self.dense_class is None:
            return None
        key = ("anchors", tuple(shapes), centres.dtype, centres.device)
        anchors = self._cache.get(key, lambda: make_anchors(shapes, centres.device, centres.dtype)[0][0].sigmoid())
        return DensePoses(self.dense_class(features), self._points_near(centres, features), anchors)

    def _adopt(self, objects: Objects) -> Selected:
        """Queries of another decoder. Their points lie around the centres of their boxes, no further than its size."""
        features = self.memory_proj(objects.features)
        moved = self.memory_points(features).to(objects.boxes.dtype).unflatten(-1, (self.num_points, 2))
        centre, size = objects.boxes.detach()[:, :, None].split(2, -1)
        return Selected(features, self.memory_class(features), centre + size * (moved / 2).tanh())

    def _start(
        self, selected: Selected, denoising: PoseDenoising | None, every_layer: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, N, T, D), their reference points (B, N, T, 2) and the attention mask of the first layer."""
        batch, count, dim = selected.features.shape
        content = selected.features.detach()
        if self.config.queries == "shared":
            if self.query_embed is not None:
                content = content + self.query_embed[:count]
        elif self.query_embed is not None:
            content = self.query_embed[None, :count]
        of_points = (self.point_tokens + content.unsqueeze(2)).expand(batch, -1, -1, -1)
        tokens = torch.cat((self.instance_token.expand(batch, count, 1, dim), of_points), 2)
        references = _with_centre(selected.points.detach())
        if denoising is None:
            if every_layer and self.label_embed is not None and self.point_label_embed is not None:
                # A batch without objects has no denoising queries, but distributed training needs a gradient for every
                # parameter.
                tokens = tokens + 0 * (self.label_embed.weight.sum() + self.point_label_embed.sum())
            return tokens, references, None
        if self.label_embed is None or self.point_label_embed is None:
            raise ValueError("denoising queries need a decoder built with num_denoising > 0")
        labels = self.label_embed(denoising.labels).unsqueeze(2)
        noisy = torch.cat((labels, self.point_label_embed.expand(*labels.shape[:2], -1, -1)), 2)
        tokens = torch.cat((noisy.to(tokens.dtype), tokens), 1)
        places = logit_of_points(denoising.points.to(references.dtype)).sigmoid()
        return tokens, torch.cat((places, references), 1), additive_mask(denoising.mask, tokens)

    def _refine(
        self, tokens: Tensor, references: Tensor, mask: Tensor | None, memory: Tensor, shapes: Shapes, every_layer: bool
    ) -> Decoded:
        """Refine the points layer by layer; predictions of all layers or of the last one alone."""
        frequencies = self._frequencies(references)
        corners = initial = pre_logits = pre_points = None
        kept: list[tuple[Tensor, ...]] = []
        for index, layer in enumerate(self.layers):
            embedded = self.position(embed_points(references[:, :, 1:], frequencies).to(tokens.dtype))
            position = F.pad(embedded, (0, 0, 1, 0))
            tokens = tokens + position
            before = tokens[:, :, 1:].detach()
            tokens = layer(tokens, position, references, memory, shapes, mask)
            instance, of_points = tokens[:, :, 0], tokens[:, :, 1:]
            if corners is None or initial is None:
                change = self.pre_points(of_points).to(references.dtype)
                pre_points = (change + logit_of_points(references[:, :, 1:])).sigmoid()
                initial = pre_points.detach()
                corners = self._corners(index, of_points, references)
            else:
                corners = corners + self._corners(index, of_points + before, references)
            points = self.distribution.points(corners, initial)
            references = _with_centre(points.detach())
            if every_layer or index == len(self.layers) - 1:
                logits = self.class_heads[index](instance)
                pre_logits = logits if index == 0 else pre_logits
                quality = self.quality_heads[index](self._features_at(points, memory, shapes))
                kept.append((logits + quality, points, instance, of_points, corners))
        logits, points, instance, of_points, every_corner = map(_stack, zip(*kept))
        found = Decoded(logits, points, self._boxes(instance, points, logits))
        if self.visible is not None:
            found = found._replace(visibility=self.visible(of_points).squeeze(-1))
        if not every_layer:
            return found
        return found._replace(corners=every_corner, initial=initial, pre_logits=pre_logits, pre_points=pre_points)

    def _corners(self, index: int, of_points: Tensor, references: Tensor) -> Tensor:
        """(B, N, K, 2, bins + 1) what a layer adds to the logits of the distributions."""
        return self.point_heads[index](of_points).to(references.dtype).unflatten(-1, (2, self.config.num_bins + 1))

    def _features_at(self, points: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """See ``features_at``; of the finest map."""
        height, width = shapes[0]
        return features_at(points, memory[:, : height * width], shapes[0])

    def _boxes(self, instance: Tensor, points: Tensor, logits: Tensor) -> Tensor:
        """(L, B, N, 4) cxcywh. The points of a query are those that its best class has."""
        if self.box_head is None:
            change = points.new_zeros(*points.shape[:-2], 4)
        else:
            change = self.box_head(instance)
        exists = None if self.point_exists is None else self.point_exists[logits.detach().argmax(-1)]
        return boxes_around(points.detach(), change, exists)

    def _frequencies(self, references: Tensor) -> Tensor:
        """(D / 4,) of the position embedding."""
        dtype, device, half = references.dtype, references.device, self.config.embed_dim // 2

        def compute() -> Tensor:
            exponent = torch.arange(0, half, 2, dtype=dtype, device=device) / half
            return 2 * math.pi / 10000**exponent

        return self._cache.get(("frequencies", dtype, device), compute)


def _with_centre(points: Tensor) -> Tensor:
    """(B, N, K, 2) points to (B, N, 1 + K, 2), their mean before them."""
    return torch.cat((points.mean(2, keepdim=True), points), 2)


def _with_boxes(boxes: Tensor, objects: Tensor) -> Tensor:
    """Boxes (L, B, D + N, 4) of all queries with those (B, N, 4) of the objects in place of the last N."""
    noisy = boxes.shape[2] - objects.shape[1]
    of_objects = objects.expand(len(boxes), -1, -1, -1)
    return torch.cat((boxes[:, :, :noisy], of_objects), 2) if noisy else of_objects


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` without a copy of a single tensor."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)

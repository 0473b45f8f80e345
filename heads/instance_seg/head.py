"""Instance segmentation: every query of the decoder gives class, box and mask.

A query's mask is the product of an embedding and pixel features (Mask2Former, Mask DINO), plus a prior from the
query's own box: an ellipse whose weight the query chooses. The prior makes the mask of the first step an ellipse in the
box, and tells objects of one look apart, for which a few prototypes are too few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mvision.evaluation import BoxMetric, MaskMetric
from mvision.heads.instance_seg.losses import (
    OVERSAMPLE,
    MaskPoints,
    mask_costs,
    mask_losses,
    read_features,
    sample_mask_points,
    undecided_points,
)
from mvision.heads.pixel_features import PixelFeatures
from mvision.heads.query.head import Found, QueryConfig, QueryHead, QueryOutputs
from mvision.neck.layers import MLP
from mvision.structures import Category, Instances, Targets
from mvision.structures.masks import Masks, encode_logits

PRIOR_WEIGHT = 2.0  # of a new query: logit in the centre of its box
PRIOR_LOWEST = -3.0  # far away, where the weight brings a probability of 0.002, which a wrong box can still overcome


class MaskConfig(QueryConfig):
    """The settings of ``QueryConfig`` and those of the masks.

    Attributes:
        pixel_stride: stride of the pixel features, and so of the masks before they are enlarged. 4 adds a lateral from
            the backbone where it has a map of that stride (plain ViTs have none).
        pixel_dim: width of the layers that make the pixel features.
        mask_dim: length of a query's mask embedding.
        mask_points: points per instance that the mask losses look at.
        mask_weight, dice_weight: of cross-entropy and Dice, in the loss and in the matching costs.
    """

    class_weight: float = Field(2.0, ge=0)
    pixel_stride: Literal[4, 8] = 4
    pixel_dim: int = Field(128, gt=0)
    mask_dim: int = Field(32, gt=0)
    mask_points: int = Field(12544, gt=0)
    mask_weight: float = Field(5.0, ge=0)
    dice_weight: float = Field(5.0, ge=0)


class MaskOutputs(NamedTuple):
    """What the loss reads.

    ``queries``: of classes and boxes; ``pixels`` (B, d, h, w) pixel features; ``embeddings``
    (L + 1, B, Q, d + 1) of the queries of every layer and, last, of the selected tokens; ``denoising_embeddings``
    (L, B, D, d + 1), where there are denoising queries.
    """

    queries: QueryOutputs
    pixels: Tensor
    embeddings: Tensor
    denoising_embeddings: Tensor | None


class MaskHead(QueryHead[MaskConfig, MaskOutputs]):
    """The query decoder with a mask for every query.

    Outputs: ``logits`` (B, Q, C) before the sigmoid, ``boxes`` (B, Q, 4) cxcywh in 0..1, and ``masks`` (B, Q, h, w)
    logits on a grid of ``pixel_stride`` over the whole image; in training ``MaskOutputs``.
    """

    Config = MaskConfig
    needs = frozenset({"boxes", "masks"})
    evaluator = MaskMetric
    more_evaluators = (BoxMetric,)
    includes = ("detection",)

    def __init__(
        self,
        config: MaskConfig,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        super().__init__(config, channels, strides, categories, lateral)
        self.pixels = PixelFeatures(channels, strides, lateral, config.pixel_stride, config.pixel_dim, config.mask_dim)
        # One number more than the embedding: the weight of the prior.
        self.mask_embed = MLP(config.embed_dim, config.embed_dim, config.mask_dim + 1, 3)
        last = self.mask_embed.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias[-1:], math.log(math.expm1(PRIOR_WEIGHT)))

    @classmethod
    def lateral_stride(cls, config: MaskConfig) -> int | None:
        """Finer than the neck's finest map, the backbone's own."""
        return config.pixel_stride

    @classmethod
    def outputs_of(cls, task: str, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The queries without their masks."""
        return {name: outputs[name] for name in ("logits", "boxes")}

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | MaskOutputs:
        """Decode the neck's maps; with ``targets`` (training) denoising queries are made from them."""
        pixels = self.pixels(maps, lateral)
        decoded, denoising = self.decode(maps, targets)
        if targets is None:
            embeddings, boxes = self.mask_embed(decoded.queries[-1]), decoded.boxes[-1]
            return {"logits": decoded.logits[-1], "boxes": boxes, "masks": mask_grid(embeddings, pixels, boxes)}
        split = decoded.queries.shape[2] - decoded.encoder_queries.shape[1]
        own = torch.cat((decoded.queries[:, :, split:], decoded.encoder_queries[None]))
        return MaskOutputs(
            queries=self.training_outputs(decoded, denoising),
            pixels=pixels,
            embeddings=self.mask_embed(own),
            denoising_embeddings=self.mask_embed(decoded.queries[:, :, :split]) if denoising else None,
        )

    def loss(self, outputs: MaskOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """The terms of ``QueryHead.query_terms``, and ``mask`` and ``dice`` for the same layers.

        All sums are divided by the number of objects, with a mask or not, over all processes: what one mask weighs does
        not depend on how many others are missing.
        """
        queries = outputs.queries
        truth = self.truth(queries, targets)
        at = sample_mask_points(targets, OVERSAMPLE * self.config.mask_points, queries.logits.device)
        pixels = read_features(outputs.pixels, at.points)
        _, boxes = self.all_layers(queries)
        assigned = self.match(queries, truth, self._mask_costs(outputs.embeddings, boxes, pixels, at))
        terms = self.query_terms(queries, truth, assigned)
        losses = self._mask_losses(outputs.embeddings, boxes, assigned, pixels, at, truth.total)
        terms |= self.named(losses, self.layer_names(queries))
        denoising, embeddings = queries.denoising, outputs.denoising_embeddings
        if denoising is not None and embeddings is not None:
            assigned = denoising.assigned.expand(len(embeddings), -1, -1)
            total = truth.total * denoising.groups
            losses = self._mask_losses(embeddings, denoising.boxes, assigned, pixels, at, total)
            terms |= self.named(losses, [f"_denoising_{index}" for index in range(len(embeddings))])
        return terms

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_queries`` best (query, class) pairs of every image, with masks in pixels of the original images."""
        found = self.select(outputs, threshold)
        return [
            self._with_masks(self.instances(kept, size), kept, masks, size)
            for kept, masks, size in zip(found, outputs["masks"], sizes)
        ]

    def _with_masks(self, instances: Instances, kept: Found, masks: Tensor, size: tuple[int, int]) -> Instances:
        """Enlarge the masks of the queries that were kept, one at a time: together they may not fit into memory."""
        queries, index = kept.query.unique(return_inverse=True)
        logits = masks[queries].float().cpu().numpy()
        rles = [encode_logits(mask, size) for mask in logits]
        instances.masks = Masks([rles[i] for i in index.tolist()], size)
        return instances

    @torch.no_grad()
    def _mask_costs(self, embeddings: Tensor, boxes: Tensor, pixels: Tensor, at: MaskPoints) -> Tensor:
        """(L, B, Q, T), weighted; zero for objects without a mask."""
        count = self.config.mask_points
        few = MaskPoints(at.points[:, :count], at.labels[..., :count], at.valid)
        logits = mask_at_points(embeddings, pixels[..., :count], boxes, few.points)
        cross_entropy, dice = mask_costs(logits, few.labels)
        cost = self.config.mask_weight * cross_entropy + self.config.dice_weight * dice
        return cost * few.valid[:, None]

    def _mask_losses(
        self, embeddings: Tensor, boxes: Tensor, assigned: Tensor, pixels: Tensor, at: MaskPoints, total: float
    ) -> dict[str, Tensor]:
        """``mask`` and ``dice``, each (L,): of the (L, B, N) queries that are assigned to an object with a mask."""
        # Keeps every parameter in the graph when nothing is assigned: distributed training waits for all of them.
        nothing = 0 * (embeddings.sum((1, 2, 3)) + pixels.sum()).float()
        sums = {"mask": nothing, "dice": nothing.clone()}
        for image in range(assigned.shape[1]):
            objects = assigned[:, image]
            chosen = objects >= 0
            chosen[chosen.clone()] = at.valid[image][objects[chosen]]
            layer, query = chosen.nonzero(as_tuple=True)
            if not len(layer):
                continue
            logits = mask_at_points(
                embeddings[layer, image, query], pixels[image], boxes[layer, image, query], at.points[image]
            )
            index = undecided_points(logits, self.config.mask_points)
            labels = at.labels[image].index_select(0, objects[layer, query]).gather(1, index)
            for name, values in zip(sums, mask_losses(logits.gather(1, index), labels)):
                sums[name] = sums[name].index_add(0, layer, values)
        return {name: value / total for name, value in sums.items()}


def mask_grid(embeddings: Tensor, pixels: Tensor, boxes: Tensor) -> Tensor:
    """Mask logits on the whole grid: (B, Q, d + 1), (B, d, h, w), (B, Q, 4) -> (B, Q, h, w) in float32 or better."""
    height, width = pixels.shape[-2:]
    y = (torch.arange(height, device=pixels.device, dtype=boxes.dtype) + 0.5) / height
    x = (torch.arange(width, device=pixels.device, dtype=boxes.dtype) + 0.5) / width
    product = (embeddings[..., :-1].to(boxes.dtype) @ pixels.to(boxes.dtype).flatten(2)).unflatten(2, (height, width))
    weight = F.softplus(embeddings[..., -1].to(boxes.dtype))[..., None, None]
    boxes = boxes.detach()[..., None, None, :]
    return product + weight * _prior(x, y[:, None], boxes)


def mask_at_points(embeddings: Tensor, pixels: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """The same at points: (..., N, d + 1), (..., d, P), (..., N, 4), (..., P, 2) -> (..., N, P), all broadcast."""
    product = embeddings[..., :-1].to(pixels.dtype) @ pixels
    weight = F.softplus(embeddings[..., -1:].to(pixels.dtype))
    boxes = boxes.detach()[..., None, :].to(pixels.dtype)
    x, y = points[..., None, :, 0], points[..., None, :, 1]
    return product + weight * _prior(x, y, boxes)


def _prior(x: Tensor, y: Tensor, boxes: Tensor) -> Tensor:
    """1 in the centre of boxes (..., 4), 0 on the ellipse that touches their sides, and down to ``PRIOR_LOWEST``."""
    # Boxes narrower than a thousandth of the image would make numbers that reduced precision cannot hold.
    scale = 2 / boxes[..., 2:].clamp(min=1e-3)
    across, down = (x - boxes[..., 0]) * scale[..., 0], (y - boxes[..., 1]) * scale[..., 1]
    return (1 - across.square() - down.square()).clamp(min=PRIOR_LOWEST)

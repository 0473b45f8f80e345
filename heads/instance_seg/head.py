"""Instance segmentation: a class, a box and a mask for every query of the decoder.

A query's mask is the product of its embedding and the pixel features (Mask2Former, Mask DINO), plus a prior: an ellipse
inside the query's own box, whose weight is predicted too. With the prior untrained masks are ellipses in their boxes
already, and objects that look alike, and so have similar embeddings, still get different masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    uncertain_points,
)
from mvision.heads.pixel_features import STRIDE, PixelFeatures
from mvision.heads.query.head import Predictions, QueryConfig, QueryHead, QueryOutputs
from mvision.heads.query.matching import Matches
from mvision.neck.layers import MLP
from mvision.settings import MAX_OBJECTS, MAX_WIDTH, Replacement
from mvision.structures import Instances, Targets
from mvision.structures.masks import Masks, encode_logits

MASK_WEIGHT, DICE_WEIGHT = 5.0, 5.0  # of cross-entropy and Dice, in the loss and in the matching costs (Mask2Former's)
PRIOR_WEIGHT = 2.0  # initially; the prior's logit in the centre of a box
# The prior far outside of a box. Times the initial weight it is a probability of 0.002, low enough for the background
# and high enough for the embedding to overcome it where the box is wrong.
PRIOR_LOWEST = -3.0


class MaskConfig(QueryConfig):
    """The settings of ``QueryConfig`` and those of the masks.

    Attributes:
        pixel_dim: channels of the layers that compute the pixel features.
        mask_dim: channels of the pixel features, and length of a query's mask embedding.
        mask_points: number of points at which the mask losses compare a mask.
    """

    class_weight: float = Field(2.0, ge=0)
    pixel_dim: int = Field(128, gt=0, le=MAX_WIDTH)
    mask_dim: int = Field(32, gt=0, le=MAX_WIDTH)
    mask_points: int = Field(12544, gt=0, le=MAX_OBJECTS)

    retired = {
        "boxes_from_masks": [Replacement(False)],
        "pixel_stride": [Replacement(4)],
        "mask_weight": [Replacement(5.0)],
        "dice_weight": [Replacement(5.0)],
    }


class MaskOutputs(NamedTuple):
    """Training outputs, d being ``mask_dim``.

    ``queries``: of classes and boxes; ``pixels`` (B, d, h, w), the pixel features; ``embeddings`` (L + 1, B, Q, d + 1)
    of the queries of L layers, then of the selected tokens; ``denoising_embeddings`` (L, B, D, d + 1) of the denoising
    queries, or None. The last number of an embedding is the prior's weight before the softplus.
    """

    queries: QueryOutputs
    pixels: Tensor
    embeddings: Tensor
    denoising_embeddings: Tensor | None


class MaskHead(QueryHead[MaskConfig, MaskOutputs]):
    """The query decoder with a mask for every query.

    Outputs: ``logits`` (B, Q, C) before the sigmoid, ``boxes`` (B, Q, 4) cxcywh in 0..1, and ``masks`` (B, Q, h, w)
    logits on a grid of stride 4 over the whole image; in training ``MaskOutputs``.
    """

    Config = MaskConfig
    needs = frozenset({"boxes", "masks"})
    evaluator = MaskMetric
    more_evaluators = (BoxMetric,)
    includes = ("detection",)

    def build(self) -> None:
        """See ``Head.build``."""
        super().build()
        config = self.config
        self.pixels = PixelFeatures(self.channels, self.strides, self.lateral_dim, config.pixel_dim, config.mask_dim)
        # The additional number is the weight of the prior, see MaskOutputs.
        self.mask_embed = MLP(config.embed_dim, config.embed_dim, config.mask_dim + 1, 3)
        last = self.mask_embed.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias[-1:], math.log(math.expm1(PRIOR_WEIGHT)))

    @classmethod
    def lateral_stride(cls, config: MaskConfig) -> int | None:
        """The stride of the masks. Not every backbone has such a map: plain ViTs do not."""
        return STRIDE

    @classmethod
    def outputs_of(cls, task: str, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs without the masks."""
        return {name: outputs[name] for name in ("logits", "boxes")}

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | MaskOutputs:
        """See ``Head.forward``."""
        pixels = self.pixels(maps, lateral)
        padded = None if targets is None else self.pad(targets, maps)
        decoded, denoising = self.decode(maps, padded)
        if padded is None:
            embeddings, boxes = self.mask_embed(decoded.queries[-1]), decoded.boxes[-1]
            return {"logits": decoded.logits[-1], "boxes": boxes, "masks": mask_grid(embeddings, pixels, boxes)}
        split = decoded.queries.shape[2] - decoded.encoder_queries.shape[1]
        every_layer = torch.cat((decoded.queries[:, :, split:], decoded.encoder_queries[None]))
        return MaskOutputs(
            queries=self.training_outputs(decoded, denoising, padded),
            pixels=pixels,
            embeddings=self.mask_embed(every_layer),
            denoising_embeddings=self.mask_embed(decoded.queries[:, :, :split]) if denoising else None,
        )

    def loss(self, outputs: MaskOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """The terms of ``QueryHead``, and ``mask`` and ``dice`` with the same suffixes but ``_dense``.

        The mask terms are divided by the number of all objects, those without a mask included, so that the weight of a
        mask does not depend on how many others are missing.
        """
        queries = outputs.queries
        padded = queries.targets
        samples = sample_mask_points(targets, OVERSAMPLE * self.config.mask_points, queries.logits.device)
        pixels = read_features(outputs.pixels, samples.points)
        costs = self._mask_costs(outputs.embeddings, queries.boxes, pixels, samples)
        matching = self.start_matching(queries, costs)
        others = self.unmatched_terms(queries)
        matches = matching()
        terms = {**self.matched_terms(queries, matches), **others}
        assignment = _assignment(matches, queries.logits)
        losses = self._mask_losses(outputs.embeddings, queries.boxes, assignment, pixels, samples, padded.total)
        terms |= self.named(losses, self.layer_names(queries))
        denoising, embeddings = queries.denoising, outputs.denoising_embeddings
        if denoising is not None and embeddings is not None:
            assignment = _assignment(padded.denoising, denoising.logits)
            total = padded.total * padded.groups
            losses = self._mask_losses(embeddings, denoising.boxes, assignment, pixels, samples, total)
            terms |= self.named(losses, [f"_denoising_{index}" for index in range(len(embeddings))])
        return terms

    def term_weights(self) -> dict[str, float]:
        """Those of classes and boxes, and of the masks."""
        return {**super().term_weights(), "mask": MASK_WEIGHT, "dice": DICE_WEIGHT}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_queries`` best (query, class) pairs of every image, with masks in pixels of the original images."""
        return [
            self._with_masks(self.instances(kept, size), kept, masks, size)
            for kept, masks, size in zip(self.select(outputs, threshold), outputs["masks"], sizes)
        ]

    def _with_masks(self, instances: Instances, kept: Predictions, masks: Tensor, size: tuple[int, int]) -> Instances:
        """Enlarge the masks of the kept queries, one at a time: together they may not fit into memory."""
        queries, index = kept.query.unique(return_inverse=True)
        logits = masks[queries].float().cpu().numpy()
        rles = [encode_logits(mask, size) for mask in logits]
        instances.masks = Masks([rles[i] for i in index.tolist()], size)
        return instances

    @torch.no_grad()
    def _mask_costs(self, embeddings: Tensor, boxes: Tensor, pixels: Tensor, samples: MaskPoints) -> Tensor:
        """(L + 1, B, Q, T) weighted costs on the first ``mask_points`` of the points; 0 for objects without a mask."""
        count = self.config.mask_points
        logits = mask_at_points(embeddings, pixels[..., :count], boxes, samples.points[:, :count])
        cross_entropy, dice = mask_costs(logits, samples.labels[..., :count])
        cost = MASK_WEIGHT * cross_entropy + DICE_WEIGHT * dice
        return cost * samples.valid[:, None]

    def _mask_losses(
        self,
        embeddings: Tensor,
        boxes: Tensor,
        assignment: Tensor,
        pixels: Tensor,
        samples: MaskPoints,
        total: float | Tensor,
    ) -> dict[str, Tensor]:
        """``mask`` and ``dice``, each (L,): sums over the queries assigned to objects with masks, divided by ``total``.

        ``embeddings`` (L, B, N, d + 1), ``boxes`` (L, B, N, 4) and ``assignment`` (L, B, N) are those of N queries.
        """
        # Distributed training needs a gradient for every parameter, also where nothing is assigned.
        zero = 0 * (embeddings.sum((1, 2, 3)) + pixels.sum()).float()
        sums = {"mask": zero, "dice": zero.clone()}
        for image in range(assignment.shape[1]):
            objects = assignment[:, image]
            positive = objects >= 0
            positive[positive.clone()] = samples.valid[image][objects[positive]]
            layer, query = positive.nonzero(as_tuple=True)
            if not len(layer):
                continue
            logits = mask_at_points(
                embeddings[layer, image, query], pixels[image], boxes[layer, image, query], samples.points[image]
            )
            index = uncertain_points(logits, self.config.mask_points)
            labels = samples.labels[image].index_select(0, objects[layer, query]).gather(1, index)
            for name, values in zip(sums, mask_losses(logits.gather(1, index), labels)):
                sums[name] = sums[name].index_add(0, layer, values)
        return {name: value / total for name, value in sums.items()}


def _assignment(matches: Matches, logits: Tensor) -> Tensor:
    """(L, B, N) int64, the object of every query of logits (L, B, N, C), -1 for none."""
    assignment = torch.full(logits.shape[:3], -1, device=logits.device)
    assignment[matches.layer, matches.image, matches.query] = matches.object
    return assignment


def mask_grid(embeddings: Tensor, pixels: Tensor, boxes: Tensor) -> Tensor:
    """(B, Q, h, w) mask logits on the whole grid, in the boxes' precision.

    Args:
        embeddings: (B, Q, d + 1), see ``MaskOutputs``.
        pixels: (B, d, h, w) pixel features.
        boxes: (B, Q, 4) cxcywh in 0..1; they get no gradient.
    """
    height, width = pixels.shape[-2:]
    y = (torch.arange(height, device=pixels.device, dtype=boxes.dtype) + 0.5) / height
    x = (torch.arange(width, device=pixels.device, dtype=boxes.dtype) + 0.5) / width
    product = (embeddings[..., :-1].to(boxes.dtype) @ pixels.to(boxes.dtype).flatten(2)).unflatten(2, (height, width))
    weight = F.softplus(embeddings[..., -1].to(boxes.dtype))[..., None, None]
    boxes = boxes.detach()[..., None, None, :]
    return product + weight * _prior(x, y[:, None], boxes)


def mask_at_points(embeddings: Tensor, pixels: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """(..., N, P) mask logits at points, in the pixel features' precision; leading dimensions are broadcast.

    Args:
        embeddings: (..., N, d + 1), see ``MaskOutputs``.
        pixels: (..., d, P) pixel features at the points.
        boxes: (..., N, 4) cxcywh in 0..1; they get no gradient.
        points: (..., P, 2) x, y in 0..1.
    """
    product = embeddings[..., :-1].to(pixels.dtype) @ pixels
    weight = F.softplus(embeddings[..., -1:].to(pixels.dtype))
    boxes = boxes.detach()[..., None, :].to(pixels.dtype)
    x, y = points[..., None, :, 0], points[..., None, :, 1]
    return product + weight * _prior(x, y, boxes)


def _prior(x: Tensor, y: Tensor, boxes: Tensor) -> Tensor:
    """1 in the centre of boxes (..., 4), 0 on the ellipse that touches their sides, ``PRIOR_LOWEST`` far outside."""
    # Smaller boxes would divide by nearly zero, and a box without area would give NaN at its centre.
    scale = 2 / boxes[..., 2:].clamp(min=1e-3)
    across, down = (x - boxes[..., 0]) * scale[..., 0], (y - boxes[..., 1]) * scale[..., 1]
    return (1 - across.square() - down.square()).clamp(min=PRIOR_LOWEST)

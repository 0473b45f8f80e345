"""Instance segmentation: a class, a box and a mask for every query of the decoder.

A query's mask is the product of its embedding and the pixel features (Mask2Former, Mask DINO), plus a prior: an ellipse
inside the query's own box, whose weight is predicted too. With the prior untrained masks are ellipses in their boxes
already, and objects that look alike, and so have similar embeddings, still get different masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mvision.evaluation import BoxMetric, MaskMetric
from mvision.heads.instance_seg.logits import PRIOR_WEIGHT, mask_at_points, mask_grid
from mvision.heads.instance_seg.losses import OVERSAMPLE, mask_costs, matched_losses
from mvision.heads.instance_seg.points import MaskPoints, at_once, read_features, sample_mask_points
from mvision.heads.pixel_features import STRIDE, PixelFeatures
from mvision.heads.query.head import QueryConfig, QueryHead, QueryOutputs
from mvision.neck.layers import MLP
from mvision.settings import MAX_OBJECTS, MAX_WIDTH, Replacement
from mvision.structures import Instances, Targets
from mvision.structures.masks import Masks, RunLengths, encode_logits
from mvision.structures.run_lengths import encode_masks

MASK_WEIGHT, DICE_WEIGHT = 5.0, 5.0  # of cross-entropy and Dice, in the loss and in the matching costs (Mask2Former's)


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

    ``queries``: of classes and boxes; ``pixels`` (B, d, h, w), the pixel features; ``embeddings`` (E, B, Q, d + 1) and
    ``denoising_embeddings`` (.., B, D, d + 1) or None, of the queries of the layers that ``queries`` has. The last
    number of an embedding is the prior's weight before the softplus.
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
        embeddings = self.mask_embed(torch.cat((decoded.queries[:, :, split:], decoded.encoder_queries[None])))
        noisy = self.mask_embed(decoded.queries[:, :, :split]) if denoising else None
        if decoded.pre_boxes is not None:
            # "Pre" has boxes of its own; its queries, and so its embeddings, are those of the first layer.
            layers = len(decoded.queries)
            embeddings = torch.cat((embeddings[:layers], embeddings[:1], embeddings[layers:]))
            noisy = None if noisy is None else torch.cat((noisy, noisy[:1]))
        queries = self.training_outputs(decoded, denoising, padded)
        return MaskOutputs(queries, pixels, embeddings, noisy)

    def loss(self, outputs: MaskOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """The terms of ``QueryHead``, and ``mask`` and ``dice`` with the same suffixes but ``_dense``.

        The mask terms are of each layer's own matches. They are divided by the number of all objects, those without a
        mask included, so that the weight of a mask does not depend on how many others are missing.
        """
        queries, count = outputs.queries, self.config.mask_points
        padded = queries.targets
        samples = sample_mask_points(targets, OVERSAMPLE * count, queries.logits.device)
        pixels = read_features(outputs.pixels, samples.points)
        costs = self._mask_costs(outputs.embeddings, queries.boxes, pixels, samples)
        matching = self.start_matching(queries, costs)
        others, masks = self.unmatched_sets(queries), {}
        denoising, embeddings = queries.denoising, outputs.denoising_embeddings
        if denoising is not None and embeddings is not None:
            sums = matched_losses(embeddings, denoising.boxes, padded.denoising.host, pixels, samples, count)
            losses = {term: values / (padded.total * padded.groups) for term, values in sums.items()}
            masks = self.named(losses, self.denoising_names(denoising))
        matches = matching()
        sums = matched_losses(outputs.embeddings, queries.boxes, matches.host, pixels, samples, count)
        losses = {term: values / padded.total for term, values in sums.items()}
        masks = {**self.named(losses, self.layer_names(queries)), **masks}
        return self.set_terms([self.matched_set(queries, matches), *others], padded) | masks

    def term_weights(self) -> dict[str, float]:
        """Those of classes and boxes, and of the masks."""
        return {**super().term_weights(), "mask": MASK_WEIGHT, "dice": DICE_WEIGHT}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_queries`` best (query, class) pairs of every image, with masks in pixels of the original images."""
        kept = self.select(outputs, threshold)
        results = [self.instances(found, size) for found, size in zip(kept, sizes)]
        queries = [np.unique(found.query, return_inverse=True) for found in kept]
        encoded = iter(self._encode(outputs["masks"], [query for query, _ in queries], sizes))
        for instances, (query, index), size in zip(results, queries, sizes):
            masks = [next(encoded) for _ in query]
            instances.masks = Masks([masks[place] for place in index.tolist()], size)
        return results

    def _encode(
        self, masks: Tensor, queries: list[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> Iterable[RunLengths]:
        """The masks of these queries of every image, one after another, enlarged to the size of their image."""
        if masks.device.type == "cpu":
            # One at a time, and no more than the part of the image where the object is.
            return (
                encode_logits(masks[number, query].float().numpy(), size)
                for number, (chosen, size) in enumerate(zip(queries, sizes))
                for query in chosen.tolist()
            )
        which = np.concatenate([number * masks.shape[1] + chosen for number, chosen in enumerate(queries)])
        of_each = [size for chosen, size in zip(queries, sizes) for _ in chosen]
        return encode_masks(masks.flatten(0, 1), which, of_each)

    @torch.no_grad()
    def _mask_costs(self, embeddings: Tensor, boxes: Tensor, pixels: Tensor, samples: MaskPoints) -> Tensor:
        """(E, B, Q, T) weighted costs on the first ``mask_points`` of the points; 0 for objects without a mask."""
        count = self.config.mask_points
        layers, batch, queries = embeddings.shape[:3]
        if not samples.known.any():
            return pixels.new_zeros(layers, batch, queries, samples.labels.shape[1])
        pixels, points, labels = pixels[..., :count], samples.points[:, :count], samples.labels[..., :count]
        together = at_once(pixels.device, batch * count)
        # All layers' queries of an image side by side, and as many of them at once as fit.
        by_image = (values.transpose(0, 1).flatten(1, 2).split(together, 1) for values in (embeddings, boxes))
        costs = []
        for embedding, box in zip(*by_image):
            cross_entropy, dice = mask_costs(mask_at_points(embedding, pixels, box, points), labels)
            costs.append(MASK_WEIGHT * cross_entropy + DICE_WEIGHT * dice)
        cost = torch.cat(costs, 1).unflatten(1, (layers, -1)).transpose(0, 1)
        return torch.where(samples.valid[:, None], cost, 0)

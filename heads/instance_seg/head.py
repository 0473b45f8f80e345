"""Instance segmentation: a class, a box and a mask for every query of the decoder.

A query's mask is the product of its embedding and the pixel features (Mask2Former, Mask DINO). There are three forms:

- ``prior``: plus an ellipse inside the query's own box, whose weight is predicted too. With it untrained masks are
  ellipses in their boxes already, and objects that look alike, and so have similar embeddings, still get different
  masks. The pixel features come from all maps of the neck and the backbone's of stride 4.
- ``refine``: ECSeg's, see refine.py, and
- ``prototypes``: Mask-RT-DETR's, see prototypes.py, both of published weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from mvision.evaluation import BoxMetric, MaskMetric
from mvision.heads.base import ObjectQueries
from mvision.heads.instance_seg.logits import PRIOR_WEIGHT, mask_at_points, mask_grid
from mvision.heads.instance_seg.losses import OVERSAMPLE, map_of_layer, mask_costs, matched_losses
from mvision.heads.instance_seg.points import MaskPoints, at_once, read_features, sample_mask_points
from mvision.heads.instance_seg.prototypes import PrototypeFeatures, boxes_of_masks
from mvision.heads.instance_seg.refine import RefinedMasks
from mvision.heads.pixel_features import STRIDE, PixelFeatures
from mvision.heads.query.decoder import Decoded
from mvision.heads.query.denoising import Denoising
from mvision.heads.query.head import QueryConfig, QueryHead, QueryOutputs
from mvision.neck.layers import MLP
from mvision.settings import MAX_OBJECTS, MAX_WIDTH, Replacement
from mvision.structures import Instances, Targets
from mvision.structures.boxes import inverse_sigmoid
from mvision.structures.masks import Masks, RunLengths, encode_logits
from mvision.structures.run_lengths import encode_masks

MASK_WEIGHT, DICE_WEIGHT = 5.0, 5.0  # of cross-entropy and Dice, in the loss and in the matching costs (Mask2Former's)


class MaskConfig(QueryConfig):
    """The settings of ``QueryConfig`` and those of the masks.

    Attributes:
        mask_form: ``prior`` (mvision's own), ``refine`` (ECSeg) or ``prototypes`` (Mask-RT-DETR), see the module's
            docstring.
        pixel_dim: channels of the layers that compute the pixel features. Not for ``refine``.
        fine_dim: with ``prototypes`` that of the last of them, which work at stride 4.
        mask_dim: channels of the pixel features, and length of a query's mask embedding. Not for ``refine``.
        boxes_from_masks: with ``prototypes``, the decoder starts from the boxes around the selected tokens' masks.
        mask_points: number of points at which the mask losses compare a mask. ECSeg has one for every 16 pixels of its
            masks: 1600 for images of 640 x 640.
        mask_blocks: how many of the blocks of ``refine`` a prediction runs: ``all``, as the last decoder layer is
            trained, or ``first``, as ECSeg's published figures were measured. May be changed after training, which
            always runs all.
        lateral: for ``refine``, add the backbone's map of stride 4 to the enlarged map of the neck. Its layer starts
            at zero, so it can be added to weights that were trained without. (``prior`` takes that map if there is
            one.)
    """

    class_weight: float = Field(2.0, ge=0)
    mask_form: Literal["prior", "refine", "prototypes"] = "prior"
    pixel_dim: int = Field(128, gt=0, le=MAX_WIDTH)
    fine_dim: int = Field(64, gt=0, le=MAX_WIDTH)
    mask_dim: int = Field(32, gt=0, le=MAX_WIDTH)
    boxes_from_masks: bool = False
    mask_points: int = Field(12544, gt=0, le=MAX_OBJECTS)
    mask_blocks: Literal["all", "first"] = "all"
    lateral: bool = False

    retired = {
        "pixel_stride": [Replacement(4)],
        "mask_weight": [Replacement(5.0)],
        "dice_weight": [Replacement(5.0)],
    }

    @field_validator("boxes_from_masks")
    @classmethod
    def _has_prototypes(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("mask_form") != "prototypes":
            raise ValueError("masks need boxes, or are of single layers: it is for mask_form: prototypes alone")
        return value


class MaskOutputs(NamedTuple):
    """Training outputs, d being ``mask_dim``, or with ``refine`` ``embed_dim``. For ``prototypes`` read d for d + 1.

    ``queries``: of classes and boxes; ``pixels``: maps (B, d, h, w) of pixel features, one of them or, with ``refine``,
    one for every decoder layer; ``embeddings`` (E, B, Q, d + 1) and ``denoising_embeddings`` (.., B, D, d + 1) or None,
    of the queries of the layers that ``queries`` has, with ``refine`` without those of the encoder. The last number of
    an embedding is the prior's weight before the softplus, with ``refine`` what is added to the whole mask.
    """

    queries: QueryOutputs
    pixels: list[Tensor]
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
        if config.mask_form == "refine":
            lateral = self.lateral_dim if config.lateral else None
            if config.lateral and lateral is None:
                raise ValueError("lateral: the backbone has no map of stride 4; set it to false, or take another one")
            finest = self.channels[0], self.strides[0]
            self.refine = RefinedMasks(*finest, config.embed_dim, config.num_layers, lateral)
            return
        if config.mask_form == "prototypes":
            dims = config.pixel_dim, config.fine_dim, config.mask_dim
            self.pixels: nn.Module = PrototypeFeatures(self.channels, self.strides, self.lateral_dim, *dims)
            self.mask_embed = MLP(config.embed_dim, config.embed_dim, config.mask_dim, 3)
            return
        self.pixels = PixelFeatures(self.channels, self.strides, self.lateral_dim, config.pixel_dim, config.mask_dim)
        # The additional number is the weight of the prior, see MaskOutputs.
        self.mask_embed = MLP(config.embed_dim, config.embed_dim, config.mask_dim + 1, 3)
        last = self.mask_embed.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias[-1:], math.log(math.expm1(PRIOR_WEIGHT)))

    @classmethod
    def lateral_stride(cls, config: MaskConfig) -> int | None:
        """The stride of the masks. Not every backbone has such a map: plain ViTs do not."""
        return STRIDE if config.mask_form != "refine" or config.lateral else None

    @classmethod
    def outputs_of(cls, task: str, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs without the masks."""
        return {name: outputs[name] for name in ("logits", "boxes")}

    def forward(
        self,
        maps: list[Tensor],
        lateral: Tensor | None = None,
        targets: list[Targets] | None = None,
        hand_over: bool = False,
    ) -> dict[str, Tensor] | MaskOutputs | tuple[dict[str, Tensor] | MaskOutputs, ObjectQueries]:
        """See ``Head.forward`` and ``Head.query_dim``."""
        pixels = self._pixels(maps, lateral, every=targets is not None)
        padded = None if targets is None else self.pad(targets, maps)
        from_masks = partial(self._boxes_from_masks, pixels[-1]) if self.config.boxes_from_masks else None
        decoded, denoising = self.decode(maps, padded, from_masks)
        outputs: dict[str, Tensor] | MaskOutputs
        if padded is None:
            boxes = decoded.boxes[-1]
            masks = mask_grid(self._embed(decoded.queries[-1]), pixels[-1], self._of_prior(boxes))
            outputs = {"logits": decoded.logits[-1], "boxes": boxes, "masks": masks}
        else:
            queries = self.training_outputs(decoded, denoising, padded)
            outputs = self._training_outputs(decoded, denoising, queries, pixels)
        return (outputs, self.object_queries(decoded, denoising)) if hand_over else outputs

    def _pixels(self, maps: list[Tensor], lateral: Tensor | None, every: bool) -> list[Tensor]:
        """The pixel features: with ``every`` all that training needs, else those of the last decoder layer."""
        if self.config.mask_form != "refine":
            return [self.pixels(maps, lateral)]
        blocks = 1 if self.config.mask_blocks == "first" and not every else len(self.refine.blocks)
        return self.refine(maps[0], lateral, blocks, every)  # type: ignore[no-any-return]

    def _embed(self, queries: Tensor) -> Tensor:
        """The embeddings of queries, see ``MaskOutputs``."""
        return self.refine.embed(queries) if self.config.mask_form == "refine" else self.mask_embed(queries)

    @torch.no_grad()
    def _boxes_from_masks(self, pixels: Tensor, queries: Tensor) -> Tensor:
        """(B, Q, 4) cxcywh in 0..1, around the masks of queries without a prior; not quite 0 or 1."""
        return inverse_sigmoid(boxes_of_masks(mask_grid(self._embed(queries), pixels, None))).sigmoid()

    def _of_prior(self, boxes: Tensor) -> Tensor | None:
        """The boxes, if masks have a prior."""
        return boxes if self.config.mask_form == "prior" else None

    def _training_outputs(
        self, decoded: Decoded, denoising: Denoising | None, queries: QueryOutputs, pixels: list[Tensor]
    ) -> MaskOutputs:
        split = decoded.queries.shape[2] - decoded.encoder_queries.shape[1]
        selected = decoded.queries[:, :, split:]
        if self.config.mask_form != "refine":
            selected = torch.cat((selected, decoded.encoder_queries[None]))
        embeddings = self._embed(selected)
        noisy = self._embed(decoded.queries[:, :, :split]) if denoising else None
        if decoded.pre_boxes is not None:
            # "Pre" has boxes of its own; its queries, and so its embeddings, are those of the first layer. (In ECSeg's
            # code it has the masks of the last layer, which are then matched and learned twice.)
            layers = len(decoded.queries)
            embeddings = torch.cat((embeddings[:layers], embeddings[:1], embeddings[layers:]))
            noisy = None if noisy is None else torch.cat((noisy, noisy[:1]))
        return MaskOutputs(queries, pixels, embeddings, noisy)

    def loss(self, outputs: MaskOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """The terms of ``QueryHead``, and ``mask`` and ``dice`` with the same suffixes but ``_dense``.

        With ``refine`` also without ``_encoder``: its selected tokens have no masks. The mask terms are of each layer's
        own matches. They are divided by the number of all objects, those without a mask included, so that the weight of
        a mask does not depend on how many others are missing.
        """
        queries, count = outputs.queries, self.config.mask_points
        padded = queries.targets
        samples = sample_mask_points(targets, OVERSAMPLE * count, queries.logits.device)
        read = [read_features(features, samples.points) for features in outputs.pixels]
        pixels = torch.cat(read) if len(read) > 1 else read[0]
        costs = self._mask_costs(outputs.embeddings, queries.boxes, pixels, samples)
        matching = self.start_matching(queries, costs)
        others, masks = self.unmatched_sets(queries), {}
        denoising, embeddings = queries.denoising, outputs.denoising_embeddings
        if denoising is not None and embeddings is not None:
            boxes = self._of_prior(denoising.boxes)
            sums = matched_losses(embeddings, boxes, padded.denoising.host, pixels, samples, count)
            losses = {term: values / (padded.total * padded.groups) for term, values in sums.items()}
            masks = self.named(losses, self.denoising_names(denoising))
        matches = matching()
        boxes = self._of_prior(queries.boxes)
        sums = matched_losses(outputs.embeddings, boxes, matches.host, pixels, samples, count)
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
        """(E, B, Q, T) weighted costs on the first ``mask_points`` of the points.

        They are 0 for objects without a mask, and for all objects in layers without masks.
        """
        layers, batch, queries = boxes.shape[:3]
        costs = pixels.new_zeros(layers, batch, queries, samples.labels.shape[1])
        if samples.known.any():
            maps, of_each = pixels.split(batch), len(embeddings)
            # Layers that read the same map together, else one at a time.
            for first in range(1 if len(maps) == 1 else of_each):
                rows = slice(0, of_each) if len(maps) == 1 else slice(first, first + 1)
                features = maps[map_of_layer(np.array(first), len(maps))]
                found = self._costs_on_map(embeddings[rows], boxes[rows], features, samples)
                costs[rows] = torch.where(samples.valid[:, None], found, 0)
        return costs

    def _costs_on_map(self, embeddings: Tensor, boxes: Tensor, pixels: Tensor, samples: MaskPoints) -> Tensor:
        """(L, B, Q, T) weighted costs of layers whose masks are read from the same features (B, d, P)."""
        count = self.config.mask_points
        layers, batch = embeddings.shape[:2]
        pixels, points, labels = pixels[..., :count], samples.points[:, :count], samples.labels[..., :count]
        together = at_once(pixels.device, batch * count)
        # All layers' queries of an image side by side, and as many of them at once as fit.
        by_image = (values.transpose(0, 1).flatten(1, 2).split(together, 1) for values in (embeddings, boxes))
        costs = []
        for embedding, box in zip(*by_image):
            logits = mask_at_points(embedding, pixels, self._of_prior(box), points)
            cross_entropy, dice = mask_costs(logits, labels)
            costs.append(MASK_WEIGHT * cross_entropy + DICE_WEIGHT * dice)
        return torch.cat(costs, 1).unflatten(1, (layers, -1)).transpose(0, 1)

"""What detection and instance segmentation share: classes and boxes of the decoder's queries, and how they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torchvision.ops import batched_nms

from mvision.heads.base import Head, OutputsT
from mvision.heads.query.decoder import Decoded, DecoderConfig, Dense, QueryDecoder
from mvision.heads.query.denoising import Denoising, make_denoising
from mvision.heads.query.losses import set_losses
from mvision.heads.query.matching import (
    MatchingCosts,
    PaddedTargets,
    anchor_assignment,
    hungarian,
    mean_over_processes,
    pad_targets,
)
from mvision.structures import Category, Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy


class QueryConfig(DecoderConfig):
    """The decoder's settings and those of its training.

    Attributes:
        num_denoising: wished denoising queries per image; 0 switches denoising off.
        label_noise, box_noise: see ``make_denoising``.
        class_loss: ``vfl`` (RT-DETR) or ``mal`` (DEIM), with ``alpha`` (vfl alone) and ``gamma``.
        dense_weight: weight of the one-to-many supervision of all encoder cells; 0 switches it off (RT-DETR).
        nms_iou: post-processing drops a box that overlaps a better one of its class by more than this IoU. None
            (RT-DETR) trusts the decoder with that, which it learns in a long training; a short one leaves duplicates.
    """

    num_denoising: int = Field(100, ge=0)
    label_noise: float = Field(0.5, ge=0, le=1)
    box_noise: float = Field(1.0, ge=0)
    class_loss: Literal["vfl", "mal"] = "vfl"
    alpha: float = Field(0.75, ge=0)
    gamma: float = Field(2.0, ge=0)
    class_weight: float = Field(1.0, ge=0)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    dense_weight: float = Field(0.0, ge=0)
    nms_iou: float | None = Field(None, gt=0, le=1)


ConfigT = TypeVar("ConfigT", bound=QueryConfig)


class DenoisingOutputs(NamedTuple):
    """Predictions of the D denoising queries.

    ``logits`` (L, B, D, C) and ``boxes`` (L, B, D, 4) of every layer; ``assigned`` (B, D) int64, the object that each
    has to restore, -1 for none; ``groups``: how many copies of the ground truth they are.
    """

    logits: Tensor
    boxes: Tensor
    assigned: Tensor
    groups: int


class QueryOutputs(NamedTuple):
    """What the loss of classes and boxes reads.

    ``logits`` (L, B, Q, C) and ``boxes`` (L, B, Q, 4) of every decoder layer; ``encoder_logits`` and ``encoder_boxes``
    of the selected tokens, (B, Q, ...); ``dense``: of every token, where they are supervised; ``denoising``: None in a
    batch without objects.
    """

    logits: Tensor
    boxes: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    dense: Dense | None
    denoising: DenoisingOutputs | None


class Found(NamedTuple):
    """The predictions of one image that are kept, best first: ``query`` is where each comes from.

    ``boxes`` (N, 4) xyxy in 0..1, ``scores`` (N,), ``labels`` (N,) int64, ``query`` (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    query: Tensor


class QueryHead(Head[ConfigT, OutputsT]):
    """RT-DETR's decoder with its criterion and post-processing.

    Outputs: ``logits`` (B, Q, C) before the sigmoid and ``boxes`` (B, Q, 4) cxcywh in 0..1. In training also those of
    every layer, of the encoder's cells and of the denoising queries, which the loss reads.
    """

    def __init__(
        self,
        config: ConfigT,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        super().__init__(config, channels, strides, categories, lateral)
        self.decoder = QueryDecoder(
            config, channels, len(categories), config.num_denoising, dense=config.dense_weight > 0
        )

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_queries`` best (query, class) pairs of every image, in pixels of the original images."""
        return [self.instances(found, size) for found, size in zip(self.select(outputs, threshold), sizes)]

    def decode(self, maps: list[Tensor], targets: list[Targets] | None) -> tuple[Decoded, Denoising | None]:
        """Run the decoder; in training (``targets``) with denoising queries made from them, and all layers returned."""
        if targets is None:
            return self.decoder(maps), None
        denoising = self._denoising(pad_targets(targets, maps[0].device), maps)
        return self.decoder(maps, denoising, every_layer=True), denoising

    def truth(self, outputs: QueryOutputs, targets: list[Targets]) -> PaddedTargets:
        """The labels, on the device and in the precision of the predicted boxes."""
        return pad_targets(targets, outputs.logits.device, outputs.boxes.dtype)

    def match(self, outputs: QueryOutputs, truth: PaddedTargets, more: Tensor | None = None) -> Tensor:
        """(L + 1, B, Q) object of every query of the decoder's layers and, last, of the selected cells; -1 for none.

        ``more`` (L + 1, B, Q, T) is added to the costs of class and box.
        """
        logits, boxes = self.all_layers(outputs)
        costs = MatchingCosts(l1=self.config.box_weight, giou=self.config.giou_weight)
        return hungarian(logits.detach(), boxes.detach(), truth, costs, more)

    def query_terms(self, outputs: QueryOutputs, truth: PaddedTargets, assigned: Tensor) -> dict[str, Tensor]:
        """The loss of classes and boxes: terms named ``class``, ``box``, ``giou``, of the last layer plain.

        Of the others they have the layer's name: ``_0``.. are the earlier decoder layers, ``_encoder`` the selected
        tokens, ``_denoising_0``.. the denoising queries, ``_dense`` the one-to-many supervision of all tokens.
        """
        terms = self.named(self._set_losses(*self.all_layers(outputs), assigned, truth), self.layer_names(outputs))
        if outputs.denoising is not None:
            terms |= self._denoising_terms(outputs.denoising, truth)
        if outputs.dense is not None:
            terms |= self._dense_terms(outputs.dense, truth)
        return terms

    def layer_names(self, outputs: QueryOutputs) -> list[str]:
        """The endings of the loss terms' names, in the order of ``match``'s layers."""
        layers = len(outputs.logits)
        return [*(f"_{index}" for index in range(layers - 1)), "", "_encoder"]

    def named(self, losses: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """One weighted scalar per term and layer: the weight of a term is the setting ``TERM_weight``."""
        return {
            f"{term}{name}": getattr(self.config, f"{term}_weight") * value
            for term, values in losses.items()
            for name, value in zip(names, values.unbind())
        }

    def select(self, outputs: dict[str, Tensor], threshold: float) -> list[Found]:
        """For every image the ``num_queries`` best (query, class) pairs whose score reaches the threshold."""
        logits, boxes = outputs["logits"].float(), outputs["boxes"].float()
        classes = logits.shape[-1]
        scores, index = logits.sigmoid().flatten(1).topk(min(logits.shape[1], logits[0].numel()), dim=1)
        corners = cxcywh_to_xyxy(boxes).clamp(0, 1)
        found = []
        for image, keep in enumerate(scores >= threshold):
            pairs = index[image, keep]
            query = pairs // classes
            kept = Found(corners[image, query], scores[image, keep], pairs % classes, query)
            if self.config.nms_iou is not None:
                best = batched_nms(kept.boxes, kept.scores, kept.labels, self.config.nms_iou)
                kept = Found(*(values[best] for values in kept))
            found.append(kept)
        return found

    def instances(self, found: Found, size: tuple[int, int]) -> Instances:
        """In pixels of an image of this (height, width)."""
        height, width = size
        return Instances(
            boxes=(found.boxes * found.boxes.new_tensor([width, height, width, height])).cpu().numpy(),
            scores=found.scores.cpu().numpy(),
            labels=found.labels.cpu().numpy(),
            size=size,
            categories=self.categories,
        )

    def training_outputs(self, decoded: Decoded, denoising: Denoising | None) -> QueryOutputs:
        """What the loss reads, denoising queries apart from the others."""
        split = denoising.labels.shape[1] if denoising else 0
        return QueryOutputs(
            logits=decoded.logits[:, :, split:],
            boxes=decoded.boxes[:, :, split:],
            encoder_logits=decoded.encoder_logits,
            encoder_boxes=decoded.encoder_boxes,
            dense=decoded.dense,
            denoising=None
            if denoising is None
            else DenoisingOutputs(
                decoded.logits[:, :, :split], decoded.boxes[:, :, :split], denoising.assigned, denoising.groups
            ),
        )

    def _denoising(self, truth: PaddedTargets, maps: list[Tensor]) -> Denoising | None:
        config = self.config
        tokens = sum(x.shape[-2] * x.shape[-1] for x in maps)
        queries = min(config.num_queries, tokens)
        return make_denoising(
            truth, len(self.categories), queries, config.num_denoising, config.label_noise, config.box_noise
        )

    def all_layers(self, outputs: QueryOutputs) -> tuple[Tensor, Tensor]:
        """Logits and boxes of all layers and, last, of the selected tokens."""
        logits = torch.cat((outputs.logits, outputs.encoder_logits[None]))
        return logits, torch.cat((outputs.boxes, outputs.encoder_boxes[None]))

    def _set_losses(
        self, logits: Tensor, boxes: Tensor, assigned: Tensor, truth: PaddedTargets, total: float | None = None
    ) -> dict[str, Tensor]:
        config = self.config
        return set_losses(logits, boxes, assigned, truth, config.class_loss, config.alpha, config.gamma, total)

    def _denoising_terms(self, outputs: DenoisingOutputs, truth: PaddedTargets) -> dict[str, Tensor]:
        assigned = outputs.assigned.expand(len(outputs.logits), -1, -1)
        losses = self._set_losses(outputs.logits, outputs.boxes, assigned, truth)
        scaled = {term: value / outputs.groups for term, value in losses.items()}
        return self.named(scaled, [f"_denoising_{index}" for index in range(len(outputs.logits))])

    def _dense_terms(self, outputs: Dense, truth: PaddedTargets) -> dict[str, Tensor]:
        assigned = anchor_assignment(outputs.anchors, truth)
        positives = mean_over_processes((assigned >= 0).sum().to(outputs.boxes.dtype)).clamp(min=1).item()
        losses = self._set_losses(outputs.logits[None], outputs.boxes[None], assigned[None], truth, positives)
        weighted = {term: self.config.dense_weight * value for term, value in losses.items()}
        return self.named(weighted, ["_dense"])

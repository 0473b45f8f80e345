"""What detection and instance segmentation share: classes and boxes of the decoder's queries, and how they learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torchvision.ops import batched_nms

from mvision.heads.base import Head
from mvision.heads.query.decoder import Decoded, DecoderConfig, QueryDecoder
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


class Found(NamedTuple):
    """The predictions of one image that are kept, best first: ``query`` is where each comes from.

    ``boxes`` (N, 4) xyxy in 0..1, ``scores`` (N,), ``labels`` (N,) int64, ``query`` (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    query: Tensor


class QueryHead(Head[ConfigT]):
    """RT-DETR's decoder with its criterion and post-processing.

    Outputs: ``logits`` (B, Q, C) before the sigmoid and ``boxes`` (B, Q, 4) cxcywh in 0..1. In training also those of
    every layer, of the encoder's cells and of the denoising queries, which the loss reads.
    """

    def __init__(
        self, config: ConfigT, channels: Sequence[int], strides: Sequence[int], categories: list[Category]
    ) -> None:
        super().__init__(config, channels, strides, categories)
        self.decoder = QueryDecoder(
            config, channels, len(categories), config.num_denoising, dense=config.dense_weight > 0
        )

    def loss(self, outputs: dict[str, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """Terms named ``class``, ``box``, ``giou``: of the last layer plain, of the others with the layer's name.

        ``_0``.. are the earlier decoder layers, ``_encoder`` the selected cells, ``_denoising_0``.. the denoising
        queries, ``_dense`` the one-to-many supervision of all cells.
        """
        truth = self.truth(outputs, targets)
        return self.query_terms(outputs, truth, self.match(outputs, truth))

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_queries`` best (query, class) pairs of every image, in pixels of the original images."""
        return [self.instances(found, size) for found, size in zip(self.select(outputs, threshold), sizes)]

    def decode(
        self,
        features: list[Tensor],
        targets: list[Targets] | None,
        first_boxes: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Decoded, Denoising | None]:
        """Run the decoder; in training (``targets``) with denoising queries made from them, and all layers returned."""
        if targets is None:
            return self.decoder(features, first_boxes=first_boxes), None
        noisy = self._denoising(pad_targets(targets, features[0].device), features)
        return self.decoder(features, noisy, every_layer=True, first_boxes=first_boxes), noisy

    def truth(self, outputs: dict[str, Tensor], targets: list[Targets]) -> PaddedTargets:
        """The labels, on the device and in the precision of the predicted boxes."""
        return pad_targets(targets, outputs["logits"].device, outputs["boxes"].dtype)

    def match(self, outputs: dict[str, Tensor], truth: PaddedTargets, more: Tensor | None = None) -> Tensor:
        """(L + 1, B, Q) object of every query of the decoder's layers and, last, of the selected cells; -1 for none.

        ``more`` (L + 1, B, Q, T) is added to the costs of class and box.
        """
        logits, boxes = self._all_layers(outputs)
        costs = MatchingCosts(l1=self.config.box_weight, giou=self.config.giou_weight)
        return hungarian(logits.detach(), boxes.detach(), truth, costs, more)

    def query_terms(self, outputs: dict[str, Tensor], truth: PaddedTargets, assigned: Tensor) -> dict[str, Tensor]:
        """The loss of classes and boxes."""
        terms = self.named(self._set_losses(*self._all_layers(outputs), assigned, truth), self.layer_names(outputs))
        if "denoising_logits" in outputs:
            terms |= self._denoising_terms(outputs, truth)
        if "dense_logits" in outputs:
            terms |= self._dense_terms(outputs, truth)
        return terms

    def layer_names(self, outputs: dict[str, Tensor]) -> list[str]:
        """The endings of the loss terms' names, in the order of ``match``'s layers."""
        layers = len(outputs["layer_logits"])
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

    def training_outputs(self, decoded: Decoded, noisy: Denoising | None) -> dict[str, Tensor]:
        """What the loss reads, denoising queries apart from the others."""
        split = noisy.labels.shape[1] if noisy else 0
        outputs = {
            "logits": decoded.logits[-1, :, split:],
            "boxes": decoded.boxes[-1, :, split:],
            "layer_logits": decoded.logits[:, :, split:],
            "layer_boxes": decoded.boxes[:, :, split:],
            "encoder_logits": decoded.encoder_logits,
            "encoder_boxes": decoded.encoder_boxes,
        }
        if decoded.dense is not None:
            outputs["dense_logits"] = decoded.dense.logits
            outputs["dense_boxes"] = decoded.dense.boxes
            outputs["anchors"] = decoded.dense.anchors
        if noisy:
            outputs["denoising_logits"] = decoded.logits[:, :, :split]
            outputs["denoising_boxes"] = decoded.boxes[:, :, :split]
            outputs["denoising_assigned"] = noisy.assigned
            outputs["denoising_groups"] = torch.tensor(noisy.groups)
        return outputs

    def _denoising(self, truth: PaddedTargets, features: list[Tensor]) -> Denoising | None:
        config = self.config
        cells = sum(feature.shape[-2] * feature.shape[-1] for feature in features)
        queries = min(config.num_queries, cells)
        return make_denoising(
            truth, len(self.categories), queries, config.num_denoising, config.label_noise, config.box_noise
        )

    def _all_layers(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and boxes of all layers and, last, of the selected cells."""
        logits = torch.cat((outputs["layer_logits"], outputs["encoder_logits"][None]))
        return logits, torch.cat((outputs["layer_boxes"], outputs["encoder_boxes"][None]))

    def _set_losses(
        self, logits: Tensor, boxes: Tensor, assigned: Tensor, truth: PaddedTargets, total: float | None = None
    ) -> dict[str, Tensor]:
        config = self.config
        return set_losses(logits, boxes, assigned, truth, config.class_loss, config.alpha, config.gamma, total)

    def _denoising_terms(self, outputs: dict[str, Tensor], truth: PaddedTargets) -> dict[str, Tensor]:
        logits, boxes = outputs["denoising_logits"], outputs["denoising_boxes"]
        assigned = outputs["denoising_assigned"].expand(len(logits), -1, -1)
        groups = outputs["denoising_groups"].item()
        losses = self._set_losses(logits, boxes, assigned, truth)
        scaled = {term: value / groups for term, value in losses.items()}
        return self.named(scaled, [f"_denoising_{index}" for index in range(len(logits))])

    def _dense_terms(self, outputs: dict[str, Tensor], truth: PaddedTargets) -> dict[str, Tensor]:
        assigned = anchor_assignment(outputs["anchors"], truth)
        positives = mean_over_processes((assigned >= 0).sum().to(outputs["dense_boxes"].dtype)).clamp(min=1).item()
        logits, boxes = outputs["dense_logits"][None], outputs["dense_boxes"][None]
        losses = self._set_losses(logits, boxes, assigned[None], truth, positives)
        weighted = {term: self.config.dense_weight * value for term, value in losses.items()}
        return self.named(weighted, ["_dense"])

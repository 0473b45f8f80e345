"""Base class of detection and instance segmentation: the decoder's classes and boxes, with loss and post-processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mvision.heads.base import Head, ObjectQueries, OutputsT, only_best_class
from mvision.heads.duplicates import without_duplicates
from mvision.heads.query.anchors import box_dtype
from mvision.heads.query.decoder import Decoded, DenseOutputs, QueryDecoder
from mvision.heads.query.denoising import Denoising, make_denoising
from mvision.heads.query.fine_grained import distillation_losses, join_distributions, localization_losses
from mvision.heads.query.losses import LossSet, set_losses
from mvision.heads.query.matching import (
    Matches,
    PaddedTargets,
    anchor_assignment,
    divisor,
    mean_over_processes,
    pad_targets,
    start_matching,
)
from mvision.heads.query.settings import DecoderConfig
from mvision.settings import MAX_OBJECTS
from mvision.structures import Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.transfer import to_host


class QueryConfig(DecoderConfig):
    """The decoder's settings and those of its training and post-processing.

    Attributes:
        num_denoising: intended number of positive denoising queries per image; 0 switches denoising off.
        label_noise, box_noise: see ``make_denoising``.
        class_loss: ``vfl`` (RT-DETR) or ``mal`` (DEIM), with ``alpha`` (for vfl only) and ``gamma``, see
            ``quality_focal``.
        class_weight, box_weight, giou_weight: of the loss terms; the last two also of the matching costs.
        shared_matches: whether the box terms of all layers are of the same pairs, the union of all layers' matches
            (D-FINE, DEIM), see union.py; the class terms always are of each layer's own matches.
        fgl_weight, ddf_weight: of the terms of box distributions, see fine_grained.py; without distributions they have
            no effect.
        dense_weight: weight of the one-to-many supervision of all tokens; 0 switches it off (RT-DETR).
        nms_iou: post-processing drops a box whose IoU with a higher-scored one of its class exceeds this, 0..1. None
            (RT-DETR) switches that off: the decoder learns in a long training to predict each object once, after a
            short one duplicates remain.
    """

    num_denoising: int = Field(100, ge=0, le=MAX_OBJECTS)
    label_noise: float = Field(0.5, ge=0, le=1)
    box_noise: float = Field(1.0, ge=0)
    class_loss: Literal["vfl", "mal"] = "vfl"
    alpha: float = Field(0.75, ge=0)
    gamma: float = Field(2.0, ge=0)
    class_weight: float = Field(1.0, ge=0)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    shared_matches: bool = False
    fgl_weight: float = Field(0.15, ge=0)
    ddf_weight: float = Field(1.5, ge=0)
    dense_weight: float = Field(0.0, ge=0)
    nms_iou: float | None = Field(None, gt=0, le=1)


ConfigT = TypeVar("ConfigT", bound=QueryConfig)


class DenoisingOutputs(NamedTuple):
    """Predictions of the D denoising queries.

    Those of ``QueryOutputs``, for D in place of Q and without the selected tokens.
    """

    logits: Tensor
    boxes: Tensor
    corners: Tensor | None = None
    initial: Tensor | None = None


class QueryOutputs(NamedTuple):
    """Training outputs for classes and boxes.

    ``logits`` (E, B, Q, C) and ``boxes`` (E, B, Q, 4) of the L decoder layers, of "pre" where the decoder predicts
    distributions (so E is L + 1 or L + 2), and of the selected tokens; ``dense`` of all tokens, None unless
    ``dense_weight`` is above 0; ``denoising``, None where denoising is off or the batch has no object; ``targets``, the
    ground truth, which the loss needs again; ``corners`` (L, B, Q, 4 * (bins + 1)) and ``initial`` (B, Q, 4), see
    ``Decoded``, None without distributions.
    """

    logits: Tensor
    boxes: Tensor
    dense: DenseOutputs | None
    denoising: DenoisingOutputs | None
    targets: PaddedTargets
    corners: Tensor | None = None
    initial: Tensor | None = None


class Predictions(NamedTuple):
    """The N predictions of one image that post-processing keeps, highest score first, on the CPU.

    ``boxes`` (N, 4) float32 xyxy in 0..1, ``scores`` (N,) float32 in 0..1, ``labels`` (N,) int64, ``query`` (N,) int64:
    the index of the query that predicts it.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    query: np.ndarray


class QueryHead(Head[ConfigT, OutputsT]):
    """RT-DETR's decoder with its loss and post-processing; subclasses add ``forward`` and ``loss``."""

    weighs_classes = True

    def build(self) -> None:
        """See ``Head.build``."""
        config = self.config
        self.decoder = QueryDecoder(
            config, self.channels, len(self.categories), config.num_denoising, dense=config.dense_weight > 0
        )

    @classmethod
    def query_dim(cls, config: ConfigT) -> int | None:
        """See ``Head.query_dim``."""
        return config.embed_dim

    def object_queries(self, decoded: Decoded, denoising: Denoising | None) -> ObjectQueries:
        """The selected queries after the last layer, without those of denoising."""
        last = ObjectQueries(decoded.queries[-1], decoded.boxes[-1], decoded.logits[-1])
        if denoising is None:
            return last
        number = denoising.labels.shape[1]
        return ObjectQueries(*(values[:, number:] for values in last))

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_queries`` best (query, class) pairs of every image, in pixels of the original images."""
        return [self.instances(kept, size) for kept, size in zip(self.select(outputs, threshold), sizes)]

    def best_class_only(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Head.best_class_only``."""
        return {name: only_best_class(value) if name == "logits" else value for name, value in outputs.items()}

    def pad(self, targets: list[Targets], maps: list[Tensor]) -> PaddedTargets:
        """The labels of a batch on the device of its maps, with what denoising takes of them."""
        config = self.config
        dtype = box_dtype(maps[0])
        layers = config.num_layers + (self.decoder.distribution is not None)  # that of "pre"
        return pad_targets(targets, maps[0].device, dtype, config.num_denoising, layers)

    def decode(
        self,
        maps: list[Tensor],
        targets: PaddedTargets | None,
        boxes_of: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Decoded, Denoising | None]:
        """Run the decoder; with ``targets`` (training) add denoising queries and return the outputs of all layers.

        ``boxes_of``: see ``QueryDecoder.forward``.
        """
        if targets is None:
            return self.decoder(maps, boxes_of=boxes_of), None
        config = self.config
        queries = min(config.num_queries, sum(x.shape[-2] * x.shape[-1] for x in maps))
        denoising = make_denoising(targets, len(self.categories), queries, config.label_noise, config.box_noise)
        return self.decoder(maps, denoising, every_layer=True, boxes_of=boxes_of), denoising

    def start_matching(self, outputs: QueryOutputs, more_costs: Tensor | None = None) -> Callable[[], Matches]:
        """Start to match the queries of every layer of the outputs with the objects.

        What is queued before the returned function is called keeps the GPU busy; it waits for the matches.
        ``more_costs`` (E, B, Q, T) are added to the costs of class and box.
        """
        logits, boxes = outputs.logits.detach(), outputs.boxes.detach()
        config = self.config
        weights = config.box_weight, config.giou_weight
        return start_matching(logits, boxes, outputs.targets, *weights, more_costs, config.shared_matches)

    def unmatched_sets(self, outputs: QueryOutputs) -> list[LossSet]:
        """The predictions whose pairs need no matching: those of the denoising queries, and those of all tokens.

        The suffixes of their terms are ``_denoising_0``, ``_denoising_1``.., ``_denoising_pre`` where there is a "pre",
        and ``_dense`` (one-to-many supervision).
        """
        sets = []
        if outputs.denoising is not None:
            sets.append(self._denoising_set(outputs.denoising, outputs.targets))
        if outputs.dense is not None:
            sets.append(self._dense_set(outputs.dense, outputs.targets))
        return sets

    def matched_set(self, outputs: QueryOutputs, matches: Matches) -> LossSet:
        """The predictions of the queries of every layer; their suffixes: see ``layer_names``."""
        targets, shared = outputs.targets, matches.shared
        found = LossSet(outputs.logits, outputs.boxes, matches, targets.total, self.layer_names(outputs))
        found.corners, found.initial = outputs.corners, outputs.initial
        if shared is not None:
            found.box_pairs = shared
            found.box_total = divisor(len(shared.host) // len(outputs.logits), outputs.logits.device)
        return found

    def set_terms(self, sets: Sequence[LossSet], targets: PaddedTargets) -> dict[str, Tensor]:
        """The weighted loss terms ``class``, ``box`` and ``giou`` of every layer of the sets, the matched set first.

        With distributions also ``fgl`` of the decoder layers, and ``ddf`` of all of them but the last.
        """
        config = self.config
        losses = set_losses(sets, targets, config.class_loss, config.alpha, config.gamma, self.class_weights)
        terms = self.named(losses, [suffix for one in sets for suffix in one.suffixes])
        sets = [one for one in sets if one.corners is not None]
        return terms | self._distribution_terms(sets, targets) if sets else terms

    def _distribution_terms(self, sets: Sequence[LossSet], targets: PaddedTargets) -> dict[str, Tensor]:
        assert self.decoder.distribution is not None
        found = join_distributions(sets, targets)
        layers = len(found.corners)
        fgl = localization_losses(found, [one.of_boxes[1] for one in sets], self.decoder.distribution)
        terms = self.named({"fgl": fgl}, [suffix for one in sets for suffix in one.suffixes[:layers]])
        if layers > 1 and self.config.ddf_weight > 0:
            logits = torch.cat([one.logits[layers - 1] for one in sets], 1)
            ddf = distillation_losses(found, logits.detach())
            terms |= self.named({"ddf": ddf}, [suffix for one in sets for suffix in one.suffixes[: layers - 1]])
        return terms

    def layer_names(self, outputs: QueryOutputs) -> list[str]:
        """The suffixes of the loss terms' names: ``_0``, ``_1``.. of the earlier decoder layers, none of the last one.

        After them ``_pre``, if there is one, and ``_encoder`` of the selected tokens; the order is that of the outputs.
        """
        others = ["_encoder"] if outputs.corners is None else ["_pre", "_encoder"]
        return [*(f"_{index}" for index in range(len(outputs.logits) - 1 - len(others))), "", *others]

    def denoising_names(self, outputs: DenoisingOutputs) -> list[str]:
        """The suffixes of the terms of the denoising queries, see ``unmatched_sets``."""
        names = [f"_denoising_{index}" for index in range(len(outputs.logits))]
        return names if outputs.corners is None else [*names[:-1], "_denoising_pre"]

    def term_weights(self) -> dict[str, float]:
        """Weights of the loss terms by their names without suffix."""
        config = self.config
        weights = {"class": config.class_weight, "box": config.box_weight, "giou": config.giou_weight}
        return {**weights, "fgl": config.fgl_weight, "ddf": config.ddf_weight}

    def named(self, losses: dict[str, Tensor], suffixes: list[str]) -> dict[str, Tensor]:
        """One weighted scalar per term and layer; ``losses`` holds terms (L,), ``suffixes`` has L entries."""
        weights = self.term_weights()
        return {
            f"{term}{suffix}": value
            for term, values in losses.items()
            for suffix, value in zip(suffixes, (weights[term] * values).unbind())
        }

    def select(self, outputs: dict[str, Tensor], threshold: float) -> list[Predictions]:
        """For every image the ``num_queries`` best (query, class) pairs, those with scores >= ``threshold`` (0..1)."""
        logits, boxes = outputs["logits"].float(), outputs["boxes"].float()
        classes = logits.shape[-1]
        scores, pairs = logits.sigmoid().flatten(1).topk(min(logits.shape[1], logits[0].numel()), dim=1)
        # The rest on the CPU: how many are left over is known there without waiting, and it is little work.
        host = to_host({"scores": scores, "pairs": pairs, "boxes": boxes})
        query = host["pairs"] // classes
        corners = cxcywh_to_xyxy(host["boxes"]).clamp(0, 1).gather(1, query[..., None].expand(-1, -1, 4))
        every = (corners, host["scores"], host["pairs"] % classes, query)
        return [self._keep(Predictions(*of_image), threshold) for of_image in zip(*(x.numpy() for x in every))]

    def _keep(self, found: Predictions, threshold: float) -> Predictions:
        enough = found.scores >= threshold
        kept = Predictions(*(values[enough] for values in found))
        best = without_duplicates(kept.boxes, kept.scores, kept.labels, self.config.nms_iou)
        return Predictions(*(values[best] for values in kept))

    def instances(self, kept: Predictions, size: tuple[int, int]) -> Instances:
        """The predictions of an image in pixels of its original, whose (height, width) is ``size``."""
        height, width = size
        return Instances(
            boxes=kept.boxes * np.array([width, height, width, height], dtype=np.float32),
            scores=kept.scores,
            labels=kept.labels,
            size=size,
            categories=self.categories,
            query=kept.query,
        )

    def training_outputs(self, decoded: Decoded, denoising: Denoising | None, targets: PaddedTargets) -> QueryOutputs:
        """The decoder's outputs with those of the denoising queries separated from the others."""
        logits, boxes, corners, initial = decoded.logits, decoded.boxes, decoded.corners, decoded.initial
        if decoded.pre_logits is not None and decoded.pre_boxes is not None:
            logits = torch.cat((logits, decoded.pre_logits[None]))
            boxes = torch.cat((boxes, decoded.pre_boxes[None]))
        noisy = None
        if denoising is not None:
            # The gradient of one split takes fewer operators than those of two slices.
            sizes = [denoising.labels.shape[1], decoded.encoder_logits.shape[1]]
            (noisy_logits, logits), (noisy_boxes, boxes) = logits.split(sizes, 2), boxes.split(sizes, 2)
            noisy = DenoisingOutputs(noisy_logits, noisy_boxes)
            if corners is not None and initial is not None:
                (noisy_corners, corners), (noisy_initial, initial) = corners.split(sizes, 2), initial.split(sizes, 1)
                noisy = DenoisingOutputs(noisy_logits, noisy_boxes, noisy_corners, noisy_initial)
        return QueryOutputs(
            logits=torch.cat((logits, decoded.encoder_logits[None])),
            boxes=torch.cat((boxes, decoded.encoder_boxes[None])),
            dense=decoded.dense,
            denoising=noisy,
            targets=targets,
            corners=corners,
            initial=initial,
        )

    def _denoising_set(self, outputs: DenoisingOutputs, targets: PaddedTargets) -> LossSet:
        total = targets.total * targets.groups
        found = LossSet(outputs.logits, outputs.boxes, targets.denoising, total, self.denoising_names(outputs))
        found.corners, found.initial = outputs.corners, outputs.initial
        return found

    def _dense_set(self, outputs: DenseOutputs, targets: PaddedTargets) -> LossSet:
        """One-to-many supervision, divided by the number of positive tokens instead of that of objects."""
        pairs = anchor_assignment(outputs.anchors, targets.boxes, targets.valid)
        assert pairs.counted is not None
        positives = mean_over_processes(pairs.counted.sum().to(outputs.boxes.dtype)).clamp(min=1)
        total = positives / self.config.dense_weight
        return LossSet(outputs.logits[None], outputs.boxes[None], pairs, total, ["_dense"])

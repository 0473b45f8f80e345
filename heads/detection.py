"""Detection: a class and a box for every query of the decoder."""

from __future__ import annotations

from torch import Tensor

from mvision.evaluation import BoxMetric
from mvision.heads.base import ObjectQueries
from mvision.heads.query.head import QueryConfig, QueryHead, QueryOutputs
from mvision.structures import Targets


class DetectionHead(QueryHead[QueryConfig, QueryOutputs]):
    """RT-DETR's decoder with its loss and post-processing.

    Outputs: ``logits`` (B, Q, C) before the sigmoid and ``boxes`` (B, Q, 4) cxcywh in 0..1; in training
    ``QueryOutputs``.
    """

    Config = QueryConfig
    needs = frozenset({"boxes"})
    evaluator = BoxMetric

    def forward(
        self,
        maps: list[Tensor],
        lateral: Tensor | None = None,
        targets: list[Targets] | None = None,
        hand_over: bool = False,
    ) -> dict[str, Tensor] | QueryOutputs | tuple[dict[str, Tensor] | QueryOutputs, ObjectQueries]:
        """See ``Head.forward`` and ``Head.query_dim``; the lateral is not used."""
        padded = None if targets is None else self.pad(targets, maps)
        decoded, denoising = self.decode(maps, padded)
        outputs: dict[str, Tensor] | QueryOutputs
        if padded is None:
            outputs = {"logits": decoded.logits[-1], "boxes": decoded.boxes[-1]}
        else:
            outputs = self.training_outputs(decoded, denoising, padded)
        return (outputs, self.object_queries(decoded, denoising)) if hand_over else outputs

    def loss(self, outputs: QueryOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """``class``, ``box`` and ``giou`` of ``QueryHead.matched_set`` and ``QueryHead.unmatched_sets``."""
        matching = self.start_matching(outputs)
        others = self.unmatched_sets(outputs)
        return self.set_terms([self.matched_set(outputs, matching()), *others], outputs.targets)

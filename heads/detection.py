"""Detection: boxes and classes of the decoder's queries."""

from __future__ import annotations

from torch import Tensor

from mvision.heads.query.head import QueryConfig, QueryHead
from mvision.structures import Targets


class DetectionHead(QueryHead[QueryConfig]):
    """RT-DETR's decoder with its criterion and post-processing.

    Outputs: ``logits`` (B, Q, C) before the sigmoid and ``boxes`` (B, Q, 4) cxcywh in 0..1; in training also what the
    loss reads.
    """

    Config = QueryConfig
    needs = frozenset({"boxes"})
    metric = "bbox"

    def forward(self, features: list[Tensor], targets: list[Targets] | None = None) -> dict[str, Tensor]:
        """Decode the neck's maps; with ``targets`` (training) denoising queries are made from them."""
        decoded, noisy = self.decode(features, targets)
        if targets is None:
            return {"logits": decoded.logits[-1], "boxes": decoded.boxes[-1]}
        return self.training_outputs(decoded, noisy)

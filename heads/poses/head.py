"""The head for poses from queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvision.heads.keypoints.results import PoseResults
from mvision.heads.poses.decoder import PoseDecoder
from mvision.heads.poses.losses import pose_terms
from mvision.heads.poses.outputs import Decoded
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.poses.targets import PoseTargets, pose_targets
from mvision.heads.query.anchors import box_dtype
from mvision.structures import Targets

ALL_VISIBLE = 100.0
"""Logit of points of which nothing is predicted: a score of 1."""


class PoseOutputs(NamedTuple):
    """Training outputs: those of the decoder, and the ground truth, which the loss needs again."""

    decoded: Decoded
    targets: PoseTargets


class QueryPoseHead(PoseResults[PoseConfig, PoseOutputs]):
    """Objects with their points from the queries of ``PoseDecoder``; outputs are those of ``PoseResults``.

    Without ``config.visibility`` all points are visible.
    """

    Config = PoseConfig

    def build(self) -> None:
        """See ``Head.build``."""
        self.read_classes(self.config.sigmas)
        counts = [len(category.keypoints) for category in self.classes]
        self.decoder = PoseDecoder(self.config, self.channels, counts)

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | PoseOutputs:
        """See ``Head.forward``."""
        if targets is not None:
            found = self._targets(maps, targets)
            return PoseOutputs(self.decoder(maps, found.denoising, every_layer=True), found)
        decoded = self.decoder(maps)
        points = decoded.points[0]
        visibility = decoded.visibility
        return {
            "logits": decoded.logits[0],
            "boxes": decoded.boxes[0],
            "visibility": torch.full_like(points[..., 0], ALL_VISIBLE) if visibility is None else visibility[0],
            "keypoints": points,
        }

    def loss(self, outputs: PoseOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """See ``pose_terms``."""
        return pose_terms(outputs.decoded, outputs.targets, self.config)

    def _targets(self, maps: list[Tensor], targets: list[Targets]) -> PoseTargets:
        config, finest = self.config, maps[0]
        tokens = sum(x.shape[-2] * x.shape[-1] for x in maps)
        return pose_targets(
            targets,
            self.labels_of_classes.tolist(),
            self.tables,
            shape=(finest.shape[-2], finest.shape[-1]),
            like=finest.new_empty(0, dtype=box_dtype(finest)),
            num_queries=min(config.num_queries, tokens),
            num_layers=config.num_layers + 1,  # that of "pre"
            num_denoising=config.num_denoising,
            label_noise=config.label_noise,
        )

"""The keypoint head of most shipped models: scores per class, boxes, points, and heatmaps for their exact places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mvision.heads.keypoints.base import BaseKeypointHead, Branch
from mvision.heads.keypoints.grid import PoseLayers, Raw
from mvision.heads.keypoints.heatmaps import Heatmaps
from mvision.heads.keypoints.losses import Candidates, box_losses, point_losses, score_target, visibility_loss
from mvision.heads.keypoints.settings import KeypointSettings
from mvision.heads.pixel_features import STRIDE, PixelFeatures
from mvision.settings import MAX_WIDTH


class KeypointConfig(KeypointSettings):
    """Settings of ``KeypointHead``, and those of ``KeypointSettings``.

    Attributes:
        pixel_dim: width of the layers that make the pixel features for the heatmaps (see
            ``mvision.heads.keypoints.heatmaps``); 0 leaves heatmaps out.
        map_dim: channels of these features.
        box_weight, giou_weight, visible_weight, map_weight: of the loss terms: L1 and GIoU of the box; visibility of
            the points; heatmaps.
    """

    kind: Literal["dense"] = "dense"
    pixel_dim: int = Field(64, ge=0, le=MAX_WIDTH)
    map_dim: int = Field(32, gt=0, le=MAX_WIDTH)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    visible_weight: float = Field(0.5, ge=0)
    map_weight: float = Field(8.0, ge=0)


class KeypointHead(BaseKeypointHead[KeypointConfig]):
    """Scores, boxes and points for any classes with any numbers of keypoints.

    Outputs are those of ``BaseKeypointHead``; ``postprocess`` uses ``similarity`` for the scores.
    """

    Config = KeypointConfig

    def build(self) -> None:
        """See ``Head.build``."""
        super().build()
        config = self.config
        if config.pixel_dim:
            pixels = PixelFeatures(self.channels, self.strides, self.lateral_dim, config.pixel_dim, config.map_dim)
            self.maps = Heatmaps(pixels, config.embed_dim, self.num_points)

    @classmethod
    def lateral_stride(cls, config: KeypointConfig) -> int | None:
        """That of the heatmaps' pixel features."""
        return STRIDE if config.pixel_dim else None

    def new_last_layers(self, branch: Branch) -> PoseLayers:
        """One-to-many layers predict objects of all classes: those without keypoints train the neck as well."""
        return PoseLayers(self.config.embed_dim, len(self.labels_of(branch)), self.num_points)

    def labels_of(self, branch: Branch) -> Sequence[int]:
        """All labels for the one-to-many layers, see ``new_last_layers``."""
        return super().labels_of(branch) if branch == "one2one" else range(len(self.categories))

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """(B, N, C) scores of the objects in 0..1."""
        scores = super().scores(outputs)
        if "similarity" not in outputs:
            return scores
        # The score of the last layers estimates the IoU of the box; this is the expected OKS of the visible points.
        visibility = outputs["visibility"].float().sigmoid()
        expected_oks = (outputs["similarity"] * visibility).sum(-1) / visibility.sum(-1).clamp(min=1e-6)
        # The geometric mean has the order of the product and the scale of its factors: thresholds mean the same as for
        # boxes.
        return (scores * expected_oks[..., None]).sqrt()

    def losses(self, found: Candidates) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``oks``, ``point`` and ``visible``; ``box`` and ``giou``."""
        return point_losses(found) | {"visible": visibility_loss(found)}, box_losses(found)

    def score_targets(self, found: Candidates, is_scored: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The score of the object's class learns the IoU, or without heatmaps the OKS."""
        gt, comparison = found.gt, found.comparison
        index = (gt.image[:, None], found.grid_points, gt.classes[:, None])
        quality = comparison.iou.detach()
        if self.maps is None:  # with heatmaps, ``scores`` adds the expected OKS after training
            has_points = gt.class_has_points[:, None]
            quality = torch.where(has_points, score_target(comparison.oks, quality), quality)
        return index, quality, is_scored

    def score_logits(self, raw: Raw) -> Tensor:
        """(B, S, C), the scores of the objects."""
        return raw.logits

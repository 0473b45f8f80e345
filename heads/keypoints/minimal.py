"""The pose estimator in its barest form: a 1x1 convolution to x, y and score of every keypoint, for one class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mvision.errors import UserError
from mvision.heads.keypoints.base import BaseKeypointHead, Branch
from mvision.heads.keypoints.grid import PointLayers, Raw
from mvision.heads.keypoints.losses import Candidates, point_losses, score_target
from mvision.heads.keypoints.settings import KeypointSettings


class MinimalKeypointConfig(KeypointSettings):
    """Settings of ``MinimalKeypointHead``: those of ``KeypointSettings``."""

    kind: Literal["minimal"] = "minimal"


class MinimalKeypointHead(BaseKeypointHead[MinimalKeypointConfig]):
    """K x (x, y, score) at every grid point, for the one class with keypoints.

    Outputs are those of ``BaseKeypointHead`` with C = 1. ``boxes`` are drawn around the points, and the score of an
    object is the mean of its points' scores.

    Raises:
        UserError: no class or several classes have keypoints, or ``sigmas`` do not fit them.
    """

    Config = MinimalKeypointConfig

    def new_last_layers(self, branch: Branch) -> PointLayers:
        """The same for both branches."""
        if len(self.classes) > 1:
            names = ", ".join(category.name for category in self.classes[:5])
            raise UserError(
                "model.heads.keypoints.kind: minimal has no scores for classes, and "
                f"{len(self.classes)} have keypoints ({names}); use dense"
            )
        return PointLayers(self.config.embed_dim, self.num_points)

    def losses(self, found: Candidates) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``oks`` and ``point``; there are no others."""
        return point_losses(found), {}

    def score_targets(self, found: Candidates, is_scored: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The score of a labelled point learns its own similarity; the loss is a mean over the points."""
        gt, comparison = found.gt, found.comparison
        point = torch.arange(self.num_points, device=is_scored.device).expand(len(is_scored), 1, -1)
        index = (gt.image[:, None, None], found.grid_points[..., None], point)
        quality = score_target(comparison.point_similarity, comparison.iou[..., None])
        return index, quality, is_scored[..., None] & (gt.points[:, None, :, 2] > 0)

    def score_logits(self, raw: Raw) -> Tensor:
        """(B, S, K), the scores of the points."""
        return raw.points[..., 2 * self.num_points :]

    def weights_of(self, branch: Branch) -> None:
        """None: there is one class, and the scores are those of its points."""

    @property
    def scores_of_object(self) -> int:
        """One for each point."""
        return self.num_points

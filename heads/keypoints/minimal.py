"""The pose estimator in its barest form: a 1x1 convolution to x, y and score of every keypoint, for one class."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mvision.errors import UserError
from mvision.heads.keypoints.base import BaseKeypointHead, Branch, KeypointOutputs, KeypointSettings
from mvision.heads.keypoints.grid import PointLayers, Raw
from mvision.heads.keypoints.losses import Assignment, ignored_grid_points, point_terms, score_target
from mvision.heads.query.matching import mean_over_processes


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

    def terms(self, branch: Branch, raw: Raw, assignment: Assignment, outputs: KeypointOutputs) -> dict[str, Tensor]:
        """``oks``, ``point`` and ``class``, each divided by the number of positives over all processes.

        The target of a point's score is its own similarity.
        """
        gt, comparison = assignment.gt, assignment.comparison
        # Objects without labelled points count too: the weight of a label must not depend on how many are missing.
        num_objects = mean_over_processes(assignment.is_positive.sum().to(gt.areas)).clamp(min=1)
        terms = point_terms(assignment)
        row, column = (assignment.is_positive & gt.is_labelled[:, None]).nonzero(as_tuple=True)
        pair, point = (gt.points[row, :, 2] > 0).nonzero(as_tuple=True)
        quality = score_target(comparison.point_similarity, comparison.iou[..., None])[row, column][pair, point]
        index = (gt.image[row][pair], assignment.grid_points[row, column][pair], point)
        ignored = ignored_grid_points(assignment.inside, gt)
        logits = raw.points[..., 2 * self.num_points :]
        terms["class"] = self.score_term(logits, index, quality, ignored, gt.labelled_classes) / self.num_points
        return {name: value / num_objects for name, value in terms.items()}

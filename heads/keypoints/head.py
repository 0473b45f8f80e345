"""The keypoint head of most shipped models: scores per class, boxes, points, and heatmaps for their exact places."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mvision.heads.keypoints.base import BaseKeypointHead, Branch, KeypointOutputs, KeypointSettings
from mvision.heads.keypoints.grid import PoseLayers, Raw
from mvision.heads.keypoints.heatmaps import Heatmaps
from mvision.heads.keypoints.losses import (
    Assignment,
    box_terms,
    ignored_grid_points,
    map_term,
    point_terms,
    score_target,
    visibility_term,
)
from mvision.heads.pixel_features import STRIDE, PixelFeatures
from mvision.heads.query.matching import mean_over_processes
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

    def labels_of(self, branch: Branch) -> Tensor:
        """All labels for the one-to-many layers, see ``new_last_layers``."""
        if branch == "one2one":
            return self.class_labels
        return torch.arange(len(self.categories), device=self.class_labels.device)

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

    def terms(self, branch: Branch, raw: Raw, assignment: Assignment, outputs: KeypointOutputs) -> dict[str, Tensor]:
        """``oks``, ``point``, ``visible``, ``class``, ``box`` and ``giou``; of one-to-one layers also ``map``.

        Terms are divided by the number of positives, those of points by that of objects whose class has points, over
        all processes.
        """
        gt, is_positive = assignment.gt, assignment.is_positive
        # Objects without labelled points count too: the weight of a label must not depend on how many are missing.
        counts = torch.stack((is_positive.sum(), (is_positive & gt.class_has_points[:, None]).sum())).to(gt.areas)
        num_objects, num_poses = mean_over_processes(counts).clamp(min=1)
        of_points = point_terms(assignment) | {"visible": visibility_term(assignment)}
        terms = {name: value / num_poses for name, value in of_points.items()}
        terms["class"] = self._class_term(raw, assignment) / num_objects
        terms |= {name: value / num_objects for name, value in box_terms(assignment).items()}
        if branch == "one2one" and self.maps is not None and outputs.pixels is not None:
            terms["map"] = map_term(self.maps, outputs.pixels, outputs.tokens, assignment)
        return terms

    def _class_term(self, raw: Raw, assignment: Assignment) -> Tensor:
        """The loss of the objects' scores, summed."""
        gt, comparison = assignment.gt, assignment.comparison
        has_points = gt.class_has_points[:, None]
        # An object without labelled points is no positive for the score, unless its class has no points at all.
        is_scored = assignment.is_positive & (gt.is_labelled[:, None] | ~has_points)
        row, column = is_scored.nonzero(as_tuple=True)
        iou = comparison.iou.detach()
        # With heatmaps, ``scores`` adds the expected OKS after training.
        quality = iou if self.maps is not None else score_target(comparison.oks, iou)
        quality = torch.where(has_points, quality, iou)[row, column]
        index = (gt.image[row], assignment.grid_points[row, column], gt.classes[row])
        ignored = ignored_grid_points(assignment.inside & has_points, gt)
        return self.score_term(raw.logits, index, quality, ignored, gt.labelled_classes)

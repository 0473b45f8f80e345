"""What all keypoint heads share: the classes that they predict, and the way from their outputs to results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mvision.evaluation import BoxMetric, KeypointMetric
from mvision.heads.base import Head, OutputsT, only_best_class
from mvision.heads.duplicates import without_duplicates
from mvision.heads.keypoints.settings import PoseSettings, with_sigmas
from mvision.heads.keypoints.targets import ClassTables
from mvision.structures import Category, Instances
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.transfer import to_host

ConfigT = TypeVar("ConfigT", bound=PoseSettings)


class PoseResults(Head[ConfigT, OutputsT]):
    """A head for objects with their points, which are those of N queries or grid points ("queries" below).

    K is the largest number of keypoints that a class has; a class with fewer uses the first of them. Classes without
    keypoints are not predicted: C is the number of the others.

    Outputs: ``logits`` (B, N, C) before the sigmoid; ``boxes`` (B, N, 4) cxcywh in 0..1; ``keypoints`` (B, N, K, 2)
    x, y in 0..1; ``visibility`` (B, N, K), the logits of the points' scores.

    Raises:
        UserError: no class has keypoints, or ``sigmas`` do not fit them.
    """

    needs = frozenset({"boxes", "keypoints"})
    evaluator = KeypointMetric
    more_evaluators = (BoxMetric,)
    kind = "poses"
    weighs_classes = True

    def read_classes(self, sigmas: list[float]) -> None:
        """Set what follows from the categories; the first thing that ``build`` has to do.

        Args:
            sigmas: of the config, see ``with_sigmas``.
        """
        self.categories = with_sigmas(self.categories, sigmas)
        self.num_points = max(len(category.keypoints) for category in self.classes)
        self.tables = ClassTables.of(self.categories)
        self.labels_of_classes = np.array([self.categories.index(category) for category in self.classes])

    @classmethod
    def predicted(cls, categories: list[Category]) -> list[Category]:
        """The classes with keypoints."""
        return [category for category in categories if category.keypoints]

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The best (query, class) pairs of every image, as many as there are queries, in pixels of the original images.

        Points that the class of an instance does not have are zeros.
        """
        selected = {name: value.numpy() for name, value in to_host(self.select(outputs)).items()}
        images = [dict(zip(selected, values)) for values in zip(*selected.values())]
        return [self._instances(size=size, threshold=threshold, **image) for image, size in zip(images, sizes)]

    def select(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The N best (query, class) pairs of every image by falling score, whatever their scores.

        Returns:
            ``scores`` (B, N) in 0..1, ``classes`` (B, N) int64 among the C classes, ``boxes`` (B, N, 4) xyxy in 0..1,
            and ``points`` (B, N, K, 3) x, y in 0..1 and score.
        """
        all_scores = self.scores(outputs)
        _, count, classes = all_scores.shape
        scores, index = all_scores.flatten(1).topk(count, dim=1)
        row = torch.div(index, classes, rounding_mode="floor")
        points = self.points(outputs)
        corners = cxcywh_to_xyxy(outputs["boxes"].float()).clamp(0, 1)
        return {
            "scores": scores,
            "classes": index % classes,
            "boxes": corners.gather(1, row[..., None].expand(-1, -1, 4)),
            "points": points.gather(1, row[..., None, None].expand(-1, -1, *points.shape[2:])),
        }

    def points(self, outputs: dict[str, Tensor]) -> Tensor:
        """(B, N, K, 3) x, y in 0..1 and score of the points of every query."""
        # Labelled points lie in the image, so moving predicted points into it cannot take them further away from these.
        visibility = outputs["visibility"].float().sigmoid()
        return torch.cat((outputs["keypoints"].float().clamp(0, 1), visibility[..., None]), -1)

    def best_class_only(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Head.best_class_only``."""
        if len(self.classes) == 1:
            return outputs
        return {name: only_best_class(value) if name == "logits" else value for name, value in outputs.items()}

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """(B, N, C) scores of the objects in 0..1."""
        return outputs["logits"].float().sigmoid()

    def _instances(
        self,
        scores: np.ndarray,
        classes: np.ndarray,
        boxes: np.ndarray,
        points: np.ndarray,
        size: tuple[int, int],
        threshold: float,
    ) -> Instances:
        """One image of ``select``."""
        keep = np.flatnonzero(scores >= threshold)
        keep = keep[without_duplicates(boxes[keep], scores[keep], classes[keep], self.config.nms_iou)]
        labels = self.labels_of_classes[classes[keep]]
        height, width = size
        points = np.where(self.tables.point_exists[labels][..., None], points[keep], np.float32(0))
        return Instances(
            boxes=boxes[keep] * np.array([width, height, width, height], np.float32),
            scores=scores[keep],
            labels=labels,
            size=size,
            categories=self.categories,
            keypoints=points * np.array([width, height, 1], np.float32),
        )

"""A heatmap of centres for every class (as in Zhou et al., "Objects as Points", 2019, without sizes and offsets)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from centers_head.metric import CenterMetric
from mvision.heads.base import Head
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets


class CentersConfig(Settings):
    """``hidden_dim``: channels of the hidden layer; ``num_centers``: most results per image."""

    hidden_dim: int = Field(32, gt=0)
    num_centers: int = Field(20, gt=0)


class CentersOutputs(NamedTuple):
    """``logits`` (B, C, h, w) before the sigmoid."""

    logits: Tensor


class CentersHead(Head[CentersConfig, CentersOutputs]):
    """Two convolutions on the finest of the neck's maps."""

    Config = CentersConfig
    needs = frozenset({"boxes"})
    evaluator = CenterMetric
    primary_metric = "hit_rate"

    def __init__(
        self,
        config: CentersConfig,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        super().__init__(config, channels, strides, categories, lateral)
        self.layers = nn.Sequential(
            nn.Conv2d(channels[0], config.hidden_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.hidden_dim, len(categories), 1),
        )

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | CentersOutputs:
        """A logit for every class and grid point."""
        logits = self.layers(maps[0])
        return {"logits": logits} if targets is None else CentersOutputs(logits)

    def loss(self, outputs: CentersOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """Binary cross-entropy, divided by the number of objects; classes that an image is not labelled for count 0."""
        logits = outputs.logits.float()
        height, width = logits.shape[-2:]
        truth, weight = torch.zeros_like(logits), torch.ones_like(logits)
        for index, target in enumerate(targets):
            x, y = (target.boxes[:, :2] * target.boxes.new_tensor([width, height])).long().unbind(1)
            truth[index, target.labels, y.clamp(max=height - 1), x.clamp(max=width - 1)] = 1
            if target.labelled_classes is not None:
                weight[index] *= target.labelled_classes[:, None, None]
        loss = F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum")
        return {"heatmap": loss / truth.sum().clamp(min=1)}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The local maxima of the heatmap, each as a box of one grid cell."""
        chances = outputs["logits"].float().sigmoid()
        peaks = torch.where(chances == F.max_pool2d(chances, 3, stride=1, padding=1), chances, 0.0)
        return [self._centers(image, size, threshold) for image, size in zip(peaks, sizes)]

    def _centers(self, peaks: Tensor, size: tuple[int, int], threshold: float) -> Instances:
        height, width = peaks.shape[-2:]
        scores, order = peaks.flatten().topk(min(self.config.num_centers, peaks.numel()))
        y, x = order // width % height, order % width
        cells = torch.stack((x, y, x + 1, y + 1), dim=1).float().cpu()
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        found = Instances(
            boxes=(cells * scale).numpy(),
            scores=scores.cpu().numpy(),
            labels=(order // (height * width)).cpu().numpy(),
            size=size,
            categories=self.categories,
        )
        return found.filter(found.scores >= threshold)

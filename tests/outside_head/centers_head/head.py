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
from mvision.structures.transfer import to_device, to_host


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
        # On the CPU, where the labels are, and from there in one copy, which the CPU does not wait for.
        truth, weight = torch.zeros(logits.shape), torch.ones(logits.shape)
        for index, target in enumerate(targets):
            x, y = (target.boxes[:, :2] * torch.tensor([width, height])).long().unbind(1)
            truth[index, target.labels, y.clamp(max=height - 1), x.clamp(max=width - 1)] = 1
            if target.labelled_classes is not None:
                weight[index] *= target.labelled_classes[:, None, None]
        moved = to_device({"truth": truth, "weight": weight}, logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, moved["truth"], moved["weight"], reduction="sum")
        return {"heatmap": loss / max(1.0, float(truth.sum()))}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The local maxima of the heatmap, each as a box of one grid cell."""
        chances = outputs["logits"].float().sigmoid()
        peaks = torch.where(chances == F.max_pool2d(chances, 3, stride=1, padding=1), chances, 0.0)
        scores, order = peaks.flatten(1).topk(min(self.config.num_centers, peaks[0].numel()))
        host = to_host({"scores": scores, "order": order})  # fixed shapes, so there is one copy for the whole batch
        shape = (peaks.shape[-2], peaks.shape[-1])
        images = zip(host["scores"], host["order"], sizes)
        return [self._centers(*image, shape).filter(image[0].numpy() >= threshold) for image in images]

    def _centers(self, scores: Tensor, order: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Instances:
        height, width = shape
        y, x = order // width % height, order % width
        cells = torch.stack((x, y, x + 1, y + 1), dim=1).float()
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        return Instances(
            boxes=(cells * scale).numpy(),
            scores=scores.numpy(),
            labels=(order // (height * width)).numpy(),
            size=size,
            categories=self.categories,
        )

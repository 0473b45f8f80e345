"""Semantic segmentation: a class for every pixel, by segmentation-models-pytorch's FPN decoder on the neck's maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.losses import MULTICLASS_MODE, DiceLoss, FocalLoss
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.evaluation import SemanticMetric
from mvision.heads.base import Head
from mvision.settings import MAX_WIDTH, Replacement, Settings
from mvision.structures import Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.masks import Masks, encode_mask

STRIDE = 4  # of the decoder's result
STRIDES = (8, 16, 32)  # of the neck's maps; the decoder cannot take others
DROPOUT = 0.1  # of whole channels, before the last layer
FOCAL_WEIGHT, DICE_WEIGHT = 2.0, 1.0
GAMMA = 1.0  # of the focal loss
IGNORED = -1  # class of pixels that have no loss


class SemanticConfig(Settings):
    """Settings of the semantic head.

    Attributes:
        pyramid_dim: channels of the decoder's pyramid.
        embed_dim: channels of its result; a multiple of 32, the number of groups of its norms.
    """

    pyramid_dim: int = Field(128, gt=0, le=MAX_WIDTH)
    embed_dim: int = Field(64, gt=0, le=MAX_WIDTH, multiple_of=32)

    retired = {
        "dropout": [Replacement(0.1)],
        "focal_weight": [Replacement(2.0)],
        "dice_weight": [Replacement(1.0)],
        "gamma": [Replacement(1.0)],
    }


class SemanticOutputs(NamedTuple):
    """Training outputs: ``logits`` (B, C + 1, h, w) before the softmax."""

    logits: Tensor


class SemanticHead(Head[SemanticConfig, SemanticOutputs]):
    """One of C + 1 classes for every pixel: 0 is the background, label + 1 a class of the model.

    Outputs: ``logits`` (B, C + 1, h, w) before the softmax, on a grid of stride 4; in training ``SemanticOutputs``. The
    ground truth is made from the masks of objects, see ``class_map``.

    Raises:
        UserError: the neck's maps do not have the strides 8, 16 and 32.
    """

    Config = SemanticConfig
    needs = frozenset({"boxes", "masks"})
    evaluator = SemanticMetric
    primary_metric = "mIoU"
    kind = "regions"

    def build(self) -> None:
        """See ``Head.build``."""
        config, channels = self.config, self.channels
        if tuple(self.strides) != STRIDES:
            others = ", ".join(map(str, self.strides))
            raise UserError(f"semantic-seg: made for maps of the strides 8, 16 and 32, this model has {others}")
        # Without the backbone's map of stride 4 the decoder gets the neck's finest map, enlarged, in its place.
        levels = [channels[0] if self.lateral_dim is None else self.lateral_dim, *channels]
        self.decoder = FPNDecoder(
            levels, pyramid_channels=config.pyramid_dim, segmentation_channels=config.embed_dim, dropout=DROPOUT
        )
        self.classify = nn.Conv2d(config.embed_dim, len(self.categories) + 1, 1)
        self.focal = FocalLoss(MULTICLASS_MODE, gamma=GAMMA, ignore_index=IGNORED)
        self.dice = DiceLoss(MULTICLASS_MODE, ignore_index=IGNORED)

    @classmethod
    def lateral_stride(cls, config: SemanticConfig) -> int | None:
        """The decoder's finest input."""
        return STRIDE

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | SemanticOutputs:
        """See ``Head.forward``."""
        if lateral is None:
            lateral = F.interpolate(maps[0], scale_factor=2.0, mode="nearest")
        logits = self.classify(self.decoder([lateral, *maps]))
        return {"logits": logits} if targets is None else SemanticOutputs(logits)

    def loss(self, outputs: SemanticOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """``focal`` and ``dice``, zero where no pixel of the batch is labelled."""
        logits = outputs.logits.float()
        gt = torch.stack([class_map(target, (logits.shape[-2], logits.shape[-1])) for target in targets])
        gt = gt.to(logits.device)
        if not (gt != IGNORED).any():
            return {"focal": 0 * logits.sum(), "dice": 0 * logits.sum()}
        return {"focal": FOCAL_WEIGHT * self.focal(logits, gt), "dice": DICE_WEIGHT * self.dice(logits, gt)}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """One entry for every class that is predicted in the image: a mask of all its pixels and the box around them.

        Its score is the mean of the class's probability over the pixels where that is the largest.
        """
        return [self._regions(logits, size, threshold) for logits, size in zip(outputs["logits"].float(), sizes)]

    def _regions(self, logits: Tensor, size: tuple[int, int], threshold: float) -> Instances:
        probabilities, pred = logits.softmax(0), logits.argmax(0)
        present = [index for index in pred.unique().tolist() if index > 0]
        scores = {index: probabilities[index][pred == index].mean().item() for index in present}
        regions = []
        labels = likeliest_class(logits, [0, *present], size) if present else None
        for index in sorted(present, key=lambda index: -scores[index]):
            mask = (labels == index).astype(np.uint8)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if scores[index] >= threshold and len(rows):
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                regions.append((box, scores[index], index - 1, encode_mask(mask)))
        boxes, values, classes, masks = zip(*regions) if regions else ((), (), (), ())
        return Instances(
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            scores=np.array(values, dtype=np.float32),
            labels=np.array(classes, dtype=np.int64),
            size=size,
            categories=self.categories,
            masks=Masks(masks, size),
        )


def likeliest_class(logits: Tensor, classes: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """(H, W) int64: for every pixel that of ``classes`` with the largest logit, interpolated bilinearly to ``size``.

    Args:
        logits: (C + 1, h, w).
        classes: indices into the logits, at least one.
        size: H and W.

    Only one class at a time is interpolated: all classes together need too much memory for a large photo.
    """
    best = torch.full(size, -torch.inf, dtype=logits.dtype, device=logits.device)
    labels = torch.full(size, classes[0], device=logits.device)
    for index in classes:
        values = F.interpolate(logits[None, None, index], size=size, mode="bilinear", align_corners=False)[0, 0]
        labels = torch.where(values > best, index, labels)
        best = torch.maximum(values, best)
    return labels.cpu().numpy()


@torch.no_grad()
def class_map(target: Targets, size: tuple[int, int]) -> Tensor:
    """The ground truth of an image, (h, w) int64.

    It is label + 1 where an object's mask is (of overlapping masks the smallest counts), ``IGNORED`` in the boxes of
    objects without a mask, and elsewhere 0. If not all classes are labelled in the image, it is ``IGNORED`` there too:
    these pixels may belong to one of the others.
    """
    all_labelled = target.labelled_classes is None or bool(target.labelled_classes.all())
    elsewhere = 0 if all_labelled else IGNORED
    if target.masks is None or not len(target):
        return torch.full(size, IGNORED if len(target) else elsewhere)
    gt = torch.full(size, elsewhere)
    masks = F.interpolate(target.masks[None].float(), size=size, mode="nearest")[0].bool().cpu()
    height, width = size
    corners = cxcywh_to_xyxy(target.boxes.cpu()) * torch.tensor([width, height, width, height])
    without_mask = ~target.masks.bool().flatten(1).any(1).cpu()
    for left, top, right, bottom in corners[without_mask].tolist():
        gt[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = IGNORED
    for index in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        gt[masks[index]] = int(target.labels[index]) + 1
    return gt

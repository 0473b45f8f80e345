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
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.masks import Masks, encode_mask

STRIDE = 4  # of the decoder's result
STRIDES = (8, 16, 32)  # of the neck's maps that the decoder is made for
UNKNOWN = -1  # in the truth: pixels that nothing is taught about


class SemanticConfig(Settings):
    """Settings of the semantic head.

    Attributes:
        pyramid_dim: channels of the decoder's pyramid.
        embed_dim: channels of its result; a multiple of 32, as its group norms ask for.
        dropout: of whole channels before the last layer.
        focal_weight, dice_weight: of the loss terms.
        gamma: of the focal loss; 0 is cross-entropy.
    """

    pyramid_dim: int = Field(128, gt=0)
    embed_dim: int = Field(64, gt=0, multiple_of=32)
    dropout: float = Field(0.1, ge=0, lt=1)
    focal_weight: float = Field(2.0, ge=0)
    dice_weight: float = Field(1.0, ge=0)
    gamma: float = Field(1.0, ge=0)


class SemanticOutputs(NamedTuple):
    """What the loss reads: ``logits`` (B, C + 1, h, w) before the softmax."""

    logits: Tensor


class SemanticHead(Head[SemanticConfig, SemanticOutputs]):
    """A map of classes, the first of which is "nothing of these".

    Outputs: ``logits`` (B, C + 1, h, w) before the softmax, on a grid of stride 4. It learns from the masks of objects:
    where they overlap, the smaller one is seen; the box of an object without a mask teaches nothing.

    Raises:
        UserError: the neck's maps do not have the strides 8, 16 and 32.
    """

    Config = SemanticConfig
    needs = frozenset({"boxes", "masks"})
    evaluator = SemanticMetric
    primary_metric = "mIoU"
    kind = "regions"

    def __init__(
        self,
        config: SemanticConfig,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        super().__init__(config, channels, strides, categories, lateral)
        if tuple(strides) != STRIDES:
            found = ", ".join(map(str, strides))
            raise UserError(f"semantic-seg: made for maps of the strides 8, 16 and 32, this model has {found}")
        # Without the backbone's map of stride 4 the finest of the neck's, enlarged, takes its place.
        levels = [channels[0] if lateral is None else lateral, *channels]
        self.decoder = FPNDecoder(
            levels, pyramid_channels=config.pyramid_dim, segmentation_channels=config.embed_dim, dropout=config.dropout
        )
        self.classify = nn.Conv2d(config.embed_dim, len(categories) + 1, 1)
        self.focal = FocalLoss(MULTICLASS_MODE, gamma=config.gamma, ignore_index=UNKNOWN)
        self.dice = DiceLoss(MULTICLASS_MODE, ignore_index=UNKNOWN)

    @classmethod
    def lateral_stride(cls, config: SemanticConfig) -> int | None:
        """The finest map of the decoder."""
        return STRIDE

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | SemanticOutputs:
        """Logits of every class and of none."""
        if lateral is None:
            lateral = F.interpolate(maps[0], scale_factor=2.0, mode="nearest")
        logits = self.classify(self.decoder([lateral, *maps]))
        return {"logits": logits} if targets is None else SemanticOutputs(logits)

    def loss(self, outputs: SemanticOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """``focal`` and ``dice``, zero where no pixel is labelled."""
        logits = outputs.logits.float()
        truth = torch.stack([class_map(target, (logits.shape[-2], logits.shape[-1])) for target in targets])
        truth = truth.to(logits.device)
        if not (truth != UNKNOWN).any():
            return {"focal": 0 * logits.sum(), "dice": 0 * logits.sum()}
        config = self.config
        return {
            "focal": config.focal_weight * self.focal(logits, truth),
            "dice": config.dice_weight * self.dice(logits, truth),
        }

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """One entry for every class that is in the image, with the mask of all its pixels and a box around it.

        Its score is the mean probability of the class where it is the likeliest.
        """
        return [self._regions(logits, size, threshold) for logits, size in zip(outputs["logits"].float(), sizes)]

    def _regions(self, logits: Tensor, size: tuple[int, int], threshold: float) -> Instances:
        chances, winner = logits.softmax(0), logits.argmax(0)
        present = [index for index in winner.unique().tolist() if index > 0]
        scores = {index: chances[index][winner == index].mean().item() for index in present}
        found = []
        labels = likeliest_class(logits, [0, *present], size) if present else None
        for index in sorted(present, key=lambda index: -scores[index]):
            mask = (labels == index).astype(np.uint8)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if scores[index] >= threshold and len(rows):
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                found.append((box, scores[index], index - 1, encode_mask(mask)))
        boxes, values, classes, masks = zip(*found) if found else ((), (), (), ())
        return Instances(
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            scores=np.array(values, dtype=np.float32),
            labels=np.array(classes, dtype=np.int64),
            size=size,
            categories=self.categories,
            masks=Masks(masks, size),
        )


def likeliest_class(logits: Tensor, classes: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """(H, W) int64: of ``classes`` the one whose logits, interpolated to ``size``, are largest.

    One class after the other: all of them together on a photo of twelve megapixels would fill the memory.
    """
    best = labels = None
    for index in classes:
        values = F.interpolate(logits[None, None, index], size=size, mode="bilinear", align_corners=False)[0, 0]
        if best is None or labels is None:
            best, labels = values, torch.full(size, index, device=logits.device)
            continue
        labels = torch.where(values > best, index, labels)
        best = torch.maximum(values, best)
    assert labels is not None
    return labels.cpu().numpy()


@torch.no_grad()
def class_map(target: Targets, size: tuple[int, int]) -> Tensor:
    """(h, w) int64: 0 for no class, label + 1 for the pixels of objects, ``UNKNOWN`` where nothing is known."""
    # Where not all classes were looked for, what is not labelled may be one of the others.
    beside = 0 if target.labelled_classes is None or bool(target.labelled_classes.all()) else UNKNOWN
    if target.masks is None or not len(target):
        return torch.full(size, UNKNOWN if len(target) else beside)
    truth = torch.full(size, beside)
    masks = F.interpolate(target.masks[None].float(), size=size, mode="nearest")[0].bool().cpu()
    height, width = size
    corners = cxcywh_to_xyxy(target.boxes.cpu()) * torch.tensor([width, height, width, height])
    unmasked = ~target.masks.bool().flatten(1).any(1).cpu()
    for left, top, right, bottom in corners[unmasked].tolist():
        truth[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = UNKNOWN
    for index in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        truth[masks[index]] = int(target.labels[index]) + 1
    return truth

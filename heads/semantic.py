"""Semantic segmentation: a class for every pixel, by segmentation-models-pytorch's FPN decoder on the neck's maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pydantic import Field
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.evaluation import SemanticMetric
from mvision.heads.base import Head
from mvision.settings import MAX_WIDTH, Replacement, Settings
from mvision.structures import Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.masks import Masks, RunLengths
from mvision.structures.run_lengths import encode_labels, same_size
from mvision.structures.transfer import to_device, to_host

STRIDE = 4  # of the decoder's result
STRIDES = (8, 16, 32)  # of the neck's maps; the decoder cannot take others
DROPOUT = 0.1  # of whole channels, before the last layer
FOCAL_WEIGHT, DICE_WEIGHT = 2.0, 1.0
GAMMA = 1.0  # of the focal loss
IGNORED = -1  # class of pixels that have no loss
UNKNOWN = -2  # class of pixels that are background or one of the classes that are not labelled in their image


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
    weighs_classes = True

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
        gt = np.stack([class_map(target, (logits.shape[-2], logits.shape[-1])) for target in targets])
        if not (gt != IGNORED).any():
            return {"focal": 0 * logits.sum(), "dice": 0 * logits.sum()}
        on_cpu = {"gt": torch.from_numpy(gt)}
        if (gt == UNKNOWN).any():
            on_cpu["excluded"] = torch.stack([_labelled(target, logits.shape[1]) for target in targets])
        on_device = to_device(on_cpu, logits.device)
        focal, dice = focal_and_dice(logits, on_device["gt"], self.class_weights, on_device.get("excluded"))
        return {"focal": FOCAL_WEIGHT * focal, "dice": DICE_WEIGHT * dice}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """One entry for every class that is predicted in the image: a mask of all its pixels and the box around them.

        Its score is the mean of the class's probability over the pixels where that is the largest.
        """
        logits = outputs["logits"].float()
        scores = class_scores(logits)
        kept = [{index: score for index, score in found.items() if index and score >= threshold} for found in scores]
        masks: list[dict[int, RunLengths]] = [{} for _ in kept]
        wanted = [number for number, found in enumerate(kept) if found]
        parts = list(same_size([sizes[number] for number in wanted], logits.device))
        groups = [[wanted[place] for place in places] for places, _ in parts]
        # Classes below the threshold take part too: the others do not grow into their place.
        maps = likeliest_classes(logits, [list(found) for found in scores], groups, [size for _, size in parts])
        for numbers, encoded in zip(groups, encode_labels(maps)):
            for number, of_image in zip(numbers, encoded):
                masks[number] = of_image
        return [self._regions(*each) for each in zip(kept, masks, sizes)]

    def _regions(self, scores: dict[int, float], masks: dict[int, RunLengths], size: tuple[int, int]) -> Instances:
        """The regions of one image, from the scores and masks of its classes; some have no pixel at this size."""
        found = [index for index in sorted(scores, key=lambda index: -scores[index]) if index in masks]
        boxes = np.array([coco_mask.toBbox(masks[index]) for index in found], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return Instances(
            boxes=boxes,
            scores=np.array([scores[index] for index in found], dtype=np.float32),
            labels=np.array(found, dtype=np.int64) - 1,
            size=size,
            categories=self.categories,
            masks=Masks((masks[index] for index in found), size),
        )


def focal_and_dice(
    logits: Tensor, gt: Tensor, class_weights: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The focal loss of every class against all others (Lin et al., 2017), and the Dice loss (Milletari et al., 2016).

    Both are those of segmentation-models-pytorch, the focal one the mean over labelled pixels and classes, Dice the
    mean over classes of one minus the score, 0 for a class without a pixel. That library's select pixels class by
    class, so that the CPU would wait for a GPU as often as there are classes.

    An ``UNKNOWN`` pixel is none of the classes that are labelled in its image, and one of the others, it is not known
    which: in the focal loss these are one class, whose odds are the sum of theirs. In Dice such pixels do not count.

    Args:
        logits: (B, C, h, w) before the softmax.
        gt: (B, h, w) int64 in 0..C - 1, ``IGNORED`` or ``UNKNOWN``; at least one pixel is not ``IGNORED``.
        class_weights: (C - 1,) how much a pixel of each class counts in the mean that the focal loss is; the background
            counts 1. None: 1 for all. Dice is not weighted: in it every class counts as much as any other.
        excluded: (B, C) bool: the classes that an ``UNKNOWN`` pixel of an image cannot have; never the background.
            None: there are no such pixels.
    """
    valid = (gt != IGNORED)[:, None]
    is_class = gt[:, None] == torch.arange(logits.shape[1], device=gt.device)[:, None, None]
    target = is_class.to(logits.dtype)
    focal = _focal(F.binary_cross_entropy_with_logits(logits, target, reduction="none"))
    if excluded is not None:
        others = excluded[..., None, None]
        either_class = _focal(F.softplus(-logits.masked_fill(others, -torch.inf).logsumexp(1)))
        unknown = (gt == UNKNOWN)[:, None]
        focal = torch.where(unknown & ~others, 0, focal)
        # Their term stands in the channel of the background, which is always one of them.
        focal = torch.cat((torch.where(unknown, either_class[:, None], focal[:, :1]), focal[:, 1:]), dim=1)
    if class_weights is None:
        focal = torch.where(valid, focal, 0).sum() / (valid.sum() * logits.shape[1])
    else:
        of_classes = F.pad(class_weights.to(logits.dtype), (1, 0), value=1.0)
        weights = torch.where(valid, of_classes[gt.clamp(min=0)][:, None], 0)
        focal = (weights * focal).sum() / (weights.sum() * logits.shape[1])
    prob = torch.where((gt >= 0)[:, None], logits.softmax(1), 0)
    both, either = (prob * target).sum((0, 2, 3)), prob.sum((0, 2, 3)) + target.sum((0, 2, 3))
    dice = 1 - 2 * both / either.clamp(min=1e-7)
    return focal, torch.where(is_class.any(3).any(2).any(0), dice, 0).mean()


def _focal(cross_entropy: Tensor) -> Tensor:
    return (1 - torch.exp(-cross_entropy)) ** GAMMA * cross_entropy


def _labelled(target: Targets, channels: int) -> Tensor:
    """(channels,) bool: the classes that are labelled in an image; the background, at 0, is not."""
    labelled = torch.zeros(channels, dtype=torch.bool)
    labelled[1:] = True if target.labelled_classes is None else target.labelled_classes.cpu()
    return labelled


def class_scores(logits: Tensor) -> list[dict[int, float]]:
    """For every image the classes that are the likeliest somewhere, with the mean of their probabilities there.

    Args:
        logits: (B, C + 1, h, w) float32.
    """
    best = logits.argmax(1).flatten(1)
    # In float64 (which Apple's GPUs lack) the order in which a GPU adds does not show.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    highest = logits.softmax(1).amax(1).flatten(1).to(exact)
    zeros = highest.new_zeros(len(logits), logits.shape[1])
    sums, counts = zeros.scatter_add(1, best, highest), zeros.scatter_add(1, best, torch.ones_like(highest))
    found = to_host({"sums": sums, "counts": counts})
    means = (found["sums"] / found["counts"]).float().tolist()
    return [
        {index: row[index] for index in np.flatnonzero(n).tolist()} for row, n in zip(means, found["counts"].numpy())
    ]


def likeliest_classes(
    logits: Tensor, classes: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """For every pixel of an image the likeliest class, of background and those that are the likeliest in some cell.

    Args:
        logits: (B, C + 1, h, w); they are interpolated bilinearly.
        classes: of each of the B images, the indices of the classes that take part.
        groups: images of one size each, as indices into the batch.
        sizes: height and width H, W of each group.

    Returns:
        (N, H, W) int32 for each group of N images.

    Only one class at a time is interpolated: all classes together need too much memory for a large photo.
    """
    present = np.zeros(logits.shape[:2], dtype=bool)
    present[:, 0] = True
    for row, found in zip(present, classes):
        row[list(found)] = True
    numbers = np.array([number for group in groups for number in group], dtype=np.int64)
    on_device = to_device({"numbers": torch.from_numpy(numbers), "present": torch.from_numpy(present)}, logits.device)
    maps = []
    for group, chosen, size in zip(groups, on_device["numbers"].split([len(group) for group in groups]), sizes):
        mine, allowed = logits.index_select(0, chosen), on_device["present"].index_select(0, chosen)
        best = torch.full((len(group), *size), -torch.inf, dtype=logits.dtype, device=logits.device)
        labels = torch.zeros((len(group), *size), dtype=torch.int32, device=logits.device)
        for index in np.flatnonzero(present[list(group)].any(0)).tolist():
            values = F.interpolate(mine[:, index, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            better = (values > best).logical_and_(allowed[:, index, None, None])
            labels.masked_fill_(better, index)
            best = torch.where(better, values, best)
        maps.append(labels)
    return maps


def class_map(target: Targets, size: tuple[int, int]) -> np.ndarray:
    """The ground truth of an image, (h, w) int64, made on the CPU.

    It is label + 1 where an object's mask is (of overlapping masks the smallest counts), ``IGNORED`` in the boxes of
    objects without a mask and in crowd regions, and elsewhere 0. If not all classes are labelled in the image, it is
    ``UNKNOWN`` there: these pixels are background or belong to one of the others. If none is, it is ``IGNORED``.
    """
    labelled = np.ones(1, bool) if target.labelled_classes is None else target.labelled_classes.cpu().numpy()
    elsewhere = 0 if labelled.all() else UNKNOWN if labelled.any() else IGNORED
    if target.masks is None and len(target):
        return np.full(size, IGNORED)
    gt = np.full(size, elsewhere)
    if target.ignored is not None:
        gt[_at_size(target.ignored[None], size)[0]] = IGNORED
    if target.masks is None or not len(target):
        return gt
    masks, small = target.masks.cpu().numpy(), _at_size(target.masks, size)
    height, width = size
    corners = cxcywh_to_xyxy(target.boxes.cpu()).numpy() * np.array([width, height, width, height], np.float32)
    without_mask = ~masks.reshape(len(masks), -1).any(1)
    for left, top, right, bottom in corners[without_mask].tolist():
        gt[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = IGNORED
    labels = target.labels.cpu().numpy()
    for index in np.argsort(-small.sum((1, 2)), kind="stable"):
        gt[small[index]] = labels[index] + 1
    return gt


def _at_size(masks: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(N, h, w) masks at another size, bool: of each cell the pixel at its corner."""
    rows, columns = (np.arange(side) * full // side for side, full in zip(size, masks.shape[1:]))
    return masks.cpu().numpy()[:, rows[:, None], columns].astype(bool)

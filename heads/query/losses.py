"""Loss terms of set prediction, of all layers and kinds of predictions at once, at the pairs that matching.py finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.query.matching import PaddedTargets, Pairs
from mvision.structures.boxes import cxcywh_to_xyxy, iou


@dataclass
class LossSet:
    """Predictions of one kind, such as those of the denoising queries, and what they are compared with.

    Attributes:
        logits: (L, B, N, C) before the sigmoid, of N predictions in each of L layers.
        boxes: (L, B, N, 4) cxcywh in 0..1.
        pairs: of predictions and objects; all other predictions have to be of no object.
        total: number that the sums over the batch are divided by.
        suffixes: of the names of each layer's terms, L strings.
    """

    logits: Tensor
    boxes: Tensor
    pairs: Pairs
    total: float | Tensor
    suffixes: Sequence[str]


def set_losses(
    sets: Sequence[LossSet],
    targets: PaddedTargets,
    kind: Literal["vfl", "mal"] = "vfl",
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> dict[str, Tensor]:
    """Class, L1 and GIoU terms of every layer of every set.

    The predictions of all sets are put one below the other, so that several sets take as many operators as one.

    Args:
        kind, alpha, gamma: of the class term, see ``quality_focal``.

    Returns:
        ``class``, ``box`` (L1) and ``giou``, each with one number per layer, set after set. A class that is not
        labelled in an image (``targets.labelled_classes``) has a loss only at predictions that an object of it is
        assigned to.
    """
    lengths = [len(one.suffixes) for one in sets]
    logits = torch.cat([one.logits.flatten(0, 2) for one in sets])
    boxes = torch.cat([one.boxes.flatten(0, 2) for one in sets])
    row, layer, gt_row, counted = _pair_rows(sets, targets.labels.shape[1])
    pred_boxes, gt_boxes = boxes.index_select(0, row), targets.boxes.flatten(0, 1).index_select(0, gt_row)
    box_iou, giou = iou(cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(gt_boxes))
    values = torch.stack(((pred_boxes - gt_boxes).abs().sum(-1), 1 - giou))
    if counted is not None:
        values = torch.where(counted, values, 0)
    box_sums = values.new_zeros(2, sum(lengths)).index_add(1, layer, values)

    labels = targets.labels.flatten().index_select(0, gt_row)
    labelled = _labelled_rows(sets, targets.labelled_classes)
    loss = quality_focal(logits, (row, labels), box_iou.detach(), kind, alpha, gamma, labelled, counted)
    of_sets = loss.split([one.logits[..., 0].numel() for one in sets])
    class_sums = torch.cat([part.view(length, -1).sum(1) for part, length in zip(of_sets, lengths)])
    sums = torch.cat((class_sums[None], box_sums)).split(lengths, 1)
    terms = torch.cat([part / one.total for part, one in zip(sums, sets)], 1)
    return dict(zip(("class", "box", "giou"), terms))


def _pair_rows(sets: Sequence[LossSet], most: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of every pair of all sets, its row among the predictions, its layer, its object's row, and whether it counts.

    All are int64 (P,) but the last, which is bool, or None if all count; ``most`` is the number of objects of an image.
    """
    rows, layers, start, first = [], [], 0, 0
    for one in sets:
        length, batch, number, _ = one.logits.shape
        row = torch.add(one.pairs.query, torch.add(one.pairs.image, one.pairs.layer, alpha=batch), alpha=number)
        rows.append(row + start if start else row)
        layers.append(one.pairs.layer + first if first else one.pairs.layer)
        start, first = start + length * batch * number, first + length
    image, index = (torch.cat(values) for values in zip(*((one.pairs.image, one.pairs.object) for one in sets)))
    counted = None
    if any(one.pairs.counted is not None for one in sets):
        all_count = torch.ones(max(map(len, rows)), dtype=torch.bool, device=image.device)
        counted = torch.cat(
            [all_count[: len(row)] if one.pairs.counted is None else one.pairs.counted for one, row in zip(sets, rows)]
        )
    return torch.cat(rows), torch.cat(layers), torch.add(index, image, alpha=most), counted


def _labelled_rows(sets: Sequence[LossSet], labelled: Tensor | None) -> Tensor | None:
    """Which classes are labelled in the image of every prediction of all sets: (rows, C) or (rows, 1) bool."""
    if labelled is None:
        return None
    return torch.cat([labelled[:, None].expand(*one.logits.shape[:3], -1).flatten(0, 2) for one in sets])


def quality_focal(
    logits: Tensor,
    index: tuple[Tensor, ...],
    quality: Tensor,
    kind: Literal["vfl", "mal"],
    alpha: float,
    gamma: float,
    labelled: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Element-wise classification loss whose target is the quality of a positive's prediction (IoU or OKS).

    Args:
        logits: (..., C) before the sigmoid.
        index: the P positives among them, as indices into every dimension, each (P,).
        quality: (P,) in 0..1, of their predictions.
        kind: ``vfl`` is the varifocal loss (Zhang et al., "VarifocalNet", CVPR 2021, equation 2); ``mal`` the
            matchability-aware loss (Huang et al., "DEIM", CVPR 2025, equation 3, gamma 1.5 in the paper).
        alpha: weight of negatives in ``vfl``.
        gamma: exponent of the probability in the weight of negatives; in ``mal`` also of the quality.
        labelled: bool, of a shape that can be broadcast to that of ``logits``, see ``Targets.labelled_classes``: where
            it is False, negatives have no loss. None: all are labelled.
        counted: (P,) bool, which of the P are positives; the others may have the index of one that is. None: all.
    """
    target, is_positive = _class_targets(logits, index, quality, counted)
    logits = logits.to(quality.dtype)
    prob = logits.detach().sigmoid()
    if kind == "vfl":
        weight = torch.where(is_positive, target, alpha * prob**gamma)
    else:
        weight = torch.where(is_positive, torch.ones_like(prob), prob**gamma)
        target = target**gamma
    loss = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")
    return loss if labelled is None else torch.where(labelled | is_positive, loss, 0)


def _class_targets(
    logits: Tensor, index: tuple[Tensor, ...], quality: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The quality wanted at every logit, 0 for negatives, and which logits are positives."""
    shape, size = logits.shape, logits.numel()
    flat = index[0]
    for length, further in zip(shape[1:], index[1:]):
        flat = torch.add(further, flat, alpha=length)
    if counted is not None:
        # What does not count is written behind the end: at its own place it could overwrite a positive.
        flat = torch.where(counted, flat, size)
    target = quality.new_zeros(size + 1)
    target[flat] = quality
    # Not by an assignment of True, for which the CPU waits: it would copy that value to a GPU.
    is_positive = torch.zeros(size + 1, dtype=torch.bool, device=logits.device).index_fill_(0, flat.flatten(), True)
    return target[:size].view(shape), is_positive[:size].view(shape)

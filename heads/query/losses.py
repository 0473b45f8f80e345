"""Loss terms of set prediction, of all layers and kinds of predictions at once, at the pairs that matching.py finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.query.matching import PaddedTargets, Pairs
from mvision.structures.boxes import cxcywh_to_xyxy, iou, plain_iou


@dataclass
class LossSet:
    """Predictions of one kind, such as those of the denoising queries, and what they are compared with.

    Attributes:
        logits: (L, B, N, C) before the sigmoid, of N predictions in each of L layers.
        boxes: (L, B, N, 4) cxcywh in 0..1.
        pairs: of predictions and objects; all other predictions have to be of no object.
        total: number that the sums over the batch are divided by.
        suffixes: of the names of each layer's terms, L strings.
        box_pairs, box_total: in place of ``pairs`` and ``total`` for all terms but the class term; None: the same.
        corners: (F, B, N, 4 * (bins + 1)) logits of the box distributions of the first F layers, see fine_grained.py;
            None: boxes are predicted directly.
        initial: (B, N, 4) cxcywh in 0..1, the boxes that the distributions are relative to; None without them.
    """

    logits: Tensor
    boxes: Tensor
    pairs: Pairs
    total: float | Tensor
    suffixes: Sequence[str]
    box_pairs: Pairs | None = None
    box_total: float | Tensor | None = None
    corners: Tensor | None = None
    initial: Tensor | None = None

    @property
    def of_boxes(self) -> tuple[Pairs, float | Tensor]:
        """The pairs and the divisor of the box terms."""
        return self.box_pairs or self.pairs, self.total if self.box_total is None else self.box_total


def set_losses(
    sets: Sequence[LossSet],
    targets: PaddedTargets,
    kind: Literal["vfl", "mal"] = "vfl",
    alpha: float = 0.75,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Class, L1 and GIoU terms of every layer of every set.

    The predictions of all sets are put one below the other, so that several sets take as many operators as one.

    Args:
        kind, alpha, gamma, class_weights: of the class term, see ``quality_focal``.

    Returns:
        ``class``, ``box`` (L1) and ``giou``, each with one number per layer, set after set. A class that is not
        labelled in an image (``targets.labelled_classes``) has a loss only at predictions that an object of it is
        assigned to.
    """
    lengths = [len(one.suffixes) for one in sets]
    logits = torch.cat([one.logits.flatten(0, 2) for one in sets])
    boxes = torch.cat([one.boxes.flatten(0, 2) for one in sets])
    most = targets.labels.shape[1]
    shapes = [one.logits.shape for one in sets]
    own = of_boxes = pair_rows(shapes, [one.pairs for one in sets], most)
    if any(one.box_pairs is not None for one in sets):
        of_boxes = pair_rows(shapes, [one.of_boxes[0] for one in sets], most)
    box_iou, box_sums = _box_sums(boxes, of_boxes, targets.boxes, sum(lengths))
    quality = box_iou if own is of_boxes else _pair_iou(boxes, own, targets.boxes)
    labels = targets.labels.flatten().index_select(0, own.gt_row)
    labelled = labelled_rows(shapes, targets.labelled_classes)
    loss = quality_focal(logits, (own.row, labels), quality, kind, alpha, gamma, labelled, own.counted, class_weights)
    of_sets = loss.split([one.logits[..., 0].numel() for one in sets])
    class_sums = torch.cat([part.view(length, -1).sum(1) for part, length in zip(of_sets, lengths)])
    sums = torch.cat((class_sums[None], box_sums)).split(lengths, 1)
    terms = torch.cat([_divided(part, one) for part, one in zip(sums, sets)], 1)
    return dict(zip(("class", "box", "giou"), terms))


def _divided(sums: Tensor, one: LossSet) -> Tensor:
    """The terms (3, L) of a set from its sums."""
    if one.box_total is None:
        return sums / one.total
    return torch.cat((sums[:1] / one.total, sums[1:] / one.box_total))


class PairRows(NamedTuple):
    """The P pairs of all sets: rows among the predictions and among the objects, layers, and which pairs count.

    All are int64 (P,) but ``counted``, which is bool, or None if all count.
    """

    row: Tensor
    layer: Tensor
    gt_row: Tensor
    counted: Tensor | None


def pair_rows(shapes: Sequence[torch.Size], pairs_of_sets: Sequence[Pairs], most: int) -> PairRows:
    """The rows of these pairs of every set; ``most`` is the number of (padded) objects of an image.

    Args:
        shapes: (L, B, N, ...) of each set's predictions.
    """
    rows, layers, start, first = [], [], 0, 0
    for (length, batch, number, *_), pairs in zip(shapes, pairs_of_sets):
        row = torch.add(pairs.query, torch.add(pairs.image, pairs.layer, alpha=batch), alpha=number)
        rows.append(row + start if start else row)
        layers.append(pairs.layer + first if first else pairs.layer)
        start, first = start + length * batch * number, first + length
    image, index = (torch.cat(values) for values in zip(*((pairs.image, pairs.object) for pairs in pairs_of_sets)))
    counted = None
    if any(pairs.counted is not None for pairs in pairs_of_sets):
        all_count = torch.ones(max(map(len, rows)), dtype=torch.bool, device=image.device)
        of_sets = [all_count[: len(pairs.layer)] if pairs.counted is None else pairs.counted for pairs in pairs_of_sets]
        counted = torch.cat(of_sets)
    return PairRows(torch.cat(rows), torch.cat(layers), torch.add(index, image, alpha=most), counted)


def _box_sums(boxes: Tensor, pairs: PairRows, gt_boxes: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """The IoU (P,) of the pairs, without a gradient, and the sums (2, layers) of their L1 and GIoU terms."""
    pred_boxes = boxes.index_select(0, pairs.row)
    gt_boxes = gt_boxes.flatten(0, 1).index_select(0, pairs.gt_row)
    box_iou, giou = iou(cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(gt_boxes))
    values = torch.stack(((pred_boxes - gt_boxes).abs().sum(-1), 1 - giou))
    if pairs.counted is not None:
        values = torch.where(pairs.counted, values, 0)
    return box_iou.detach(), values.new_zeros(2, layers).index_add(1, pairs.layer, values)


@torch.no_grad()
def _pair_iou(boxes: Tensor, pairs: PairRows, gt_boxes: Tensor) -> Tensor:
    """(P,) of the pairs."""
    gt_boxes = gt_boxes.flatten(0, 1).index_select(0, pairs.gt_row)
    return plain_iou(cxcywh_to_xyxy(boxes.index_select(0, pairs.row)), cxcywh_to_xyxy(gt_boxes))


def labelled_rows(shapes: Sequence[torch.Size], labelled: Tensor | None) -> Tensor | None:
    """Which classes are labelled in the image of every prediction of all sets: (rows, C) or (rows, 1) bool.

    Args:
        shapes: (L, B, N, ...) of each set's predictions.
        labelled: see ``PaddedTargets.labelled_classes``.
    """
    if labelled is None:
        return None
    return torch.cat([labelled[:, None].expand(*shape[:3], -1).flatten(0, 2) for shape in shapes])


def quality_focal(
    logits: Tensor,
    index: tuple[Tensor, ...],
    quality: Tensor,
    kind: Literal["vfl", "mal"],
    alpha: float,
    gamma: float,
    labelled: Tensor | None = None,
    counted: Tensor | None = None,
    class_weights: Tensor | None = None,
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
        class_weights: (C,) of the loss of positives; None: 1 for all.
    """
    target, is_positive = _class_targets(logits, index, quality, counted)
    logits = logits.to(quality.dtype)
    prob = logits.detach().sigmoid()
    of_positives = target if kind == "vfl" else torch.ones_like(prob)
    if class_weights is not None:
        of_positives = of_positives * class_weights.to(prob)
    if kind == "vfl":
        weight = torch.where(is_positive, of_positives, alpha * prob**gamma)
    else:
        weight = torch.where(is_positive, of_positives, prob**gamma)
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

"""Losses of box distributions: fine-grained localization (FGL), and distillation from the last layer (DDF).

Each side of a box is predicted as probabilities of bins, see distribution.py. FGL is the cross-entropy of the two bins
that the object's side lies between. DDF brings the distributions of the earlier layers closer to those of the last one,
also for queries without an object, whose boxes have no other loss.

Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
sections 4.1 and 4.2; what they leave open is as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvision.heads.query.distribution import BoxDistribution
from mvision.heads.query.losses import LossSet
from mvision.heads.query.matching import PaddedTargets, mean_count
from mvision.structures.boxes import cxcywh_to_xyxy, plain_iou

TEMPERATURE = 5.0  # of the distributions that DDF compares


@dataclass
class Distributions:
    """The distributions of all sets, in every image the queries of one set after those of another.

    Attributes:
        corners: (L, B, N, S, bins + 1) logits of the S numbers that a query predicts as distributions.
        sizes, numbers: the queries of each set, and its pairs in all L layers together.
        row: (P,) int64, for every pair, set after set: its place among the L * B * N predictions.
        overlap: (P,) IoU of its predicted box and its object (of poses their OKS).
    """

    corners: Tensor
    sizes: list[int]
    numbers: list[int]
    row: Tensor
    overlap: Tensor


@dataclass
class BoxDistributions(Distributions):
    """The distributions of the left, top, right and bottom side of boxes.

    Attributes:
        term: (P,) int64, the place of every pair's set and layer among all.
        gt_boxes, initial: (P, 4) cxcywh in 0..1, its object, and the box that its distributions are relative to.
    """

    term: Tensor
    gt_boxes: Tensor
    initial: Tensor


def join_distributions(sets: Sequence[LossSet], targets: PaddedTargets) -> BoxDistributions:
    """The distributions of sets that have them, with the pairs of their box terms."""
    corners = torch.cat([one.corners for one in sets if one.corners is not None], 2)
    layers, batch, queries, _ = corners.shape
    sizes = [one.logits.shape[2] for one in sets]
    numbers, indices = [], []
    for number, one in enumerate(sets):
        pairs, _ = one.of_boxes
        # All layers have equally many pairs, and those without distributions come last.
        numbers.append(len(pairs.layer) // len(one.suffixes) * layers)
        layer, image, query, index = (
            values[: numbers[-1]] for values in (pairs.layer, pairs.image, pairs.query, pairs.object)
        )
        indices.append((layer, image, query + sum(sizes[:number]), index, layer + number * layers))
    layer, image, query, index, term = (torch.cat(values) for values in zip(*indices))
    place = torch.add(query, image, alpha=queries)
    row = torch.add(place, layer, alpha=batch * queries)
    gt_row = torch.add(index, image, alpha=targets.labels.shape[1])
    gt_boxes = targets.boxes.flatten(0, 1).index_select(0, gt_row)
    initial = torch.cat([one.initial for one in sets if one.initial is not None], 1)
    boxes = torch.cat([one.boxes[:layers] for one in sets], 2).detach().flatten(0, 2).index_select(0, row)
    return BoxDistributions(
        corners=corners.to(boxes.dtype).unflatten(-1, (4, -1)),
        sizes=sizes,
        numbers=numbers,
        row=row,
        term=term,
        gt_boxes=gt_boxes,
        initial=initial.flatten(0, 1).index_select(0, place),
        overlap=plain_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt_boxes)),
    )


def localization_losses(found: BoxDistributions, totals: Sequence[float | Tensor], bins: BoxDistribution) -> Tensor:
    """FGL of every layer of every set, (sets * L,), weighted by the IoU of the boxes.

    Args:
        totals: number that the sums of each set are divided by.
        bins: those of the distributions.
    """
    lower, share = bins.bins_of(found.gt_boxes, found.initial)
    log_prob = found.corners.flatten(0, 2).index_select(0, found.row).log_softmax(-1)
    of_lower, of_upper = log_prob.gather(-1, torch.stack((lower, lower + 1), -1)).unbind(-1)
    losses = -torch.lerp(of_lower, of_upper, share).sum(-1) * found.overlap
    layers = len(found.corners)
    sums = losses.new_zeros(layers * len(totals)).index_add(0, found.term, losses)
    return torch.cat([part / total for part, total in zip(sums.split(layers), totals)])


def distillation_losses(found: Distributions, logits: Tensor) -> Tensor:
    """DDF of every layer but the last, of every set, (sets * (L - 1),): their KL divergence from the last layer.

    A query with an object counts as much as the IoU of its box, another one as much as the highest score that the last
    layer gives it. There is a mean over each of the two kinds, see ``_mean_weights``.

    Args:
        logits: (B, N, C) before the sigmoid, of the last layer, with the queries in the order of the distributions.
    """
    corners = found.corners / TEMPERATURE
    with torch.no_grad():
        teacher = corners[-1].log_softmax(-1)
        weights = _mean_weights(found)
        scores = logits.amax(-1).to(teacher.dtype).sigmoid().split(found.sizes, 1)
        weight = torch.cat([score * other for score, (_, other) in zip(scores, weights)], 1).repeat(len(corners), 1, 1)
        overlaps = found.overlap.split(found.numbers)
        matched = torch.cat([overlap * matched for overlap, (matched, _) in zip(overlaps, weights)])
        weight.view(-1).index_copy_(0, found.row, matched)
    student = corners[:-1].log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum((-2, -1)) * weight[:-1]
    return torch.cat([part.sum((1, 2)) for part in divergence.split(found.sizes, 2)])


def _mean_weights(found: Distributions) -> list[tuple[float | Tensor, float | Tensor]]:
    """What the terms of every set's matched and other queries are multiplied by before they are summed.

    It makes two means of them, over the queries and their sides, and adds these in proportion to the roots of the
    numbers of queries in the first set, which is that of the matched queries. (The paper's code multiplies both numbers
    by 8 / B and by the number of sides, which cancels out.)
    """
    layers, batch, _, sides, _ = found.corners.shape
    numbers = [number // layers for number in found.numbers]
    counts = [(number, batch * size - number) for number, size in zip(numbers, found.sizes)]
    first = tuple(mean_count(count, found.corners.device) for count in counts[0])
    roots = [count**0.5 for count in first]
    factor = TEMPERATURE**2 / sides / (roots[0] + roots[1])
    # Where there is no query of a kind, its weight does not matter.
    matched, other = (
        [factor * root / (count + (count == 0)) for count in of_sets]
        for root, of_sets in zip(roots, zip(first, *counts[1:]))
    )
    return list(zip(matched, other))

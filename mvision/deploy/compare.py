"""The difference between the raw outputs of two versions of one model."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TOLERANCE = 0.01  # largest allowed difference of probabilities, and of coordinates in 0..1
LOGITS = frozenset({"logits", "masks", "visibility"})
BEST = 0.25  # share of the queries that are compared: those with the highest scores


def difference(expected: dict[str, dict[str, Tensor]], actual: dict[str, dict[str, Tensor]]) -> tuple[float, str]:
    """The largest absolute difference, and the name of the output that has it; NaN where an output has NaN.

    Outputs in ``LOGITS`` are compared as probabilities, after the sigmoid; the others (boxes, keypoints) as they are.

    Rounding decides in which order queries with almost equal scores come, and which of them is the last one selected.
    So the queries of both versions are first paired by their boxes and logits, and only the quarter of the pairs with
    the highest scores is compared. Indices of queries (``query``) are not compared: rounding decides about them too.
    """
    worst = 0.0, "-"
    for task, outputs in expected.items():
        first = {name: _as_probability(name, value) for name, value in outputs.items() if name != "query"}
        second = {name: _as_probability(name, actual[task][name]) for name in first}
        pairs = _pairs(first, second) if "boxes" in first else None
        for name, value in first.items():
            other = second[name]
            if pairs is not None:
                value = torch.stack([queries[rows] for queries, (rows, _) in zip(value, pairs)])
                other = torch.stack([queries[columns] for queries, (_, columns) in zip(other, pairs)])
            largest = (value - other).abs().max().item() if value.numel() else 0.0
            if math.isnan(largest):
                return largest, f"{task}.{name}"
            if largest > worst[0]:
                worst = largest, f"{task}.{name}"
    return worst


def _as_probability(name: str, value: Tensor) -> Tensor:
    value = value.detach().float().cpu()
    return value.sigmoid() if name in LOGITS else value


def _pairs(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For every image the queries of ``first`` with the highest scores, and those of ``second`` that match them."""
    pairs = []
    for image in range(len(first["boxes"])):
        points, others = (torch.cat((x["boxes"][image], x["logits"][image]), -1) for x in (first, second))
        cost = torch.cdist(points, others, p=1).nan_to_num(1e6)
        rows, columns = linear_sum_assignment(cost.numpy())
        scores = first["logits"][image].amax(-1)[rows]
        keep = scores.topk(max(1, round(BEST * len(scores)))).indices
        pairs.append((torch.from_numpy(rows)[keep], torch.from_numpy(columns)[keep]))
    return pairs

"""How far the outputs of two versions of one model are apart."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TOLERANCE = 0.01  # of probabilities and of coordinates in 0..1
LOGITS = frozenset({"logits", "masks", "visibility"})
BEST = 0.25  # share of the queries, the best ones, that are compared


def difference(expected: dict[str, dict[str, Tensor]], found: dict[str, dict[str, Tensor]]) -> tuple[float, str]:
    """The largest difference of probabilities (what is logits) and coordinates, and in which output it is.

    Queries are compared where they are the same: which of two cells with equal scores comes first, and which is just
    not taken any more, is a matter of rounding. So queries are paired by what they found, and the better quarter of
    them counts.
    """
    worst = 0.0, "-"
    for task, outputs in expected.items():
        mine = {name: _as_probability(name, value) for name, value in outputs.items()}
        other = {name: _as_probability(name, found[task][name]) for name in outputs}
        rows = _pairs(mine, other) if "boxes" in mine else None
        for name, value in mine.items():
            pair = other[name]
            if rows is not None:
                value = torch.stack([v[r] for v, (r, _) in zip(value, rows)])
                pair = torch.stack([v[c] for v, (_, c) in zip(pair, rows)])
            largest = (value - pair).abs().max().item() if value.numel() else 0.0
            # Not a number is never small.
            if not largest <= worst[0]:
                worst = largest, f"{task}.{name}"
    return worst


def _as_probability(name: str, value: Tensor) -> Tensor:
    value = value.detach().float().cpu()
    return value.sigmoid() if name in LOGITS else value


def _pairs(mine: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For every image the best queries here, and their partners there."""
    pairs = []
    for image in range(len(mine["boxes"])):
        here, there = (torch.cat((x["boxes"][image], x["logits"][image]), -1) for x in (mine, other))
        cost = torch.cdist(here, there, p=1).nan_to_num(1e6)
        row, column = linear_sum_assignment(cost.numpy())
        scores = mine["logits"][image].amax(-1)[row]
        keep = scores.topk(max(1, round(BEST * len(scores)))).indices
        pairs.append((torch.from_numpy(row)[keep], torch.from_numpy(column)[keep]))
    return pairs

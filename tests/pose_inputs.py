"""Settings and inputs on which the pose decoder is compared with the original ones, see ``tests/decoder_inputs.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvision.heads.poses.outputs import PoseDenoising
from mvision.heads.query.matching import Matches

CLASSES = 2
SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "num_layers": 3, "ffn_dim": 24, "num_queries": 6}
# Families -> settings, and K.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "ECPose": ({**SMALL, "learned_queries": True, "num_points": 4, "num_bins": 32, "bin_scale": 4.0}, 4),
    "DETRPose": ({**SMALL, "learned_queries": False, "num_points": 6, "num_bins": 16, "bin_scale": 8.0}, 3),
}
# The wide map has tokens so near to its sides that they are left out.
SIZES: dict[str, dict[str, list[tuple[int, int]]]] = {
    "ECPose": {"square": [(8, 8), (4, 4), (2, 2)], "wide": [(12, 52), (6, 26), (3, 13)]},
    "DETRPose": {"square": [(8, 8), (4, 4)], "wide": [(6, 10), (3, 5)]},
}


def make_maps(width: int, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """One image's maps in float64, (1, width, h, w) each."""
    random = np.random.RandomState(len(shapes))
    return [torch.from_numpy(random.standard_normal((1, width, *shape))) for shape in shapes]


def make_denoising(points: int, num_queries: int) -> PoseDenoising:
    """Two groups of one query each, one of them with a point outside of the image."""
    labels = torch.tensor([[1, 0]])
    places = torch.from_numpy(np.random.RandomState(1).uniform(0.1, 0.9, (1, 2, 1 + points, 2)))
    places[0, 1, 2] = -0.1
    mask = torch.ones(2 + num_queries, 2 + num_queries, dtype=torch.bool)
    mask[2:, :2] = mask[0, 1] = mask[1, 0] = False
    none = torch.zeros(4, 0, dtype=torch.int64)
    return PoseDenoising(labels, places, mask, Matches.of(none.T.numpy(), none))

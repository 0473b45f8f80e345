"""Settings, weights and maps on which the decoder is compared with the original ones.

``docs/scripts/golden_decoders.py`` gave them to the original code and wrote ``tests/golden_decoders.json``;
``tests/test_golden_decoders.py`` gives them to ours.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASSES = 3
SMALL = {"embed_dim": 16, "num_queries": 6, "num_layers": 3, "num_heads": 2, "ffn_dim": 24}
SHAPES = [(8, 6), (4, 3), (2, 2)]
DFINE = {
    "num_points": [3, 6, 3],
    "act": "silu",
    "input_projection": "if_needed",
    "position_limit": 10.0,
    "attention_projections": False,
    "gate": True,
    "box_refinement": "distribution",
    "location_quality": True,
}
# Families -> settings, and channels of the maps.
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "DEIM": (DFINE, [16, 16, 16]),
    "DEIM-RT-DETRv2": ({"act": "silu", "position_mlp": "deep"}, [12, 12, 12]),
    "EdgeCrafter": (
        {**DFINE, "memory_projection": False, "position_mlp": "deep", "position_once": True},
        [16, 16, 16],
    ),
}


def make_weight(name: str, shape: torch.Size) -> Tensor:
    """Float64 values that depend on the name alone, which is that of our decoder."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    random = np.random.RandomState(zlib.crc32(name.encode()))  # its numbers are the same in every version of NumPy
    values = torch.from_numpy(random.standard_normal(tuple(shape)))
    if name.endswith("running_var"):
        return 0.5 + values.abs()
    if len(shape) == 1:
        return 0.3 * values + (".norm" in name and name.endswith("weight"))
    return 1.5 * values * shape[1:].numel() ** -0.5


def make_maps(channels: list[int]) -> list[Tensor]:
    """One image's maps in float64, (1, C, h, w) each."""
    random = np.random.RandomState(0)
    return [torch.from_numpy(random.standard_normal((1, size, *shape))) for size, shape in zip(channels, SHAPES)]

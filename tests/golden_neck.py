"""Settings and inputs of ``tests/golden_neck.npz``, whose outputs ``docs/scripts/golden_neck.py`` computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.drawn_weights import drawn

FILE = Path(__file__).with_suffix(".npz")
WIDTH, STRIDES = 16, [8, 16, 32]
CASES: dict[str, dict[str, Any]] = {
    "small": {"num_heads": 4, "ffn_dim": 24, "expansion": 0.34, "depth": 2},
    "large": {"num_heads": 2, "ffn_dim": 40, "expansion": 1.5, "depth": 3},
}


def make_maps(case: str) -> list[Tensor]:
    """Maps of a square image (the original mixes up rows and columns of others) of 64 x 64 pixels."""
    return [drawn(f"{case}, stride {stride}", (1, WIDTH, 64 // stride, 64 // stride)) for stride in STRIDES]

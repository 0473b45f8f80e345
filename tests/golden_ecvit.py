"""Settings and inputs of ``tests/golden_ecvit.npz``, whose outputs ``docs/scripts/golden_ecvit.py`` computes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tests.drawn_weights import drawn

FILE = Path(__file__).with_suffix(".npz")
DIM, HEADS, MLP_RATIO = 64, 2, 3.0
SIZES = {"square": (64, 64), "wide": (96, 160)}
CHANNELS = 2  # of every map that are kept


def make_images(case: str) -> Tensor:
    """(2, 3, height, width), as normalised images are."""
    return drawn(f"images, {case}", (2, 3, *SIZES[case]))

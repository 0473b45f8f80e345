"""Settings and inputs of ``tests/golden_ecvit.npz``, whose outputs ``docs/scripts/golden_ecvit.py`` computes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tests.drawn_weights import drawn

FILE = Path(__file__).with_suffix(".npz")
# Width, attention heads and relative width of the feed-forward networks; the last two as in the networks S and S+.
NETWORKS = {"narrow": (64, 2, 3.0), "s": (96, 6, 4.0), "s_plus": (96, 6, 6.0)}
SIZES = {"square": (64, 64), "wide": (96, 160)}
CHANNELS = slice(1, 2)  # of every map that are kept


def key(network: str, size: str, level: int) -> str:
    """The name of a map in the file."""
    return f"{network}, {size} {level}"


def make_images(size: str) -> Tensor:
    """(2, 3, height, width), as normalised images are."""
    return drawn(f"images, {size}", (2, 3, *SIZES[size]))

"""Settings and inputs of ``tests/golden_masks.npz``, whose masks ``docs/scripts/golden_masks.py`` computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.decoder_inputs import FAMILIES
from tests.drawn_weights import drawn

FILE = Path(__file__).with_suffix(".npz")
CLASSES, WIDTH, STRIDES = 3, 16, [8, 16, 32]
SMALL = {"embed_dim": WIDTH, "num_queries": 4, "num_layers": 3, "num_heads": 2, "ffn_dim": 24}
SETTINGS = {**FAMILIES["EdgeCrafter"][0], **SMALL}
SIZES = {"square": (64, 64), "wide": (64, 96)}
"""Height and width of the image."""
BLOCKS = ["first", "all"]


def make_maps(size: str) -> list[Tensor]:
    """The neck's maps of one image, finest first, in float64."""
    height, width = SIZES[size]
    return [drawn(f"{size}, stride {stride}", (1, WIDTH, height // stride, width // stride)) for stride in STRIDES]


def some(masks: Tensor) -> Tensor:
    """(Q, h, w) masks of one image at the places that are in the file."""
    return masks[:, ::2, 1::2].to(torch.float64)

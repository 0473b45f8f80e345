"""Names and sizes of EdgeCrafter's ViTs, without timm, which takes a second to import; ``ecvit`` has the network."""

from __future__ import annotations

from typing import NamedTuple

PATCH, TAKEN = 16, 2


class Size(NamedTuple):
    """Width of the tokens, attention heads, and the width of the FFN relative to that of the tokens."""

    dim: int
    heads: int
    mlp_ratio: float


SIZES = {
    "ecvit_t": Size(192, 3, 4.0),
    "ecvit_t_plus": Size(256, 4, 4.0),
    "ecvit_s": Size(384, 6, 4.0),
    "ecvit_s_plus": Size(384, 6, 6.0),
}

OTHER_NAMES = {"register_token": "cls_token"}
"""The authors' names of tensors -> timm's."""

DERIVED = "rope_embed.periods"
"""Name of a tensor in the authors' files that follows from the size."""

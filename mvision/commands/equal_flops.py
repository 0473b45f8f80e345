"""Hybrid encoders of equal cost: the width of fusion blocks at which another kind of block takes as many FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvision.neck import HybridEncoder

WIDEST = 4  # channels inside a block, relative to embed_dim


def count_flops(module: nn.Module, *inputs: object) -> int:
    """FLOPs of one forward pass without gradients; a multiply-add counts as two.

    On the meta device nothing is computed. The FLOPs of fused attention cannot be counted on every device, so attention
    is computed as plain matrix products.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def neck_flops(in_channels: Sequence[int], strides: Sequence[int], size: int, settings: dict[str, Any]) -> int:
    """FLOPs of a fused ``HybridEncoder`` with these settings for one square image with sides of ``size`` pixels."""
    with torch.device("meta"):
        neck = HybridEncoder(in_channels, strides, **settings).eval().fuse()
        maps = [torch.empty(1, channels, size // s, size // s) for channels, s in zip(in_channels, strides)]
    return count_flops(neck, maps)


def expansion_for(
    flops: int,
    in_channels: Sequence[int],
    strides: Sequence[int],
    size: int,
    settings: dict[str, Any],
    multiple: int = 1,
) -> float:
    """The ``expansion`` with which ``neck_flops`` is nearest to ``flops``.

    Narrow necks have large steps, and what is outside of the blocks can already take more FLOPs: check the result where
    that matters.

    Args:
        settings: of the neck, ``embed_dim`` among them; its ``expansion`` is ignored.
        multiple: the blocks have a multiple of so many channels inside.
    """
    whole = settings["embed_dim"] // (2 if settings.get("fusion_block") == "elan" else 1)

    def expansion(width: int) -> float:
        return (width + 0.5) / whole  # the neck rounds down

    def counted(width: int) -> int:
        return neck_flops(in_channels, strides, size, {**settings, "expansion": expansion(width)})

    # FLOPs are a quadratic function of the width, except that a CSP layer as wide as the maps has one convolution less.
    dim = settings["embed_dim"]
    known, widths = [dim // 4, dim + 1, 2 * dim], np.arange(1, WIDEST * dim)
    curve = np.polyval(np.polyfit(known, [counted(width) for width in known], 2), widths)
    nearest = int(widths[np.abs(curve - flops).argmin()]) // multiple * multiple
    candidates = [width for width in (nearest, nearest + multiple) if width > 0]
    return expansion(min(candidates, key=lambda width: abs(counted(width) - flops)))

# mypy: allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernel of ``bias_activation.add_bias_activation_``. Importing it imports Triton."""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of one program; 16 for each thread of four warps, two of the widest loads in 16 bits
MAX_CHANNELS = 256  # of one program


def launch(x: Tensor, bias: Tensor, activation: str, floor: float = 0.0) -> None:
    """Add the bias and apply the activation in place; ``x`` is (B, C, H, W) in channels-last order."""
    channels = x.shape[1]
    pixels = x.numel() // channels if channels else 0
    if pixels == 0:
        return
    block_channels = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    block_pixels = ELEMENTS // block_channels
    grid = (triton.cdiv(pixels, block_pixels), triton.cdiv(channels, block_channels))
    _add_bias_activation[grid](x, bias, pixels, channels, floor, activation, block_pixels, block_channels)


@triton.jit(do_not_specialize=["pixels"])
def _add_bias_activation(
    x,
    bias,
    pixels,
    channels,
    floor,
    ACTIVATION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    # 64 bits: a batch of large maps has more than 2**31 elements.
    at = x + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    out = tl.load(at, mask=mask, other=0).to(tl.float32)
    out += tl.load(bias + channel, mask=channel < channels, other=0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        out = tl.where(out < floor, floor, out)  # keeps NaN, as PyTorch does
    elif ACTIVATION == "silu":
        out = out * tl.sigmoid(out)
    tl.store(at, out.to(x.dtype.element_ty), mask=mask)

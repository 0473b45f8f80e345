# mypy: allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernel of ``logits.mask_grid``, which adds the prior in one pass. Importing it imports Triton."""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of one program; eight for each thread of four warps


def launch(product: Tensor, weight: Tensor, across: Tensor, down: Tensor, lowest: float) -> None:
    """Add ``weight * max(across - down, lowest)`` to ``product``, in float32 and rounded once; all are contiguous.

    Args:
        product: (B, Q, h, w).
        weight: (B, Q, 1).
        across, down: (B, Q, w) and (B, Q, h) float32.
    """
    batch, queries, height, width = product.shape
    if product.numel():
        grid = (batch * queries, triton.cdiv(height * width, ELEMENTS))
        _add_prior[grid](product, weight, across, down, height, width, lowest, ELEMENTS)


@triton.jit(do_not_specialize=["height", "width"])
def _add_prior(product, weight, across, down, height, width, lowest, ELEMENTS: tl.constexpr):
    mask_number = tl.program_id(0).to(tl.int64)  # 64 bits: a batch of masks has more than 2**31 elements
    pixel = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = pixel < height * width
    prior = tl.load(across + mask_number * width + pixel % width, mask=inside, other=0)
    prior -= tl.load(down + mask_number * height + pixel // width, mask=inside, other=0)
    prior = tl.where(prior < lowest, lowest, prior)  # keeps NaN, as PyTorch does
    at = product + mask_number * height * width + pixel
    out = tl.load(at, mask=inside, other=0).to(tl.float32) + tl.load(weight + mask_number).to(tl.float32) * prior
    tl.store(at, out.to(product.dtype.element_ty), mask=inside)

# mypy: allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernels of ``mvision.heads.query.sampling``. Importing this module imports Triton.

A program computes one or a few rows (a query of an image in one attention head) with all of their sampling points at
once, as a block of rows x points x channels, so that every load of a program is on its way before the first is needed.
Coordinates and sums are float32 whatever the type of the values.

The level sizes are arguments, not constants: with constants every image size would have to be compiled anew.
"""

from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

MAX_CHANNELS = 64  # of one step of a program
ELEMENTS = 512  # of one program: rows x points x channels; 16 for each thread of a warp
# Triton compiles a kernel anew where a number becomes 1 or a multiple of 16, unless it is told not to; for strides that
# is worth it.
ANY_NUMBER = ["rows", "rows_per_image", "tokens", *(f"size{level}" for level in range(8))]


def launch_forward(
    value: Tensor, locations: Tensor, weights: Tensor, points: list[int], sizes: list[int], out: Tensor
) -> None:
    """Write the samples into ``out``, (B, Q, H * d).

    Args:
        value, locations, weights: see ``sampling.sample_levels``; the channels of ``value`` lie side by side, the other
            two are contiguous.
        points: how many of the points are in each level.
        sizes: height * 65536 + width of each level, and ones behind them up to eight numbers.
    """
    if out.numel():
        grid, arguments, constants = _plan(value, locations, points)
        _forward[grid](value, locations, weights, out, *arguments, *sizes, **constants)


def launch_backward(
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    points: list[int],
    sizes: list[int],
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
) -> None:
    """Add to ``grad_value``, (B, S, H, d) in float32, and write the other two; ``grad`` is that of (B, Q, H * d)."""
    if grad.numel():
        grid, arguments, constants = _plan(value, locations, points)
        gradients = (grad, grad_value, grad_locations, grad_weights)
        _backward[grid](value, locations, weights, *gradients, *arguments, *sizes, **constants)


def _plan(value: Tensor, locations: Tensor, points: list[int]) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """The number of programs, and the numbers that both kernels take."""
    batch, queries, heads, total, _ = locations.shape
    dim = value.shape[3]
    block_points = triton.next_power_of_2(total)
    block_dim = min(triton.next_power_of_2(dim), MAX_CHANNELS)
    block_rows = max(ELEMENTS // (block_points * block_dim), 1)
    arguments = (batch * queries * heads, queries * heads, value.shape[1], *value.stride()[:3])
    constants = {
        "HEADS": heads,
        "DIM": dim,
        "LEVELS": len(points),
        "POINTS": total,
        "ENDS": sum(end << (16 * level) for level, end in enumerate(accumulate(points))),
        "BLOCK_ROWS": block_rows,
        "BLOCK_POINTS": block_points,
        "BLOCK_DIM": block_dim,
        "num_warps": min(max(block_rows * block_points * block_dim // (2 * ELEMENTS), 1), 8),
    }
    return (triton.cdiv(batch * queries * heads, block_rows),), arguments, constants


@triton.jit
def _next_level(point, first, packed, size, start, end):
    """Go on to the next level: from its first point on they take this size and start where the last level ended."""
    size = tl.where(point >= first, packed, size)
    start = tl.where(point >= first, end, start)
    return size, start, end + (packed >> 16) * (packed & 65535)


@triton.jit
def _levels_of_points(
    point, size0, size1, size2, size3, size4, size5, size6, size7, LEVELS: tl.constexpr, ENDS: tl.constexpr
):
    """Height, width and first token of the level of every point; a size is height * 65536 + width.

    ENDS has 16 bits for each level: the number of points up to its last one.
    """
    size, start = tl.where(point >= 0, size0, 0), point * 0
    end = (size0 >> 16) * (size0 & 65535)
    if LEVELS > 1:
        size, start, end = _next_level(point, (ENDS >> 0) & 65535, size1, size, start, end)
    if LEVELS > 2:
        size, start, end = _next_level(point, (ENDS >> 16) & 65535, size2, size, start, end)
    if LEVELS > 3:
        size, start, end = _next_level(point, (ENDS >> 32) & 65535, size3, size, start, end)
    if LEVELS > 4:
        size, start, end = _next_level(point, (ENDS >> 48) & 65535, size4, size, start, end)
    if LEVELS > 5:
        size, start, end = _next_level(point, (ENDS >> 64) & 65535, size5, size, start, end)
    if LEVELS > 6:
        size, start, end = _next_level(point, (ENDS >> 80) & 65535, size6, size, start, end)
    if LEVELS > 7:
        size, start, end = _next_level(point, (ENDS >> 96) & 65535, size7, size, start, end)
    return size >> 16, size & 65535, start


@triton.jit
def _pixels(locations, at, mask, size):
    """Locations along one axis in pixels from the centre of the first: the pixel before, and the fraction after it."""
    place = tl.load(locations + at, mask=mask, other=0).to(tl.float32) * size - 0.5
    # Two pixels outside nothing is sampled any more; numbers beyond what an integer holds, and NaN, are put there.
    place = tl.where(place > -2.0, tl.minimum(place, size + 1.0), -2.0)
    before = tl.floor(place)
    return before.to(tl.int32), place - before


@triton.jit(do_not_specialize=ANY_NUMBER)
def _forward(
    value, locations, weights, out, rows, rows_per_image, tokens, stride_image, stride_token, stride_head,
    size0, size1, size2, size3, size4, size5, size6, size7,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ENDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_POINTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    point = tl.arange(0, BLOCK_POINTS)
    mask = (row < rows)[:, None] & (point < POINTS)[None, :]
    height, width, start = _levels_of_points(
        point, size0, size1, size2, size3, size4, size5, size6, size7, LEVELS, ENDS
    )
    height, width, start = height[None, :], width[None, :], start[None, :]
    row = row.to(tl.int64)  # the large tensors can have more than 2**31 elements
    at = row[:, None] * POINTS + point[None, :]
    left, after_left = _pixels(locations, 2 * at, mask, width)
    top, after_top = _pixels(locations, 2 * at + 1, mask, height)
    weight = tl.load(weights + at, mask=mask, other=0).to(tl.float32)
    image = value + (row // rows_per_image * stride_image + row % HEADS * stride_head)
    for first in tl.static_range(0, DIM, BLOCK_DIM):
        channel = first + tl.arange(0, BLOCK_DIM)
        mixed = tl.zeros((BLOCK_ROWS, BLOCK_POINTS, BLOCK_DIM), tl.float32)
        for corner in tl.static_range(4):
            column, line = left + corner % 2, top + corner // 2
            inside = mask & (column >= 0) & (column < width) & (line >= 0) & (line < height)
            share_x = after_left if corner % 2 == 1 else 1 - after_left
            share_y = after_top if corner // 2 == 1 else 1 - after_top
            token = image[:, None] + (start + line * width + column) * stride_token
            token_mask = inside[:, :, None] & (channel < DIM)[None, None, :]
            pixel = tl.load(token[:, :, None] + channel[None, None, :], mask=token_mask, other=0).to(tl.float32)
            mixed += (share_x * share_y * weight)[:, :, None] * pixel
        mixed = tl.sum(mixed, 1).to(out.dtype.element_ty)
        out_mask = (row < rows)[:, None] & (channel < DIM)[None, :]
        tl.store(out + row[:, None] * DIM + channel[None, :], mixed, mask=out_mask)


@triton.jit(do_not_specialize=ANY_NUMBER)
def _backward(
    value, locations, weights, grad, grad_value, grad_locations, grad_weights,
    rows, rows_per_image, tokens, stride_image, stride_token, stride_head,
    size0, size1, size2, size3, size4, size5, size6, size7,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ENDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_POINTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    point = tl.arange(0, BLOCK_POINTS)
    mask = (row < rows)[:, None] & (point < POINTS)[None, :]
    height, width, start = _levels_of_points(
        point, size0, size1, size2, size3, size4, size5, size6, size7, LEVELS, ENDS
    )
    height, width, start = height[None, :], width[None, :], start[None, :]
    row = row.to(tl.int64)
    at = row[:, None] * POINTS + point[None, :]
    left, after_left = _pixels(locations, 2 * at, mask, width)
    top, after_top = _pixels(locations, 2 * at + 1, mask, height)
    weight = tl.load(weights + at, mask=mask, other=0).to(tl.float32)
    image = value + (row // rows_per_image * stride_image + row % HEADS * stride_head)
    grad_image = grad_value + (row // rows_per_image * tokens * (HEADS * DIM) + row % HEADS * DIM)
    grad_x = tl.zeros((BLOCK_ROWS, BLOCK_POINTS), tl.float32)
    grad_y = tl.zeros((BLOCK_ROWS, BLOCK_POINTS), tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_POINTS), tl.float32)
    for first in tl.static_range(0, DIM, BLOCK_DIM):
        channel = first + tl.arange(0, BLOCK_DIM)
        grad_mask = (row < rows)[:, None] & (channel < DIM)[None, :]
        grad_out = tl.load(grad + row[:, None] * DIM + channel[None, :], mask=grad_mask, other=0).to(tl.float32)
        grad_out = grad_out[:, None, :]
        for corner in tl.static_range(4):
            column, line = left + corner % 2, top + corner // 2
            inside = mask & (column >= 0) & (column < width) & (line >= 0) & (line < height)
            share_x = after_left if corner % 2 == 1 else 1 - after_left
            share_y = after_top if corner // 2 == 1 else 1 - after_top
            token = start + line * width + column
            token_mask = inside[:, :, None] & (channel < DIM)[None, None, :]
            pixel_at = (image[:, None] + token * stride_token)[:, :, None] + channel[None, None, :]
            pixel = tl.load(pixel_at, mask=token_mask, other=0).to(tl.float32)
            product = tl.sum(pixel * grad_out, 2)
            grad_weight += share_x * share_y * product
            grad_x += share_y * product if corner % 2 == 1 else -share_y * product
            grad_y += share_x * product if corner // 2 == 1 else -share_x * product
            grad_at = (grad_image[:, None] + token * (HEADS * DIM))[:, :, None] + channel[None, None, :]
            grad_pixel = (share_x * share_y * weight)[:, :, None] * grad_out
            # Relaxed: in the default order every addition would wait for the ones before it.
            tl.atomic_add(grad_at, grad_pixel, mask=token_mask, sem="relaxed")
    tl.store(grad_weights + at, grad_weight.to(grad_weights.dtype.element_ty), mask=mask)
    location_type = grad_locations.dtype.element_ty
    tl.store(grad_locations + 2 * at, (grad_x * weight * width).to(location_type), mask=mask)
    tl.store(grad_locations + 2 * at + 1, (grad_y * weight * height).to(location_type), mask=mask)

"""Bilinear samples of several feature levels, mixed by weights: the inner part of deformable attention, for GPUs.

``sample_grid`` is made of PyTorch's ``grid_sample``. It copies all values in float32 and in another order for that, and
takes some 15 kernels; ``sample_levels`` reads the values where they are, in one kernel (``deformable_triton``), and has
another for its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.machine import has_triton, with_triton
from mvision.neck.layers import without_autocast

Shapes = list[tuple[int, int]]
Points = Sequence[int]
"""How many points are sampled in each level; ``P`` below is their sum."""
MAX_LEVELS = 8
"""``sample_levels`` serves that many feature levels."""


def kernel_serves(value: Tensor, shapes: Shapes) -> bool:
    """Whether ``sample_levels`` is to be used for these values: on a GPU with Triton, but never in an export."""
    if value.device.type != "cuda" or not has_triton():
        return False
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # is_exporting: torch >= 2.7
    supported = value.dtype in (torch.bfloat16, torch.float16, torch.float32) and len(shapes) <= MAX_LEVELS
    # The sums of its backward pass are in any order; grid_sample's are too, but say so themselves where it matters.
    return supported and not exporting() and not torch.are_deterministic_algorithms_enabled()


def sample_grid(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> Tensor:
    """Bilinear samples by ``grid_sample``: (B, S, H, d), (B, Q, H, P, 2), (B, Q, H, P) -> (B, Q, H*d)."""
    batch, _, heads, dim = value.shape
    count = locations.shape[1]
    with without_autocast(value):
        planes = zip(*_planes(value, locations, shapes, points))
        samples = [F.grid_sample(plane, places, align_corners=False) for plane, places in planes]
        mixed = (torch.cat(samples, 2) * _shares(weights, value).unsqueeze(1)).sum(2)
    return mixed.view(batch, heads * dim, count).transpose(1, 2).to(value.dtype)


def _grid_gradients(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sample_grid`` with respect to the three tensors, for use where autograd is switched off."""
    batch, _, heads, dim = value.shape
    count = locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    grad = grad.view(batch, count, heads, dim).permute(0, 2, 3, 1).flatten(0, 1).to(dtype).unsqueeze(2)
    shares = _shares(weights, value).unsqueeze(1).split(list(points), 2)
    for_planes, for_places, for_shares = [], [], []
    for plane, places, share in zip(*_planes(value, locations, shapes, points), shares):
        samples = F.grid_sample(plane, places, align_corners=False)
        for_shares.append((samples * grad).sum(1))
        # Bilinear (0), zeros outside (0), not align_corners, both gradients.
        args = (grad * share, plane, places, 0, 0, False, [True, True])
        for_plane, for_place = torch.ops.aten.grid_sampler_2d_backward(*args)
        for_planes.append(for_plane.flatten(2))
        for_places.append(2 * for_place)
    grad_value = torch.cat(for_planes, 2).view(batch, heads, dim, -1).permute(0, 3, 1, 2)
    grad_locations = torch.cat(for_places, 1).view(batch, heads, -1, count, 2).permute(0, 3, 1, 2, 4)
    grad_weights = torch.cat(for_shares, 1).view(batch, heads, -1, count).permute(0, 3, 1, 2)
    pairs = ((grad_value, value), (grad_locations, locations), (grad_weights, weights))
    grad_value, grad_locations, grad_weights = (x.to(like.dtype).contiguous() for x, like in pairs)
    return grad_value, grad_locations, grad_weights


def _planes(
    value: Tensor, locations: Tensor, shapes: Shapes, points: Points
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The maps (B*H, d, h, w) and places (B*H, P, Q, 2) in -1..1 of every level, as ``grid_sample`` takes them.

    In float32, as ``grid_sample`` is the least precise operator in reduced precision, and wrong on strided bf16 views
    on a CPU. The order of the values and their type change in one copy. Places lie side by side, those of all queries
    together: on a CPU ``grid_sample`` and the sum over the points fill their vectors with them.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    planes = []
    for tokens, (height, width) in zip(value.split([height * width for height, width in shapes], 1), shapes):
        plane = tokens.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()
        planes.append(plane.flatten(0, 1).unflatten(2, (height, width)))
    places = (2 * locations - 1).to(dtype).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return planes, places.split(list(points), 1)


def _shares(weights: Tensor, value: Tensor) -> Tensor:
    """(B, Q, H, P) to (B*H, P, Q), in the precision of the computation."""
    return weights.permute(0, 2, 3, 1).flatten(0, 1).to(torch.promote_types(value.dtype, torch.float32))


@torch.library.custom_op(
    "mvision::sample_levels",
    mutates_args=(),
    schema="(Tensor value, Tensor locations, Tensor weights, SymInt[] sizes, int[] points) -> Tensor",
)
def sample_levels(value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int], points: list[int]) -> Tensor:
    """The same as ``sample_grid`` in one kernel, with sums in float32.

    It is an operator of its own, which ``torch.compile`` and CUDA graphs take as it is.

    Args:
        value: (B, S, H, d), the tokens of all levels.
        locations: (B, Q, H, P, 2), x and y in 0..1 within the level; outside of it values are zero.
        weights: (B, Q, H, P).
        sizes: height and width of each level, one after the other.
        points: how many of the P points are in each level.

    Returns:
        (B, Q, H*d), of the type of ``value``.
    """
    value, locations, weights = _in_order(value), locations.contiguous(), weights.contiguous()
    out = _new_output(value, locations, weights, sizes, points)

    def kernel() -> Tensor:
        from mvision.heads.query.deformable_triton import launch_forward  # slow to import, and for GPUs alone

        with torch.cuda.device_of(value):
            launch_forward(value, locations, weights, points, _packed(sizes), out)
        return out

    return with_triton(kernel, lambda: sample_grid(value, locations, weights, _shapes(sizes), points).contiguous())


@sample_levels.register_fake
def _new_output(value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int], points: list[int]) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op(
    "mvision::sample_levels_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor value, Tensor locations, Tensor weights, SymInt[] sizes, int[] points)"
    " -> (Tensor, Tensor, Tensor)",
)
def _sample_levels_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int], points: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to the values, locations and weights of ``sample_levels``."""
    grad, value = grad.contiguous(), _in_order(value)
    locations, weights = locations.contiguous(), weights.contiguous()
    # Thousands of points can share a token: their sum needs float32.
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)

    def kernel() -> tuple[Tensor, Tensor, Tensor]:
        from mvision.heads.query.deformable_triton import launch_backward

        with torch.cuda.device_of(value):
            gradients = (grad_value, grad_locations, grad_weights)
            launch_backward(grad, value, locations, weights, points, _packed(sizes), *gradients)
        return grad_value.to(value.dtype), grad_locations, grad_weights

    return with_triton(kernel, lambda: _grid_gradients(grad, value, locations, weights, _shapes(sizes), points))


@_sample_levels_backward.register_fake
def _new_gradients(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int], points: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    value, locations, weights = (x.new_empty(x.shape) for x in (value, locations, weights))
    return value, locations, weights


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, list[int], list[int]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sizes, ctx.points = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return (*_sample_levels_backward(grad, *ctx.saved_tensors, ctx.sizes, ctx.points), None, None)


sample_levels.register_autograd(_backward, setup_context=_setup_context)


def _in_order(value: Tensor) -> Tensor:
    """Values whose channels lie side by side, as the kernels read them."""
    return value if value.stride(3) == 1 else value.contiguous()


def _packed(sizes: list[int]) -> list[int]:
    """A number for each level that kernels could have, as ``deformable_triton`` takes them."""
    packed = [height << 16 | width for height, width in _shapes(sizes)]
    return packed + [1] * (MAX_LEVELS - len(packed))


def _shapes(sizes: list[int]) -> Shapes:
    return list(zip(sizes[::2], sizes[1::2]))

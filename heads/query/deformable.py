"""Multi-scale deformable attention: every query attends to a few sampled points of every feature level.

Source: Zhu et al., "Deformable DETR", ICLR 2021, section 4.1; the discrete form and the offset scale are RT-DETRv2's
(Lv et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.heads.query.sampling import Points, Shapes, kernel_serves, sample_grid, sample_levels
from mvision.neck.cached import ShapeCache

MATRIX_ELEMENTS = 2**26
"""Largest number of elements of ``_sample_matrix``'s matrix (128 MiB in bf16), which the backward pass needs too."""


class DeformableAttention(nn.Module):
    """Sample ``num_points`` values per head and level around each reference box or point, and mix them by weights.

    Args:
        embed_dim: width of queries and memory; a multiple of ``num_heads``.
        num_points: the same for all levels, or one number for each.
        sampling: ``default`` interpolates bilinearly; ``discrete`` takes the nearest token (RT-DETRv2), which exports
            to runtimes without grid sampling but has no gradient with respect to the locations.
        offset_scale: a predicted offset of ``num_points`` (the largest initial one) is this fraction of the reference
            box's width or height.
        projections: with linear layers on the memory and on the result. D-FINE leaves both out: every head samples its
            part of the memory's channels as they are, and nothing is computed for tokens that nobody looks at.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or the numbers of points are not as many as the levels.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int | Sequence[int],
        sampling: Literal["default", "discrete"] = "default",
        offset_scale: float = 0.5,
        projections: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} has to be a multiple of num_heads {num_heads}")
        points = [num_points] * num_levels if isinstance(num_points, int) else list(num_points)
        if len(points) != num_levels:
            raise ValueError(f"num_points {points} has to be one number, or one for each of the {num_levels} levels")
        self.num_heads, self.points = num_heads, points
        # Published models with a number for each level hold the reciprocals in float32, those with one number divide.
        self.rounded = not isinstance(num_points, int)
        self.sampling, self.offset_scale = sampling, offset_scale
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * sum(points) * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * sum(points))
        self.value_proj: nn.Module = nn.Linear(embed_dim, embed_dim) if projections else nn.Identity()
        self.output_proj: nn.Module = nn.Linear(embed_dim, embed_dim) if projections else nn.Identity()
        self._scales = ShapeCache()
        self.reset_parameters()
        if sampling == "discrete":
            # They get no gradient, and distributed training needs one for every trainable parameter.
            self.sampling_offsets.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initial offsets: a direction per attention head, further out with each point (Deformable DETR, A.4)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        reach = torch.cat([torch.arange(1, count + 1) for count in self.points])
        offsets = directions[:, None] * reach[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, references: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """Sample the memory around every reference box and mix the samples.

        Args:
            queries: (B, Q, D), position embedding added.
            references: (B, Q, 4) boxes cxcywh in 0..1, or (B, Q, 2) points, around which the unit of the predicted
                offsets is a position of the map that is sampled.
            memory: (B, S, D), the tokens of all levels, finest level first; S = sum of h * w over ``shapes``.
            shapes: (h, w) of each level.

        Returns:
            (B, Q, D).
        """
        batch, count, _ = queries.shape
        heads, points = self.num_heads, self.points
        value = self.value_proj(memory).unflatten(-1, (heads, -1))
        offsets = self.sampling_offsets(queries).view(batch, count, heads, -1, 2)
        weights = self.attention_weights(queries).view(batch, count, heads, -1).softmax(-1)
        # Coordinates stay in the references' precision: neighbouring bf16 numbers are up to two pixels apart at 640.
        offsets = offsets.to(references.dtype)
        if references.shape[-1] == 2:
            locations = references[:, :, None, None] + offsets / self._map_sizes(references, shapes)
        else:
            boxes = references.reshape(batch, count, 1, 1, 2, 2)
            locations = boxes[..., 0, :] + offsets * (boxes[..., 1, :] * self._offset_scale(references))
        sample = _sample_nearest if self.sampling == "discrete" else sample_values
        return self.output_proj(sample(value, locations, weights, shapes, points))

    def _map_sizes(self, references: Tensor, shapes: Shapes) -> Tensor:
        """(P, 2) width and height of the map that each point is sampled from."""
        dtype, device = references.dtype, references.device

        def of_points() -> Tensor:
            sizes = [torch.full((count,), size, dtype=dtype, device=device)
                     for (height, width), count in zip(shapes, self.points) for size in (width, height)]  # fmt: skip
            return torch.stack((torch.cat(sizes[::2]), torch.cat(sizes[1::2])), -1)

        return self._scales.get((tuple(shapes), dtype, device), of_points)

    def _offset_scale(self, references: Tensor) -> float | Tensor:
        """What a predicted offset of 1 is, in widths and heights: one number, or (P, 1) where levels differ."""
        if not self.rounded:
            return self.offset_scale / self.points[0]
        scales = [self.offset_scale * float(np.float32(1 / count)) for count in self.points]
        if len(set(scales)) == 1:
            return scales[0]
        dtype, device = references.dtype, references.device
        of_levels = list(zip(scales, self.points))

        def of_points() -> Tensor:
            return torch.cat([torch.full((count, 1), scale, dtype=dtype, device=device) for scale, count in of_levels])

        return self._scales.get((dtype, device), of_points)


def sample_values(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> Tensor:
    """Bilinear samples, mixed by weights, in the way that is fastest here; zeros outside of the maps.

    Args:
        value: (B, S, H, d), the tokens of all levels.
        locations: (B, Q, H, P, 2), x and y in 0..1.
        weights: (B, Q, H, P).
        shapes, points: height and width of each level, and how many of the P points are in it.

    Returns:
        (B, Q, H * d), of the type of ``value``.
    """
    if kernel_serves(value, shapes):
        return sample_levels(value, locations, weights, [size for shape in shapes for size in shape], list(points))
    if value.device.type == "cpu" and not torch.is_grad_enabled():
        # grid_sample takes 1.3 to 1.6 times as long as the gather in a layer of tiny and small; with gradients the
        # gather is the slower one. The lookup takes 1.1 to 1.3 times as long, but can be exported.
        sample = _sample_lookup if torch.compiler.is_compiling() else _sample_gather
        return sample(value, locations, weights, shapes, points)
    if _matrix_is_faster(value, locations):
        return _sample_matrix(value, locations, weights, shapes, points)
    return sample_grid(value, locations, weights, shapes, points)


def _matrix_is_faster(value: Tensor, locations: Tensor) -> bool:
    """Whether ``_sample_matrix`` is to be used: in bf16 on a CPU, where the matrix is not too large."""
    if value.device.type != "cpu" or value.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False  # before any size is compared: a comparison would fix the batch size of an export
    batch, total, heads, _ = value.shape
    return batch * heads * locations.shape[1] * total <= MATRIX_ELEMENTS


def _sample_gather(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> Tensor:
    """The same as ``sample_grid`` as one weighted gather over the four corners of every point."""
    batch, total, heads, dim = value.shape
    count = locations.shape[1]
    index, share = _corners(locations, weights, shapes, points)
    index = _rows(index, total).view(batch * count * heads, -1)
    table = value.reshape(batch * total * heads, dim)
    bags = F.embedding_bag(index, table, mode="sum", per_sample_weights=share.to(value.dtype).view_as(index))
    return bags.view(batch, count, heads * dim)


def _sample_lookup(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> Tensor:
    """The same as ``_sample_gather`` in operators that every runtime has: a table lookup and a product with weights."""
    batch, total, heads, dim = value.shape
    index, share = _corners(locations, weights, shapes, points)
    rows = F.embedding(_rows(index, total), value.reshape(batch * total * heads, dim))
    return (share.to(value.dtype).unsqueeze(-2) @ rows).squeeze(-2).flatten(2)


def _rows(index: Tensor, total: int) -> Tensor:
    """Token indices (B, Q, H, ...) within an image to rows of a table (B * S * H, d); ``total`` is S."""
    batch, _, heads, _ = index.shape
    image = torch.arange(batch, device=index.device, dtype=index.dtype)[:, None, None, None]
    head = torch.arange(heads, device=index.device, dtype=index.dtype)[None, None, :, None]
    return index * heads + (image * (total * heads) + head)


def _sample_matrix(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> Tensor:
    """The same as ``sample_grid`` as a matrix product: the corners' shares, (B*H, Q, S) and mostly zero, times values.

    In bf16 on a CPU the backward pass of ``grid_sample`` is slow: without this function a training step of ``tiny``
    (batch 16, 192 x 192, two cores) takes 1.09 times as long, forward and backward of one layer 1.35 times.
    """
    batch, total, heads, dim = value.shape
    count = locations.shape[1]
    index, share = (
        x.transpose(1, 2).reshape(batch * heads * count, -1) for x in _corners(locations, weights, shapes, points)
    )
    index = index.long() + torch.arange(len(index), device=index.device)[:, None] * total
    # index_add_, since scatter_add_ takes a float32 copy of the whole matrix.
    matrix = value.new_zeros(len(index) * total).index_add_(0, index.view(-1), share.to(value.dtype).view(-1))
    mixed = matrix.view(batch * heads, count, total) @ value.transpose(1, 2).reshape(batch * heads, total, dim)
    return mixed.view(batch, heads, count, dim).transpose(1, 2).flatten(2)


def _corners(locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> tuple[Tensor, Tensor]:
    """The four tokens around every point and their shares times the weights: two tensors (B, Q, H, P * 4).

    The first holds token indices within the image; a corner outside its map has a share of zero. Indices are computed
    in integers, since a runtime that computes in bf16 would round those that it gets as floats.
    """
    levels = zip(shapes, _starts(shapes), points)
    per_point = [(w, h, start) for (h, w), start, count in levels for _ in range(count)]
    width, height, start = torch.tensor(per_point, dtype=torch.int32, device=locations.device)[..., None].unbind(1)
    step_x, step_y = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.int32, device=locations.device)
    locations = locations.unflatten(-1, (2, 1))
    x, y = locations[..., 0, :] * width - 0.5, locations[..., 1, :] * height - 0.5
    left, top = x.floor(), y.floor()
    corner_x, corner_y = left.int() + step_x, top.int() + step_y
    column = corner_x.clamp(min=0).minimum(width - 1)
    row = corner_y.clamp(min=0).minimum(height - 1)
    inside = (column == corner_x) & (row == corner_y)
    # The share of a corner is the area opposite to it.
    area = ((1 - step_x) - (x - left)).abs() * ((1 - step_y) - (y - top)).abs()
    share = area * inside * weights.unsqueeze(-1).to(locations.dtype)
    return (row * width + (column + start)).detach().flatten(3), share.flatten(3)


def _sample_nearest(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, points: Points) -> Tensor:
    """Samples of the nearest tokens (RT-DETRv2's discrete sampling), locations clamped to the map."""
    batch, _, heads, dim = value.shape
    count = locations.shape[1]
    indices = []
    for (height, width), start, of_level in zip(shapes, _starts(shapes), locations.split(list(points), 3)):
        x, y = of_level.unbind(-1)
        column = (x * width + 0.5).to(torch.int64).clamp(0, width - 1)
        row = (y * height + 0.5).to(torch.int64).clamp(0, height - 1)
        indices.append(start + row * width + column)
    index = torch.cat(indices, -1).transpose(1, 2).reshape(batch, heads, -1, 1).expand(-1, -1, -1, dim)
    samples = value.transpose(1, 2).gather(2, index).unflatten(2, (count, -1))
    mixed = (samples * weights.transpose(1, 2).unsqueeze(-1)).sum(3)
    return mixed.transpose(1, 2).flatten(2)


def _starts(shapes: Shapes) -> list[int]:
    """Index of each level's first token in the memory."""
    return [0, *accumulate(height * width for height, width in shapes[:-1])]

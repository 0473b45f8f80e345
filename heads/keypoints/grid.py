"""The grid points of a dense keypoint head: where they lie, the layers that predict from them, and how raw numbers of
these layers become boxes and points.

Every position of every map is a grid point. The maps are flattened and joined, (B, C, h, w) each to (B, S, C) in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvision.heads.query.anchors import grid_centres
from mvision.structures.boxes import xyxy_to_cxcywh

# Side of a grid point's reference box as a fraction of the image: on the finest of several levels (it doubles from
# level to level, as in the query decoder), and where one level has to predict objects of all sizes.
FINEST_SIZE, SINGLE_LEVEL_SIZE = 0.05, 0.2
MAX_LOG_SCALE = 4.0  # of a box to its reference size: exp(4) times the sizes above is larger than any image
INITIAL_SCORE = 0.01


class GridPoints(NamedTuple):
    """``centres`` (..., 2) x, y in 0..1, and ``sizes`` (...), the side of the reference box in 0..1."""

    centres: Tensor
    sizes: Tensor

    def at(self, index: Tensor) -> GridPoints:
        """The grid points with these indices, in the shape of ``index``."""
        return GridPoints(self.centres[index], self.sizes[index])


def make_grid(maps: list[Tensor]) -> GridPoints:
    """The S grid points of all maps (B, C, h, w), level after level, row by row, in float32 or better."""
    # In bf16, neighbouring coordinates of an image of 640 pixels are two pixels apart.
    dtype, device = torch.promote_types(maps[0].dtype, torch.float32), maps[0].device
    shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
    first = SINGLE_LEVEL_SIZE if len(maps) == 1 else FINEST_SIZE
    sizes = [
        torch.full((height * width,), first * 2.0**level, dtype=dtype, device=device)
        for level, (height, width) in enumerate(shapes)
    ]
    return GridPoints(grid_centres(shapes, device, dtype), torch.cat(sizes))


class Predictions(NamedTuple):
    """What grid points predict.

    ``boxes`` (..., 4) cxcywh in 0..1; ``points`` (..., K, 2) x, y in 0..1; ``visibility`` (..., K), the logits of each
    point's score.
    """

    boxes: Tensor
    points: Tensor
    visibility: Tensor


class Raw(NamedTuple):
    """Raw numbers of last layers.

    ``points`` (..., 3 K), x and y of every point relative to its reference and after these all the points' scores;
    ``logits`` (..., C) of the objects' scores; ``boxes`` (..., 4), None for ``PointLayers``.
    """

    points: Tensor
    logits: Tensor
    boxes: Tensor | None = None


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """(..., *) of values (A, B, *): those with these indices among all A * B, in the shape of ``rows`` (...)."""
    # index_select and not values[rows], whose gradient sorts the indices.
    return values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def raw_at(raws: Sequence[Raw], rows: Tensor, classes: Tensor, sizes: Sequence[int]) -> Raw:
    """What several sets of last layers give at grid points, one set after the other.

    Args:
        raws: of every set, (B, S, ...).
        rows: (M, n) int64, grid points by their index among the B * S of all images.
        classes: (M,) int64, the class among those of the set.
        sizes: how many of the M belong to each set.

    Returns:
        ``points`` (M, n, 3 K), ``boxes`` (M, n, 4) or None, and ``logits`` (M, n, 1) of the class alone, detached.
    """
    parts = rows.split(list(sizes))
    points = torch.cat([take_rows(raw.points, part) for raw, part in zip(raws, parts)])
    logits = []
    for raw, part, own in zip(raws, parts, classes[:, None].split(list(sizes))):
        index = torch.add(own, part, alpha=raw.logits.shape[-1])
        logits.append(take_rows(raw.logits.detach().flatten(0, 1), index))
    boxes = [take_rows(raw.boxes, part) for raw, part in zip(raws, parts) if raw.boxes is not None]
    return Raw(points, torch.cat(logits)[..., None], torch.cat(boxes) if boxes else None)


class PoseLayers(nn.Module):
    """A score for every class, a box, and points in the coordinates of that box.

    Like ``PointLayers`` these are the 1x1 convolutions that end the head, as linear layers on tokens (B, S, width). New
    layers give every object or point the score ``INITIAL_SCORE``, and boxes and points at the references of their grid
    point, as in the query decoder.
    """

    def __init__(self, width: int, num_classes: int, num_points: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, num_classes)
        self.box = nn.Linear(width, 4)
        self.points = nn.Linear(width, 3 * num_points)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, _logit(INITIAL_SCORE))
        for layer in (self.box, self.points):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Raw:
        return Raw(self.points(tokens), self.score(tokens), self.box(tokens))

    def rank(self, tokens: Tensor) -> Tensor:
        """The ``logits`` of every token, with no more computation than that needs."""
        return self.score(tokens)


class PointLayers(nn.Module):
    """Points with a score each, and nothing else: K x (x, y, score).

    An object's box is drawn around its points, and its score is the mean of theirs.
    """

    def __init__(self, width: int, num_points: int) -> None:
        super().__init__()
        self.num_points = num_points
        self.points = nn.Linear(width, 3 * num_points)
        nn.init.zeros_(self.points.weight)
        nn.init.zeros_(self.points.bias)
        nn.init.constant_(self.points.bias[2 * num_points :], _logit(INITIAL_SCORE))

    def forward(self, tokens: Tensor) -> Raw:
        points = self.points(tokens)
        scores = points[..., 2 * self.num_points :].to(torch.promote_types(points.dtype, torch.float32)).sigmoid()
        return Raw(points, torch.logit(scores.mean(-1, keepdim=True), eps=1e-6))

    def rank(self, tokens: Tensor) -> Tensor:
        """The ``logits`` of every token."""
        return self(tokens).logits


def decode(raw: Raw, grid: GridPoints) -> Predictions:
    """Boxes and points of grid points from their raw numbers, in the precision of ``grid``."""
    sizes = grid.sizes[..., None]
    num_points = raw.points.shape[-1] // 3
    numbers, visibility = raw.points.to(sizes.dtype).split((2 * num_points, num_points), -1)
    offsets = numbers.unflatten(-1, (num_points, 2))
    if raw.boxes is None:
        points = grid.centres[..., None, :] + offsets * sizes[..., None]
        corners = torch.cat((points.amin(-2), points.amax(-2)), -1)
        return Predictions(xyxy_to_cxcywh(corners), points, visibility)
    box = raw.boxes.to(sizes.dtype)
    centre = grid.centres + box[..., :2] * sizes
    extent = sizes * box[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    # Relative to a person's box a shoulder is nearly always in the same place, whatever the person's size. The box is
    # detached: it learns from its own loss terms alone.
    points = centre.detach()[..., None, :] + offsets * extent.detach()[..., None, :]
    return Predictions(torch.cat((centre, extent), -1), points, visibility)


def _logit(probability: float) -> float:
    return -math.log((1 - probability) / probability)

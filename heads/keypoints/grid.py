"""The grid points of a dense keypoint head: where they lie, the layers that predict from them, and how raw numbers of
these layers become boxes and points.

Every position of every map is a grid point. The maps are flattened and joined, (B, C, h, w) each to (B, S, C) in all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mvision.heads.query.decoder import grid_centres
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


class RawPoints(NamedTuple):
    """Raw numbers of ``PointLayers``: ``points`` (..., 3 K), x and y of every point and after these all the scores."""

    points: Tensor


class RawPoses(NamedTuple):
    """Raw numbers of ``PoseLayers``: ``points`` as in ``RawPoints``, ``logits`` (..., C) and ``boxes`` (..., 4)."""

    points: Tensor
    logits: Tensor
    boxes: Tensor


RawT = TypeVar("RawT", RawPoints, RawPoses)


def raw_at(raw: RawT, index: tuple[Tensor, ...]) -> RawT:
    """The raw numbers of the grid points (image, grid point) in ``index``."""
    return type(raw)(*(value[index] for value in raw))


class LastLayers(nn.Module, ABC, Generic[RawT]):
    """The 1x1 convolutions that end the head, as linear layers on tokens (B, S, width).

    New layers give every object or point the score ``INITIAL_SCORE``, and boxes and points at the references of their
    grid point, as in the query decoder.
    """

    points: nn.Linear

    def __init__(self, num_points: int) -> None:
        super().__init__()
        self.num_points = num_points

    @abstractmethod
    def forward(self, tokens: Tensor) -> RawT:
        """Raw numbers of every token."""

    @abstractmethod
    def rank(self, tokens: Tensor) -> Tensor:
        """``score_logits`` of every token, with no more computation than that needs."""

    @abstractmethod
    def score_logits(self, raw: RawT) -> Tensor:
        """(..., C) logits of the objects' scores."""

    @abstractmethod
    def decode(self, raw: RawT, grid: GridPoints) -> Predictions:
        """Boxes and points of grid points from their raw numbers, in the precision of ``grid``."""

    def visibility(self, raw: RawT) -> Tensor:
        """(..., K) logits of the points' scores."""
        return raw.points[..., 2 * self.num_points :]

    def offsets(self, raw: RawT, dtype: torch.dtype) -> Tensor:
        """(..., K, 2) x, y of the points relative to their reference."""
        return raw.points[..., : 2 * self.num_points].to(dtype).unflatten(-1, (self.num_points, 2))


class PoseLayers(LastLayers[RawPoses]):
    """A score for every class, a box, and points in the coordinates of that box."""

    def __init__(self, width: int, num_classes: int, num_points: int) -> None:
        super().__init__(num_points)
        self.score = nn.Linear(width, num_classes)
        self.box = nn.Linear(width, 4)
        self.points = nn.Linear(width, 3 * num_points)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, _logit(INITIAL_SCORE))
        for layer in (self.box, self.points):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> RawPoses:
        return RawPoses(self.points(tokens), self.score(tokens), self.box(tokens))

    def rank(self, tokens: Tensor) -> Tensor:
        return self.score(tokens)

    def score_logits(self, raw: RawPoses) -> Tensor:
        return raw.logits

    def decode(self, raw: RawPoses, grid: GridPoints) -> Predictions:
        sizes = grid.sizes[..., None]
        visibility = self.visibility(raw).to(sizes.dtype)
        offsets = self.offsets(raw, sizes.dtype)
        box = raw.boxes.to(sizes.dtype)
        centre = grid.centres + box[..., :2] * sizes
        extent = sizes * box[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
        # Relative to a person's box a shoulder is nearly always in the same place, whatever the person's size. The box
        # is detached: it learns from its own loss terms alone.
        points = centre.detach()[..., None, :] + offsets * extent.detach()[..., None, :]
        return Predictions(torch.cat((centre, extent), -1), points, visibility)


class PointLayers(LastLayers[RawPoints]):
    """Points with a score each, and nothing else: K x (x, y, score).

    An object's box is drawn around its points, and its score is the mean of theirs.
    """

    def __init__(self, width: int, num_points: int) -> None:
        super().__init__(num_points)
        self.points = nn.Linear(width, 3 * num_points)
        nn.init.zeros_(self.points.weight)
        nn.init.zeros_(self.points.bias)
        nn.init.constant_(self.points.bias[2 * num_points :], _logit(INITIAL_SCORE))

    def forward(self, tokens: Tensor) -> RawPoints:
        return RawPoints(self.points(tokens))

    def rank(self, tokens: Tensor) -> Tensor:
        return self.score_logits(self(tokens))

    def score_logits(self, raw: RawPoints) -> Tensor:
        """(..., 1)."""
        logits = self.visibility(raw)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.logit(logits.sigmoid().mean(-1, keepdim=True), eps=1e-6)

    def decode(self, raw: RawPoints, grid: GridPoints) -> Predictions:
        sizes = grid.sizes[..., None]
        visibility = self.visibility(raw).to(sizes.dtype)
        points = grid.centres[..., None, :] + self.offsets(raw, sizes.dtype) * sizes[..., None]
        corners = torch.cat((points.amin(-2), points.amax(-2)), -1)
        return Predictions(xyxy_to_cxcywh(corners), points, visibility)


def _logit(probability: float) -> float:
    return -math.log((1 - probability) / probability)

"""The cells of a dense keypoint head: where they lie, the layers that predict from them, what the predictions mean."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvision.heads.query.decoder import cell_centres
from mvision.structures.boxes import xyxy_to_cxcywh

# Side of the boxes that a cell starts from, as a fraction of the image: on the finest of several levels (doubling from
# there, as in the query decoder), and where one level has objects of all sizes.
FINEST_SIZE, ONLY_SIZE = 0.05, 0.2
LARGEST_GROWTH = 4.0  # exponent; exp(4) times the sizes above is larger than any image


class Cells(NamedTuple):
    """Where cells lie: ``centres`` (..., 2) x, y in 0..1, and ``sizes`` (...), what each starts from, in 0..1."""

    centres: Tensor
    sizes: Tensor

    def at(self, index: Tensor) -> Cells:
        """Some of the cells, (*index.shape)."""
        return Cells(self.centres[index], self.sizes[index])


def make_cells(maps: list[Tensor]) -> Cells:
    """The cells of all maps, (B, C, h, w) each, level after level, in float32 or better."""
    # bf16 has a step of two pixels at 640.
    dtype, device = torch.promote_types(maps[0].dtype, torch.float32), maps[0].device
    shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
    first = ONLY_SIZE if len(maps) == 1 else FINEST_SIZE
    sizes = [
        torch.full((height * width,), first * 2.0**level, dtype=dtype, device=device)
        for level, (height, width) in enumerate(shapes)
    ]
    return Cells(cell_centres(shapes, device, dtype), torch.cat(sizes))


class FoundPoints(NamedTuple):
    """What cells predict.

    ``boxes`` (..., 4) cxcywh in 0..1; ``points`` (..., K, 2) x, y in 0..1; ``visibility`` (..., K), logits of "the
    point is there".
    """

    boxes: Tensor
    points: Tensor
    visibility: Tensor


class CellLayers(nn.Module):
    """The 1x1 convolutions that end the head, on cells in one row (B, S, width) instead of maps.

    Returns raw numbers: ``points`` (B, S, 3 K), x, y of every point and then their scores, and unless ``with_boxes`` is
    False ``logits`` (B, S, C) and ``boxes`` (B, S, 4). ``decode`` and ``score_logits`` say what they mean.
    """

    def __init__(self, width: int, num_classes: int, num_points: int, with_boxes: bool) -> None:
        super().__init__()
        self.num_points = num_points
        self.score = nn.Linear(width, num_classes) if with_boxes else None
        self.box = nn.Linear(width, 4) if with_boxes else None
        self.points = nn.Linear(width, 3 * num_points)
        # Scores start at 0.01, boxes and points at their references, as in the query decoder.
        low = -math.log((1 - 0.01) / 0.01)
        nn.init.zeros_(self.points.weight)
        nn.init.zeros_(self.points.bias)
        if self.score is None or self.box is None:
            nn.init.constant_(self.points.bias[2 * num_points :], low)
            return
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, low)
        nn.init.zeros_(self.box.weight)
        nn.init.zeros_(self.box.bias)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        raw = {"points": self.points(tokens)}
        if self.score is not None and self.box is not None:
            raw |= {"logits": self.score(tokens), "boxes": self.box(tokens)}
        return raw

    def visibility(self, raw: dict[str, Tensor]) -> Tensor:
        """(..., K) logits of the points' scores, among the raw numbers."""
        return raw["points"][..., 2 * self.num_points :]

    def score_logits(self, raw: dict[str, Tensor]) -> Tensor:
        """(..., C) logits of the objects' scores. Cells without any have the mean score of their points, (..., 1)."""
        if "logits" in raw:
            return raw["logits"]
        points = self.visibility(raw)
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        return torch.logit(points.sigmoid().mean(-1, keepdim=True), eps=1e-6)

    def decode(self, raw: dict[str, Tensor], cells: Cells) -> FoundPoints:
        """Boxes and points from the raw numbers of cells, in the precision of ``cells``."""
        sizes = cells.sizes[..., None]
        visibility = self.visibility(raw).to(sizes.dtype)
        offsets = raw["points"][..., : 2 * self.num_points].to(sizes.dtype).unflatten(-1, (self.num_points, 2))
        if "boxes" not in raw:
            points = cells.centres[..., None, :] + offsets * sizes[..., None]
            around = torch.cat((points.amin(-2), points.amax(-2)), -1)
            return FoundPoints(xyxy_to_cxcywh(around), points, visibility)
        box = raw["boxes"].to(sizes.dtype)
        middle = cells.centres + box[..., :2] * sizes
        extent = sizes * box[..., 2:].clamp(max=LARGEST_GROWTH).exp()
        # In a person's own box a shoulder is nearly always in the same place, whatever the person's size. The box is
        # given here: its own losses teach it.
        points = middle.detach()[..., None, :] + offsets * extent.detach()[..., None, :]
        return FoundPoints(torch.cat((middle, extent), -1), points, visibility)

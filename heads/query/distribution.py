"""Boxes as distributions: every side is the mean of a distribution over fixed distances from the side of a first box.

A side has ``num_bins`` + 1 distances, the bin values, close together around zero and far apart at both ends. The unit
is a fraction 1 / ``bin_scale`` of the width or height of the first box, and outwards is positive. Each layer of the
decoder adds to the logits of the distributions ("corners"), so that all layers refine one distribution instead of
moving a box.

Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
section 4.1; the estimate of the location's quality from the distribution is that of Li et al., "Generalized Focal Loss
V2", CVPR 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvision.neck.cached import ShapeCache, in_graph
from mvision.structures.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

TOP = 4
"""Largest probabilities of a side that ``statistics`` takes."""
STATISTICS = 4 * (TOP + 1)
"""Numbers that ``statistics`` gives for a box."""


def bin_values(num_bins: int, bin_scale: float, bin_reach: float) -> list[float]:
    """The ``num_bins`` + 1 distances of a side, ascending and symmetric around 0 in the middle.

    Args:
        num_bins: even, at least 4.
        bin_scale: the unit is the side's width or height divided by this.
        bin_reach: the distances of the last bin but one on both sides, in widths or heights; those of the last are
            twice as far away. (The value of the last but one is U = reach * scale, that of the i-th bin from the middle
            (U + 1) ^ (2 i / (num_bins - 2)) - 1.)
    """
    reach = bin_reach * bin_scale
    step = (reach + 1) ** (2 / (num_bins - 2))
    inner = [step**index - 1 for index in range(1, num_bins // 2)]
    return [-2 * reach, *(-value for value in reversed(inner)), 0.0, *inner, 2 * reach]


class BoxDistribution(nn.Module):
    """The way from the logits of the distributions to boxes, and back.

    It has no parameters: the bin values follow from the arguments, see ``bin_values``.
    """

    def __init__(self, num_bins: int, bin_scale: float, bin_reach: float) -> None:
        super().__init__()
        self.scale, self.reach = bin_scale, bin_reach
        self.bins = bin_values(num_bins, bin_scale, bin_reach)
        self._values = ShapeCache()

    def values(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(``num_bins`` + 1,) the bin values; not to be changed in place."""
        if in_graph():
            return self._computed_values(dtype, device)
        return self._values.get((dtype, device), lambda: torch.tensor(self.bins, dtype=dtype).to(device))

    def _computed_values(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same made on the device: a compiled model would copy a list to a GPU in every pass."""
        half, last = len(self.bins) // 2, 2 * self.reach * self.scale
        index = torch.arange(-half, half + 1, dtype=dtype, device=device)
        exponent = math.log(self.reach * self.scale + 1) / (half - 1)
        size = torch.where(index.abs() < half, (index.abs() * exponent).expm1(), last)
        return index.sign() * size

    def probabilities(self, corners: Tensor) -> Tensor:
        """(..., 4 * (num_bins + 1)) logits to (..., 4, num_bins + 1); they should be float32 or better."""
        return corners.unflatten(-1, (4, len(self.bins))).softmax(-1)

    def boxes(self, probabilities: Tensor, initial: Tensor) -> Tensor:
        """(..., 4) cxcywh in 0..1.

        Args:
            probabilities: (..., 4, num_bins + 1) of the left, upper, right and lower side.
            initial: (..., 4) cxcywh in 0..1, the first box.
        """
        # Not as a matrix product, which autocast, and OpenVINO whatever it is told, would compute in bf16.
        distances = (probabilities * self.values(probabilities.dtype, probabilities.device)).sum(-1)
        centre, size = initial.split(2, -1)
        low, high = ((0.5 * self.scale + part) * (size / self.scale) for part in distances.split(2, -1))
        return xyxy_to_cxcywh(torch.cat((centre - low, centre + high), -1))

    def bins_of(self, boxes: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Which two neighbouring bins have the sides of ``boxes`` as their weighted mean; the inverse of ``boxes``.

        Args:
            boxes, initial: (..., 4) cxcywh in 0..1.

        Returns:
            (..., 4) int64 the lower bin of each side, 0..num_bins - 1, and (..., 4) the weight of the bin above it in
            0..1; that of the lower one is the rest. A side out of reach has all weight in the first or last bin.
        """
        centre, size = initial.split(2, -1)
        low, high = cxcywh_to_xyxy(boxes).split(2, -1)
        unit = (size / self.scale).clamp(min=torch.finfo(size.dtype).tiny)
        distances = torch.cat(((centre - low) / unit, (high - centre) / unit), -1) - 0.5 * self.scale
        values = self.values(distances.dtype, distances.device)
        lower = (torch.bucketize(distances, values, right=True) - 1).clamp(0, len(self.bins) - 2)
        start, end = values.take(lower), values.take(lower + 1)
        return lower, ((distances - start) / (end - start)).clamp(0, 1)


def statistics(probabilities: Tensor) -> Tensor:
    """How peaked the distributions of a box are: (..., 4, num_bins + 1) to (..., ``STATISTICS``).

    The ``TOP`` largest probabilities of every side and their mean, side by side.
    """
    top = probabilities.topk(TOP, -1).values
    return torch.cat((top, top.mean(-1, keepdim=True)), -1).flatten(-2)

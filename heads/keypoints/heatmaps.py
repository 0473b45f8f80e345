"""Exact places of keypoints: a small map for every point of every found object, in a window around the object.

A map is the product of an embedding, made by the cell that found the object, and pixel features, plus a prior around
the place that the cell itself predicts for the point. So the cell says whose left knee is meant and roughly where it
is, and the pixels say where exactly; objects of all sizes get maps of the same resolution, and the cost grows with the
number of objects, not with the image.

A map is taught as a distribution over places (cross-entropy), and the place is chosen at the end, by the OKS to expect.
With most of the weight on the OKS of the map's mean instead, less was learned (AP 0.113 against 0.130 after 440 steps
of the built-in set, both read in the same way).

Sources of the idea: the window and the softmax over it are those of Mask R-CNN's keypoint head (He et al., ICCV 2017),
filters made per instance those of FCPose (Mao et al., CVPR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.heads.pixel_features import PixelFeatures
from mvision.neck.layers import without_autocast

GRID = 24  # places along each side of a window
MARGIN = 1.3  # sides of a window, in sides of the object's box
STRIDE = 4  # of the pixel features
SPREAD = 0.25  # of a new prior: standard deviation in sides of the box
SPREADS = (0.02, 2.0)  # of any prior
LOWEST = -8.0  # of the prior along each axis: what is far away stays possible
# The largest sigma that maps are taught and read with, that of COCO's hips: by looser ones any place would be good.
LARGEST_SIGMA = 0.107
# Area of an object by that of its box, where only the box is known. People of the built-in set: 0.47 in the median.
FILL = 0.5
SHARPEST = 0.6  # standard deviation of a taught map, at least, in steps of the grid


class PointMaps(nn.Module):
    """Pixel features, the layer that makes embeddings of cells, and the maps made of both.

    Args:
        channels, strides: of the neck's maps, finest first.
        lateral: channels of the backbone's map of stride ``STRIDE``, or None.
        width: of the layers that make the pixel features.
        dim: length of an embedding.
        cell_width: channels of a cell.
        num_points: K.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        lateral: int | None,
        width: int,
        dim: int,
        cell_width: int,
        num_points: int,
    ) -> None:
        super().__init__()
        self.pixels = PixelFeatures(channels, strides, lateral, STRIDE, width, dim)
        self.num_points, self.dim = num_points, dim
        self.embed = nn.Linear(cell_width, num_points * (dim + 1))
        nn.init.normal_(self.embed.weight, std=0.01)
        nn.init.zeros_(self.embed.bias)
        with torch.no_grad():
            bias = self.embed.bias.view(num_points, dim + 1)
            bias[:, :dim] = torch.randn(num_points, dim)
            bias[:, dim] = math.log(SPREAD)

    def read(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """Pixel features (B, d, h, w) in the windows of boxes (B, N, 4): (B, N, d, GRID, GRID) float32."""
        x, y = window(boxes)
        shape = (*boxes.shape[:2], GRID, GRID)
        places = torch.stack((x[..., None, :].expand(shape), y[..., None].expand(shape)), -1)
        # float32, contiguous: grid_sample is wrong on strided bf16 views on CPU.
        with without_autocast(pixels):
            at = F.grid_sample(
                pixels.float().contiguous(),
                2 * places.flatten(1, 2).float() - 1,
                padding_mode="border",
                align_corners=False,
            )
        return at.unflatten(2, (boxes.shape[1], GRID)).transpose(1, 2)

    def logits(self, at: Tensor, cells: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
        """Maps before the softmax.

        Args:
            at: (..., d, GRID, GRID), see ``read``.
            cells: (..., width).
            boxes: (..., 4) cxcywh in 0..1, that the windows were made of.
            points: (..., K, 2) x, y in 0..1, where the cells expect the points.

        Returns:
            (..., K, GRID, GRID) float32.
        """
        with without_autocast(at):
            embedded = self.embed(cells.to(self.embed.weight.dtype)).unflatten(-1, (self.num_points, self.dim + 1))
            product = (embedded[..., :-1].float() / math.sqrt(self.dim)) @ at.flatten(-2)
            low, high = map(math.log, SPREADS)
            spread = embedded[..., -1, None].float().clamp(low, high).exp()
            prior = []
            for axis, places in enumerate(window(boxes.float())):
                side = boxes[..., None, None, 2 + axis].float().clamp(min=1e-3)
                away = (places[..., None, :] - points[..., axis, None].float()) / (side * spread)
                prior.append((-0.5 * away.square()).clamp(min=LOWEST))
            return product.unflatten(-1, (GRID, GRID)) + prior[0][..., None, :] + prior[1][..., None]


def window(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 4) cxcywh -> x of the columns and y of the rows, (..., GRID) each, of an even grid over enlarged boxes."""
    steps = ((torch.arange(GRID, device=boxes.device, dtype=boxes.dtype) + 0.5) / GRID - 0.5) * MARGIN
    x, y = (boxes[..., axis, None] + steps * boxes[..., 2 + axis, None] for axis in (0, 1))
    return x, y


def likely_reach(boxes: Tensor, sigmas: Tensor, shape: tuple[int, int]) -> Tensor:
    """(..., K, 2) standard deviation of the similarity along x and y, for objects of which the box alone is known.

    Args:
        boxes: (..., 4) cxcywh in 0..1.
        sigmas: (..., K).
        shape: height and width of the image, in any unit: its aspect counts.
    """
    height, width = shape
    scale = (FILL * height * width * boxes[..., 2:].prod(-1)).sqrt()
    reach = 2 * sigmas.to(scale).clamp(max=LARGEST_SIGMA) * scale[..., None]
    return torch.stack((reach / width, reach / height), -1)


def likeliest(logits: Tensor, boxes: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The places that promise the largest OKS, and how much.

    The maximum of a map alone would ignore how much lies beside it, and the mean of two far places is none of them. The
    OKS says how much a near miss counts: smoothed by it, a map is the similarity to expect of every place.

    Args:
        logits: (..., K, GRID, GRID).
        boxes: (..., 4) of the windows.
        reach: (..., K, 2) standard deviation of the similarity along x and y, in 0..1 of the image.

    Returns:
        (..., K, 2) places, and (..., K) expected similarities.
    """
    chance = logits.flatten(-2).softmax(-1).view_as(logits)
    axes = window(boxes.float())
    near = []
    for axis, places in enumerate(axes):
        step = MARGIN / GRID * boxes[..., None, 2 + axis].float()
        width = torch.maximum(reach[..., axis].float(), step)[..., None, None]
        away = (places[..., :, None] - places[..., None, :])[..., None, :, :]
        near.append((-0.5 * (away / width).square()).exp())
    similar, best = (near[1] @ chance @ near[0]).flatten(-2).max(-1)
    # Between the grid's places: the mean of what lies within reach.
    across, down = (
        matrix.gather(-2, index[..., None, None].expand(*index.shape, 1, GRID)).squeeze(-2)
        for matrix, index in zip(near, (best % GRID, best // GRID))
    )
    masses = (down[..., None, :] @ chance).squeeze(-2) * across, (chance @ across[..., None]).squeeze(-1) * down
    found = [(mass * at[..., None, :]).sum(-1) / mass.sum(-1).clamp(min=1e-12) for mass, at in zip(masses, axes)]
    return torch.stack(found, -1), similar


def map_loss(logits: Tensor, boxes: Tensor, points: Tensor, deviation: Tensor) -> Tensor:
    """Kullback-Leibler divergence of maps from a Gaussian around the true places: cross-entropy that can reach zero.

    Args:
        logits: (..., K, GRID, GRID).
        boxes: (..., 4) of the windows.
        points: (..., K, 2) x, y in 0..1, in the windows.
        deviation: (..., K, 2) of the Gaussians along x and y, in 0..1.

    Returns:
        (..., K)
    """
    with torch.no_grad():
        targets = []
        for axis, places in enumerate(window(boxes.float())):
            step = MARGIN / GRID * boxes[..., None, None, 2 + axis].float()
            width = torch.maximum(deviation[..., axis, None].float(), SHARPEST * step)
            targets.append((-0.5 * ((places[..., None, :] - points[..., axis, None]) / width).square()).softmax(-1))
        across, down = targets
        entropy = -(torch.xlogy(across, across) + torch.xlogy(down, down)).sum(-1)
    expected = ((down[..., None, :] @ logits).squeeze(-2) * across).sum(-1)
    return logits.flatten(-2).logsumexp(-1) - expected - entropy


def in_window(boxes: Tensor, points: Tensor) -> Tensor:
    """(..., K) bool: which points (..., K, 2) lie in the windows of boxes (..., 4)."""
    return ((points - boxes[..., None, :2]).abs() <= MARGIN / 2 * boxes[..., None, 2:]).all(-1)


def pad_rows(image: Tensor, batch: int, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Objects in one row, those of an image after each other, as (B, most, ...); with the index that leads back."""
    counts = image.bincount(minlength=batch)
    slot = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    most = int(counts.max()) if len(image) else 0
    index = (image, slot)
    return rows.new_zeros(batch, most, *rows.shape[1:]).index_put(index, rows), index

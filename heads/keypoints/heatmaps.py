"""Exact places of keypoints: a heatmap for every point of every predicted object, in a window around the object.

A heatmap is the dot product of pixel features with an embedding, which is made from the token that predicts the object,
plus a prior around the place that the token itself predicts for the point. So the token decides whose left knee is
meant and roughly where it is, and the pixels decide where exactly. Objects of all sizes get heatmaps of the same
resolution, and the cost grows with the number of objects, not with the size of the image.

Heatmaps are trained as distributions over places (cross-entropy), and the place is chosen afterwards as that of the
largest expected OKS. Training most of all the OKS of the heatmap's mean instead gave worse results (AP 0.113 against
0.130 after 440 steps on the built-in data set, with places chosen in the same way).

Sources of the idea: the window and the softmax over it are from Mask R-CNN's keypoint head (He et al., ICCV 2017),
filters that are predicted per instance from FCPose (Mao et al., CVPR 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.heads.pixel_features import PixelFeatures
from mvision.neck.layers import without_autocast

RESOLUTION = 24  # R, cells of a heatmap along each side
WINDOW_SCALE = 1.3  # sides of a window divided by those of the object's box
INITIAL_PRIOR_STD = 0.25  # standard deviation of a new prior, in sides of the box
PRIOR_STD_RANGE = (0.02, 2.0)  # limits of the learned one, in sides of the box
MIN_PRIOR_LOGIT = -8.0  # along each axis: places far from the prior's centre stay possible
# The largest sigma that is used in training and in choosing places, that of COCO's hips: with larger ones nearly every
# place would count as good.
MAX_SIGMA = 0.107
# Area of an object divided by that of its box, where the box alone is known: the median of the built-in people is 0.47.
AREA_OF_BOX = 0.5
MIN_TARGET_STD = 0.6  # standard deviation of a target heatmap, at least, in cells of the heatmap


class Heatmaps(nn.Module):
    """Pixel features, the layer that makes embeddings from tokens, and the heatmaps that are made from both.

    Args:
        pixels: gives the pixel features.
        token_width: channels of a token.
        num_points: K.
    """

    def __init__(self, pixels: PixelFeatures, token_width: int, num_points: int) -> None:
        super().__init__()
        # ``pixels`` and ``embed`` are part of the names of tensors in weights files.
        self.pixels, self.num_points = pixels, num_points
        self.dim = dim = pixels.out.out_channels  # d, the length of an embedding
        self.embed = nn.Linear(token_width, num_points * (dim + 1))
        nn.init.normal_(self.embed.weight, std=0.01)
        nn.init.zeros_(self.embed.bias)
        with torch.no_grad():
            bias = self.embed.bias.view(num_points, dim + 1)
            bias[:, :dim] = torch.randn(num_points, dim)
            bias[:, dim] = math.log(INITIAL_PRIOR_STD)

    def sample(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """Pixel features (B, d, h, w) at the cells of the windows of boxes (B, N, 4): (B, N, d, R, R) float32."""
        x, y = window(boxes).float().unbind(-2)
        with without_autocast(pixels):
            # float32, contiguous: grid_sample is wrong on strided bf16 views on CPU.
            pixels = pixels.float().contiguous()
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                return _looked_up(pixels, x, y)
            shape = (*boxes.shape[:2], RESOLUTION, RESOLUTION)
            places = torch.stack((x[..., None, :].expand(shape), y[..., None].expand(shape)), -1)
            places = 2 * places.flatten(1, 2) - 1
            sampled = F.grid_sample(pixels, places, padding_mode="border", align_corners=False)
        return sampled.unflatten(2, (boxes.shape[1], RESOLUTION)).transpose(1, 2)

    def logits(self, sampled: Tensor, tokens: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
        """Heatmaps before the softmax.

        Args:
            sampled: (..., d, R, R), see ``sample``.
            tokens: (..., token_width).
            boxes: (..., 4) cxcywh in 0..1, those of the windows.
            points: (..., K, 2) x, y in 0..1, as predicted from the tokens.

        Returns:
            (..., K, R, R) float32.
        """
        with without_autocast(sampled):
            embedded = self.embed(tokens.to(self.embed.weight.dtype)).unflatten(-1, (self.num_points, self.dim + 1))
            product = (embedded[..., :-1].float() / math.sqrt(self.dim)) @ sampled.flatten(-2)
            low, high = map(math.log, PRIOR_STD_RANGE)
            prior_std = embedded[..., -1, None].float().clamp(low, high).exp()
            sides = boxes[..., None, 2:].float().clamp(min=1e-3)
            distance = window(boxes.float())[..., None, :, :] - points[..., None].float()
            distance = distance / (sides * prior_std)[..., None]
            x, y = (-0.5 * distance.square()).clamp(min=MIN_PRIOR_LOGIT).unbind(-2)
            return product.unflatten(-1, (RESOLUTION, RESOLUTION)) + x[..., None, :] + y[..., None]


def _looked_up(pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The same as ``grid_sample`` in table lookups, for exports and compiled predictions.

    Several runtimes are slow in their own ``grid_sample``; PyTorch is not (docs/deploy.md has the times).

    Args:
        pixels: (B, d, h, w) float32.
        x, y: (B, N, R) float32, of the columns and rows of every window, in 0..1 of the map; its border is continued.

    Returns:
        (B, N, d, R, R)
    """
    batch, dim, height, width = pixels.shape
    table = pixels.flatten(2).transpose(1, 2).reshape(batch * height * width, dim)
    (left, right, to_right), (above, below, to_below) = _neighbours(x, width), _neighbours(y, height)
    image = torch.arange(batch, device=x.device)[:, None, None] * (height * width)

    def along_row(row: Tensor) -> Tensor:
        start = (image + row * width)[..., None]
        first, second = (F.embedding(start + column[..., None, :], table) for column in (left, right))
        return first + to_right[..., None, :, None] * (second - first)

    first, second = along_row(above), along_row(below)
    sampled = first + to_below[..., None, None] * (second - first)
    return sampled.flatten(2, 3).transpose(2, 3).unflatten(3, (RESOLUTION, RESOLUTION))


def _neighbours(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For places in 0..1 along ``size`` cells: the indices of the two nearest cells, and the share of the second."""
    places = (places * size - 0.5).clamp(0, size - 1)
    first = places.floor()
    index = first.long().clamp(0, size - 1)  # of a place that is not a number as well
    return index, (index + 1).clamp(max=size - 1), places - first


def window(boxes: Tensor) -> Tensor:
    """The cells of the windows of boxes (..., 4) cxcywh: x of the columns and y of the rows, (..., 2, R)."""
    step = WINDOW_SCALE / RESOLUTION
    steps = torch.arange(RESOLUTION, device=boxes.device, dtype=boxes.dtype) * step + (step - WINDOW_SCALE) / 2
    return torch.addcmul(boxes[..., :2, None], boxes[..., 2:, None], steps)


def cell_sides(boxes: Tensor) -> Tensor:
    """Width and height of a heatmap's cells in 0..1 of the image, for boxes (..., 4): (..., 2) float32."""
    return WINDOW_SCALE / RESOLUTION * boxes[..., 2:].float()


def estimated_similarity_std(boxes: Tensor, sigmas: Tensor, shape: tuple[int, int]) -> Tensor:
    """Standard deviation of the point similarity (a Gaussian), of objects of which only a predicted box is known.

    Args:
        boxes: (..., 4) cxcywh in 0..1.
        sigmas: (..., K).
        shape: height and width of the image in any unit; only their ratio matters.

    Returns:
        (..., K, 2) along x and y, as fractions of the image's width and height.
    """
    height, width = shape
    scale = (AREA_OF_BOX * height * width * boxes[..., 2:].prod(-1)).sqrt()
    std = 2 * sigmas.to(scale).clamp(max=MAX_SIGMA) * scale[..., None]
    return torch.stack((std / width, std / height), -1)


def best_places(logits: Tensor, boxes: Tensor, similarity_std: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the largest expected similarity, and that similarity.

    The maximum of a heatmap would ignore how much probability lies near it, and the mean of two distant modes lies at
    neither. The expected similarity of a place is the heatmap smoothed by the Gaussian of the similarity.

    Args:
        logits: (..., K, R, R).
        boxes: (..., 4) cxcywh in 0..1, those of the windows.
        similarity_std: (..., K, 2) standard deviation of the similarity along x and y, in 0..1 of the image.

    Returns:
        (..., K, 2) x, y in 0..1, and (..., K) expected similarities in 0..1.
    """
    probabilities = logits.flatten(-2).softmax(-1).view_as(logits)
    # Cells lie equally far from each other, so the similarity of two depends on the difference of their indices alone.
    sides = cell_sides(boxes)[..., None, :]
    in_cells = sides / torch.maximum(similarity_std.float(), sides)
    index = torch.arange(RESOLUTION, device=boxes.device)
    # Along x and y: (..., K, R, R), of every cell's centre to every other's.
    along = (-0.5 * (in_cells[..., None, None] * (index[:, None] - index)).square()).exp().unbind(-3)
    expected, best = (along[1] @ probabilities @ along[0]).flatten(-2).max(-1)
    # Finer than the cells: the mean place of the probability around the best cell, weighted by the similarity to it.
    to_x, to_y = (
        matrix.gather(-2, index[..., None, None].expand(*index.shape, 1, RESOLUTION)).squeeze(-2)
        for matrix, index in zip(along, (best % RESOLUTION, best // RESOLUTION))
    )
    weights = torch.stack(
        (
            (to_y[..., None, :] @ probabilities).squeeze(-2) * to_x,
            (probabilities @ to_x[..., None]).squeeze(-1) * to_y,
        ),
        -2,
    )
    places = window(boxes.float())[..., None, :, :]
    return (weights * places).sum(-1) / weights.sum(-1).clamp(min=1e-12), expected


def heatmap_loss(logits: Tensor, boxes: Tensor, points: Tensor, target_std: Tensor) -> Tensor:
    """Kullback-Leibler divergence from a Gaussian around the true places: cross-entropy whose minimum is zero.

    Args:
        logits: (..., K, R, R).
        boxes: (..., 4) cxcywh in 0..1, those of the windows.
        points: (..., K, 2) true x, y in 0..1, inside the windows.
        target_std: (..., K, 2) standard deviations of the Gaussians along x and y, in 0..1 of the image.

    Returns:
        (..., K)
    """
    with torch.no_grad():
        std = torch.maximum(target_std.float(), MIN_TARGET_STD * cell_sides(boxes)[..., None, :])
        distance = window(boxes.float())[..., None, :, :] - points[..., None]
        along = (-0.5 * (distance / std[..., None]).square()).softmax(-1)
        entropy = -torch.xlogy(along, along).sum((-2, -1))
        along_x, along_y = along.unbind(-2)
    expected_logit = ((along_y[..., None, :] @ logits).squeeze(-2) * along_x).sum(-1)
    return logits.flatten(-2).logsumexp(-1) - expected_logit - entropy


def in_window(boxes: Tensor, points: Tensor) -> Tensor:
    """(..., K) bool: which points (..., K, 2) lie in the windows of boxes (..., 4)."""
    return ((points - boxes[..., None, :2]).abs() <= WINDOW_SCALE / 2 * boxes[..., None, 2:]).all(-1)

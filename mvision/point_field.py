"""Fields that lead keypoints to their exact places: at every pixel, the way to the nearest point of each kind.

What a cell predicts for a whole object is rough; what a pixel sees of one joint is exact. A field is learned from
places scattered around the labelled points, so it learns from every point in every step, however bad predictions are.
Sources of the idea: Papandreou et al., "PersonLab", ECCV 2018, section 3.1 (short-range offsets and their iteration);
the refinement of DETR's boxes layer by layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 2  # readings of the field at inference
REACH = 0.1  # of the image that a field value of 1 stands for
SCATTER = 0.3  # largest distance from a labelled point that the field learns at, in sides of the object's box
SAMPLES = 4  # places per labelled point and step


def follow(field: Tensor, points: Tensor) -> Tensor:
    """One step: ``points`` (B, N, K, 2) x, y in 0..1 moved as the field (B, 2 K, h, w) says there."""
    batch, count, kinds, _ = points.shape
    maps = field.unflatten(1, (kinds, 2)).flatten(0, 1)
    grid = (2 * points - 1).transpose(1, 2).reshape(batch * kinds, 1, count, 2)
    # float32, contiguous: grid_sample is wrong on strided bf16 views on CPU.
    with torch.autocast(field.device.type, enabled=False):
        way = F.grid_sample(maps.float().contiguous(), grid.float(), padding_mode="border", align_corners=False)
    way = way.view(batch, kinds, 2, count).permute(0, 3, 1, 2)
    return points + REACH * way.to(points.dtype)


def follow_of(field: Tensor, image: Tensor, points: Tensor) -> Tensor:
    """The same for objects in one row: (M, n, K, 2), those of one image after the other, ``image`` (M,)."""
    counts = image.bincount(minlength=len(field))
    slot = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    most = int(counts.max()) if len(image) else 0
    padded = points.new_zeros(len(field), most, *points.shape[1:])
    padded = padded.index_put((image, slot), points)
    return follow(field, padded.flatten(1, 2)).view_as(padded)[image, slot]


@torch.no_grad()
def scatter(points: Tensor, boxes: Tensor) -> Tensor:
    """(M, SAMPLES, K, 2) places around labelled points (M, K, 2) of objects with these boxes (M, 4) cxcywh."""
    shape = (len(points), SAMPLES, *points.shape[1:])
    # Denser near the point: the last step has to be exact.
    reach = SCATTER * boxes[:, 2:].amax(-1)[:, None, None, None] * torch.rand(*shape[:3], 1, device=points.device)
    return (points[:, None] + reach * (2 * torch.rand(shape, device=points.device) - 1)).clamp(0, 1)

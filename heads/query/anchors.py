"""Anchors: the boxes that the decoder's tokens start from, and the centres of the positions of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor

from mvision.heads.query.sampling import Shapes


def make_anchors(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of one square box per token, centred on it: 0.05 wide on the finest level, twice as wide on each next one.

    Returns:
        (1, S, 4) logits of cxcywh in 0..1, and (1, S, 1) bool: False where a coordinate lies outside 0.01..0.99. The
        features of such tokens are set to zero, and their logits here are the largest finite number (the convention
        of the reference implementation). At 640 x 640 these are the 316 tokens at the border of the finest level.
    """
    boxes = []
    for level, (height, width) in enumerate(shapes):
        centres = grid_centres([(height, width)], device, dtype)
        boxes.append(torch.cat((centres, torch.full_like(centres, 0.05 * 2.0**level)), -1))
    anchors = torch.cat(boxes).unsqueeze(0)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return torch.where(valid, torch.log(anchors / (1 - anchors)), torch.finfo(dtype).max), valid


def anchors_and_border(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """``make_anchors``, and the indices (int64) of the tokens whose features are set to zero."""
    anchors, valid = make_anchors(shapes, torch.device("cpu"), dtype)
    return anchors.to(device), (~valid.flatten()).nonzero().flatten().to(device)


def grid_centres(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(S, 2) x, y in 0..1 of the centre of every position of maps of these (height, width), map by map, row by row."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), -1).flatten(0, 1))
    return torch.cat(centres)


def box_dtype(memory: Tensor) -> torch.dtype:
    """Boxes are kept in float32 or better: neighbouring bf16 numbers are up to two pixels apart at 640."""
    return torch.promote_types(memory.dtype, torch.float32)

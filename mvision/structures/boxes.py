"""Boxes: two formats, one conversion each way, and overlaps that are safe on boxes of zero area.

``cxcywh`` is centre, width, height in fractions of the image (0..1): what models and ``Targets`` use.
``xyxy`` is left, top, right, bottom: in pixels for ``Instances``, in fractions inside losses.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre, width, height to left, top, right, bottom, in the same unit."""
    centre, size = boxes.split(2, dim=-1)
    half = size / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) left, top, right, bottom to centre, width, height, in the same unit."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of values in 0..1, clamped by ``eps`` on both sides (as DETR's family does)."""
    return torch.logit(x, eps)  # one operator: decoders call it in every layer


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of broadcastable xyxy boxes, element by element.

    Args:
        a, b: (..., 4) xyxy. For all pairs pass ``a[:, None]`` and ``b[None]``.

    Returns:
        IoU in 0..1 and GIoU in -1..1, both of the broadcast shape without the last dimension. Boxes without area give
        IoU 0 and never NaN.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    eps = torch.finfo(a.dtype).tiny
    (low_a, high_a), (low_b, high_b) = a.split(2, dim=-1), b.split(2, dim=-1)
    inner, union = _inner_and_union(a, b)
    outer = _area(torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b))
    overlap = inner / union.clamp(min=eps)
    return overlap, overlap - (outer - union) / outer.clamp(min=eps)


def plain_iou(a: Tensor, b: Tensor) -> Tensor:
    """The first result of ``iou`` alone, in two thirds of the operators."""
    inner, union = _inner_and_union(a, b)
    return inner / union.clamp(min=torch.finfo(a.dtype).tiny)


def _inner_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    (low_a, high_a), (low_b, high_b) = a.split(2, dim=-1), b.split(2, dim=-1)
    inner = _area(torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b))
    return inner, _area(high_a - low_a) + _area(high_b - low_b) - inner


def _area(sides: Tensor) -> Tensor:
    """(...) the area of boxes with these (..., 2) sides; 0 where one of them is negative."""
    # Not prod(-1): its backward pass counts the zeros, and the CPU waits for that number.
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height

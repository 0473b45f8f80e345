"""The logits of masks: the product of a query's embedding and the pixel features, and what is added to it.

An embedding that is one number longer than the features says how much: of the prior of the query's box, or, where there
are no boxes, everywhere the same. The prior is an ellipse that touches the sides of the box, times a weight that is
predicted with the embedding. It falls with the squares of the distances along x and y, so on a grid it is the
difference of a row and a column, and as few passes as possible are made over the large tensors: that is where the time
goes, not into arithmetic.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.machine import with_triton
from mvision.neck.layers import without_autocast

PRIOR_WEIGHT = 2.0  # initially; the prior's logit in the centre of a box
# The prior far outside of a box. Times the initial weight it is a probability of 0.002, low enough for the background
# and high enough for the embedding to overcome it where the box is wrong.
PRIOR_LOWEST = -3.0


def mask_grid(embeddings: Tensor, pixels: Tensor, boxes: Tensor | None) -> Tensor:
    """(B, Q, h, w) mask logits on the whole grid, in the pixel features' precision.

    Args:
        embeddings: (B, Q, d + 1), see ``MaskOutputs``; or (B, Q, d), only without boxes.
        pixels: (B, d, h, w) pixel features.
        boxes: (B, Q, 4) cxcywh in 0..1; they get no gradient. None for masks without a prior.
    """
    height, width = pixels.shape[-2:]
    if boxes is None:
        with without_autocast(pixels):
            return _without_prior(embeddings, pixels.flatten(2)).unflatten(2, (height, width))
    y = (torch.arange(height, device=pixels.device, dtype=boxes.dtype) + 0.5) / height
    x = (torch.arange(width, device=pixels.device, dtype=boxes.dtype) + 0.5) / width
    centre, scale = _ellipses(boxes)
    across = 1 - ((x - centre[..., :1]) * scale[..., :1]).square()
    down = ((y - centre[..., 1:]) * scale[..., 1:]).square()
    with without_autocast(pixels):
        product, weight = _product(embeddings, pixels.flatten(2))
        return add_prior_(product.unflatten(2, (height, width)), weight, across, down)


def add_prior_(product: Tensor, weight: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """``product + weight * (across - down)`` written over ``product``, the difference being at least ``PRIOR_LOWEST``.

    In one kernel on a GPU, where there are no gradients and Triton works. That one computes in float32.

    Args:
        product: (B, Q, h, w), contiguous.
        weight: (B, Q, 1), in the precision of ``product``.
        across, down: (B, Q, w) and (B, Q, h) float32.
    """
    by_operators = partial(_add_by_operators, product, weight, across, down)
    has_gradients = torch.is_grad_enabled() and (product.requires_grad or weight.requires_grad)
    fits = product.device.type == "cuda" and product.is_contiguous() and across.dtype == torch.float32
    if not fits or has_gradients or torch.compiler.is_compiling():
        return by_operators()
    return with_triton(partial(_add_by_kernel, product, weight, across, down), by_operators)


def _add_by_kernel(product: Tensor, weight: Tensor, across: Tensor, down: Tensor) -> Tensor:
    # The import takes a second, which machines without a GPU are spared.
    from mvision.heads.instance_seg.prior_triton import launch

    with torch.cuda.device_of(product):
        launch(product, weight.contiguous(), across.contiguous(), down.contiguous(), PRIOR_LOWEST)
    return product


def _add_by_operators(product: Tensor, weight: Tensor, across: Tensor, down: Tensor) -> Tensor:
    prior = across.to(product.dtype)[..., None, :] - down.to(product.dtype)[..., None]
    return product.addcmul_(weight[..., None], prior.clamp_(min=PRIOR_LOWEST))


def mask_at_points(embeddings: Tensor, pixels: Tensor, boxes: Tensor | None, points: Tensor) -> Tensor:
    """(..., N, P) mask logits at points, in the pixel features' precision; leading dimensions are broadcast.

    Args:
        embeddings: (..., N, d + 1), see ``MaskOutputs``; or (..., N, d), only without boxes.
        pixels: (..., d, P) pixel features at the points.
        boxes: (..., N, 4) cxcywh in 0..1; they get no gradient. None for masks without a prior.
        points: (..., P, 2) x, y in 0..1.
    """
    if boxes is None:
        return _without_prior(embeddings, pixels)
    prior = prior_at_points(boxes, points[..., None, :, 0], points[..., None, :, 1])
    product, weight = _product(embeddings, pixels)
    return product.addcmul_(weight, prior)


def prior_at_points(boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(..., P) the prior of boxes (..., 4) at the places ``x`` and ``y``, each broadcastable to (..., P).

    It is 1 in the centre of a box, 0 on the ellipse that touches its sides, and ``PRIOR_LOWEST`` far outside.
    """
    centre, scale = _ellipses(boxes.to(x.dtype))
    across = (x - centre[..., :1]).mul_(scale[..., :1])
    down = (y - centre[..., 1:]).mul_(scale[..., 1:])
    return across.square_().addcmul_(down, down).neg_().add_(1).clamp_(min=PRIOR_LOWEST)


def _product(embeddings: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, P) products of embeddings (..., N, d + 1) and features (..., d, P), and (..., N, 1) priors' weights."""
    embeddings = embeddings.to(pixels.dtype)
    return embeddings[..., :-1] @ pixels, F.softplus(embeddings[..., -1:])


def _without_prior(embeddings: Tensor, pixels: Tensor) -> Tensor:
    """(..., N, P) products of embeddings (..., N, d or d + 1) and features (..., d, P), plus the additional number."""
    embeddings, dim = embeddings.to(pixels.dtype), pixels.shape[-2]
    product = embeddings[..., :dim] @ pixels
    return product.add_(embeddings[..., dim:]) if embeddings.shape[-1] > dim else product


def _ellipses(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2) the centres of boxes, and (..., 2) one divided by half of their sides."""
    boxes = boxes.detach()
    # Smaller boxes would divide by nearly zero, and a box without area would give NaN at its centre.
    return boxes[..., :2], 2 / boxes[..., 2:].clamp(min=1e-3)

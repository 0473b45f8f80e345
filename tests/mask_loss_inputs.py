"""What the losses of ECSeg's masks are compared on with the original code: those of ``loss_inputs.py``, and masks.

``docs/scripts/golden_mask_losses.py`` gave them to the original code and wrote ``tests/golden_mask_losses.json``;
``tests/test_golden_mask_losses.py`` gives them to ours.

The original draws points for every mask anew and takes the nearest pixel of an object's mask; ours draws them for an
image and interpolates. So both get the same points here, at which these are equal: centres of the pixels of the
objects' masks, none so near to the border that the original mixes the predicted mask with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.loss_inputs import LAYERS, QUERIES, LossInputs, make_inputs

SIDE, RATIO, DIM = 32, 16, 8
"""Of the predicted masks, of their pixels for every point of the loss (as published), and of their features."""
POINTS = SIDE * SIDE // RATIO
PER_CELL = 4
"""Pixels of an object's mask, in a row, for one of a predicted mask."""


@dataclass
class MaskInputs:
    """Float64 numbers beside those of ``others``; D are the denoising queries.

    Attributes:
        masks: (N, SIDE * PER_CELL, SIDE * PER_CELL) uint8 of each image's objects.
        pixels: (L, B, DIM, SIDE, SIDE) features of every decoder layer.
        embeddings, denoising: (L, B, N, DIM + 1) of the queries and of those for denoising, None without objects; the
            last number is added to the whole mask.
        points: (3 * POINTS, 2) x, y in 0..1, the candidates in every image.
    """

    others: LossInputs
    masks: list[Tensor]
    pixels: Tensor
    embeddings: Tensor
    denoising: Tensor | None
    points: Tensor


def make_mask_inputs(seed: int, counts: tuple[int, ...]) -> MaskInputs:
    """Inputs for images with these numbers of objects."""
    others, random = make_inputs(seed, counts), np.random.RandomState(seed)
    side = SIDE * PER_CELL
    places = random.permutation((side - PER_CELL) ** 2)[: 3 * POINTS]
    rows, columns = np.divmod(places, side - PER_CELL)
    points = (torch.from_numpy(np.stack((columns, rows), -1)) + PER_CELL / 2 + 0.5) / side
    batch = len(counts)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    noisy = others.denoising
    return MaskInputs(
        others,
        [_ellipses(boxes, side) for boxes in others.boxes],
        normal(LAYERS, batch, DIM, SIDE, SIDE),
        normal(LAYERS, batch, QUERIES, DIM + 1),
        None if noisy is None else normal(LAYERS, batch, noisy.logits.shape[2], DIM + 1),
        points.double(),
    )


def _ellipses(boxes: Tensor, side: int) -> Tensor:
    """(N, side, side) uint8, inside their boxes."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    x, y, width, height = boxes[..., None, None].unbind(1)
    return (((at - x) / width) ** 2 + ((at[:, None] - y) / height) ** 2 < 0.25).to(torch.uint8)

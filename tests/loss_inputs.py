"""Predictions drawn by a seed, on which the losses here are compared with those of the original D-FINE and DEIM.

``docs/scripts/golden_losses.py`` gave them to the original code and wrote ``tests/golden_losses.json``;
``tests/test_golden_losses.py`` gives them to ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS, CLASSES, LAYERS, QUERIES = 32, 4, 3, 14


@dataclass
class LossInputs:
    """Float64 predictions for a batch, as a decoder with L layers and box distributions gives them in training.

    Attributes:
        boxes, labels: of each image's objects, (N, 4) cxcywh in 0..1 and (N,).
        groups: of denoising queries; 0 where the batch has no object.
        matched, denoising: of the queries that are matched, and of the denoising queries (None without objects).
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    groups: int
    matched: Predicted
    denoising: Predicted | None


@dataclass
class Predicted:
    """Predictions of N queries.

    Attributes:
        logits, boxes: (L + 2, B, N, ...) of the layers, then "pre", then the selected tokens; the latter two are not
            for the denoising queries, which use the first L + 1.
        corners: (L, B, N, 4 * (BINS + 1)).
        initial: (B, N, 4) cxcywh in 0..1, which the corners are relative to.
    """

    logits: Tensor
    boxes: Tensor
    corners: Tensor
    initial: Tensor


def make_inputs(seed: int, counts: tuple[int, ...]) -> LossInputs:
    """Inputs for images with these numbers of objects; two and two of the objects are close to each other."""
    random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    boxes = [_objects(random, count) for count in counts]
    labels = [torch.from_numpy(random.randint(0, CLASSES, count)) for count in counts]
    most = max(counts)
    groups = 2 if most else 0
    # Every query is about an object of its image, those for denoising about the one that they are made from.
    about = [random.randint(0, max(count, 1), QUERIES) for count in counts]
    matched = _predicted(random, boxes, about)
    about = [np.tile(np.arange(most) % max(count, 1), 2 * groups) for count in counts]
    return LossInputs(boxes, labels, groups, matched, _predicted(random, boxes, about) if groups else None)


def _objects(random: np.random.RandomState, count: int) -> Tensor:
    boxes = random.uniform((0.2, 0.2, 0.1, 0.1), (0.8, 0.8, 0.4, 0.4), (count, 4))
    odd = boxes[1::2]
    odd[:] = boxes[0::2][: len(odd)] + random.uniform(-0.01, 0.01, odd.shape)
    return torch.from_numpy(boxes)


def _predicted(random: np.random.RandomState, boxes: list[Tensor], about: list[np.ndarray]) -> Predicted:
    shape = (LAYERS + 2, len(about), len(about[0]))
    nothing = torch.tensor([[0.5, 0.5, 0.2, 0.2]], dtype=torch.float64)
    objects = torch.stack([(of_image if len(of_image) else nothing)[index] for of_image, index in zip(boxes, about)])

    def noisy(*lead: int, amount: float) -> Tensor:
        noise = torch.from_numpy(random.normal(0, amount, (*lead, *objects.shape)))
        return (objects + noise * objects[..., 2:].repeat(1, 1, 2)).clamp(0.02, 0.98)

    return Predicted(
        logits=torch.from_numpy(random.normal(-1, 1.5, (*shape, CLASSES))),
        boxes=noisy(LAYERS + 2, amount=0.08),
        corners=torch.from_numpy(random.normal(0, 1, (LAYERS, *shape[1:], 4 * (BINS + 1)))),
        initial=noisy(amount=0.5),  # so far away that some objects are beyond the last bin
    )

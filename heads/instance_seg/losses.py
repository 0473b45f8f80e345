"""Mask losses and matching costs on sampled points, so that memory does not depend on the resolution of the masks.

Sources: Kirillov et al., "PointRend", CVPR 2020, sections 3.1 and 3.3 (more points where the prediction is uncertain),
as Cheng et al., "Mask2Former", CVPR 2022, section 3.3 applies it to queries; Dice as in V-Net (Milletari et al., 2016),
per instance. One deviation: candidate points are drawn per image and shared by its instances, half of them anywhere and
half in the objects' boxes. So the pixel features are read only once per candidate, and small objects get enough points.
ECSeg's code draws them for every mask anew, anywhere, and takes the nearest pixel of an object's mask, where this one
interpolates; at the same points, where a pixel has its centre, the losses are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.instance_seg.logits import mask_at_points
from mvision.heads.instance_seg.points import MaskPoints, at_once
from mvision.structures.transfer import to_device

OVERSAMPLE = 3  # candidates per point of the loss (PointRend's k)
UNCERTAIN = 0.75  # share of a mask's points that are the most uncertain candidates (PointRend's beta)


@torch.no_grad()
def mask_costs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice of every query's mask with every object's, for matching.

    Args:
        logits: (..., Q, P) before the sigmoid.
        labels: (..., T, P) in 0..1, at the same points.

    Returns:
        Cross-entropy (mean over the points) and Dice, each (..., Q, T).
    """
    labels = labels.transpose(-1, -2)
    # softplus(x) - x * label is the binary cross-entropy.
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ labels) / logits.shape[-1]
    prob = logits.sigmoid()
    total = prob.sum(-1, keepdim=True) + labels.sum(-2, keepdim=True)
    return cross_entropy, 1 - (2 * (prob @ labels) + 1) / (total + 1)


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (mean over the points) and Dice of pairs of masks.

    Args:
        logits: (M, P) before the sigmoid.
        labels: (M, P) in 0..1, at the same points.

    Returns:
        Cross-entropy and Dice, each (M,).
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    prob = logits.sigmoid()
    dice = 1 - (2 * (prob * labels).sum(-1) + 1) / (prob.sum(-1) + labels.sum(-1) + 1)
    return cross_entropy, dice


@torch.no_grad()
def uncertain_points(logits: Tensor, count: int) -> Tensor:
    """(M, count) int64 indices into the candidates of (M, P) logits: mostly those nearest to 0, the others random."""
    number = int(UNCERTAIN * count)
    uncertain = logits.abs().topk(number, dim=1, largest=False, sorted=False).indices
    # Candidates are in random order, so the first of them are a random choice.
    anywhere = torch.arange(count - number, device=logits.device).expand(len(logits), -1)
    return torch.cat((uncertain, anywhere), 1)


def matched_losses(
    embeddings: Tensor, boxes: Tensor | None, pairs: np.ndarray, pixels: Tensor, samples: MaskPoints, count: int
) -> dict[str, Tensor]:
    """``mask`` and ``dice``, each (L,): sums over the queries that are matched with an object that has a mask.

    The images' queries are padded to one number, so that a batch takes as many operators as an image.

    Args:
        embeddings: (L, B, N, d + 1) or (.., d), see ``MaskOutputs``.
        boxes: (L, B, N, 4) cxcywh in 0..1; None for masks without a prior.
        pairs: (M, 4) layer, image, query and object, on the CPU, see ``Matches.host``; those of layers without an
            embedding, which come after the others, are left out.
        pixels: (F * B, d, P) pixel features of F maps at the points of ``samples``, see ``map_of_layer``.
        count: number of points at which a mask is compared.
    """
    layers, batch, queries, _ = embeddings.shape
    sums = torch.zeros(2, layers, device=pixels.device, dtype=pixels.dtype)
    pairs = pairs[samples.known[pairs[:, 1], pairs[:, 3]] & (pairs[:, 0] < layers)]
    if not len(pairs):
        # Distributed training needs a gradient for every parameter, also where nothing is matched.
        sums = sums + (0 * embeddings).sum((1, 2, 3)) + (0 * pixels).sum()
    every_embedding, every_box = embeddings.flatten(0, 2), None if boxes is None else boxes.flatten(0, 2)
    # From here on the features of an image on each of the maps count as images of their own.
    pairs[:, 1] += batch * map_of_layer(pairs[:, 0], len(pixels) // batch)
    for maps, part in _parts(pairs, len(pixels), at_once(pixels.device, samples.points.shape[1])):
        layer, on_map, query, gt_index = part.T
        images, image, local = maps % batch, on_map % batch, np.searchsorted(maps, on_map)
        numbers = np.bincount(local)
        slots = local * numbers.max() + np.arange(len(part)) - (numbers.cumsum() - numbers)[local]
        padded = np.zeros(len(maps) * numbers.max(), dtype=np.int64)
        padded[slots] = (layer * batch + image) * queries + query
        arrays = {"maps": maps, "images": images, "padded": padded, "slots": slots, "layer": layer.copy()}
        arrays["object"] = image * samples.labels.shape[1] + gt_index
        on = to_device({name: torch.from_numpy(array) for name, array in arrays.items()}, pixels.device)

        def of_queries(values: Tensor, padded: Tensor = on["padded"], count: int = len(maps)) -> Tensor:
            return values.index_select(0, padded).unflatten(0, (count, -1))

        logits = mask_at_points(
            of_queries(every_embedding),
            _rows(pixels, maps, on["maps"]),
            None if every_box is None else of_queries(every_box),
            _rows(samples.points, images, on["images"]),
        ).flatten(0, 1)
        logits = logits if len(slots) == len(padded) else logits.index_select(0, on["slots"])
        index = uncertain_points(logits, count)
        labels = samples.labels.take(index + on["object"][:, None] * samples.labels.shape[2])
        values = torch.stack(mask_losses(logits.gather(1, index), labels))
        sums = sums.index_add(1, on["layer"], values)
    return dict(zip(("mask", "dice"), sums))


def map_of_layer(layer: np.ndarray, maps: int) -> np.ndarray:
    """Which of the maps the masks of these layers are read from: layer i from map i, where there are several.

    A layer after those has the queries, and so the map, of the first: it is "pre".
    """
    return np.where(layer < maps, layer, 0)


def _rows(values: Tensor, rows: np.ndarray, index: Tensor) -> Tensor:
    """These rows, given on the CPU and on the device of the values; all of them in order are no copy."""
    return values if np.array_equal(rows, np.arange(len(values))) else values.index_select(0, index)


def _parts(pairs: np.ndarray, batch: int, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (in order) with at most ``most`` padded pairs, or one image, and these pairs, sorted by image."""
    numbers = np.bincount(pairs[:, 1], minlength=batch)
    ordered = np.argsort(-numbers, kind="stable")[: np.count_nonzero(numbers)]
    while len(ordered):
        together = max(1, most // int(numbers[ordered[0]]))
        images, ordered = np.sort(ordered[:together]), ordered[together:]
        part = pairs[np.isin(pairs[:, 1], images)]
        yield images, part[np.argsort(part[:, 1], kind="stable")]

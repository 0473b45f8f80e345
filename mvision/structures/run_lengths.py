"""Run lengths of what a GPU has computed: it finds the places where runs begin, and only these are copied to the CPU.

A mask of 640 x 480 pixels takes 300 KB, the places of its runs two or three. All functions work on a CPU as well, where
``encode_logits`` is faster for masks: it computes no more than the part of the image where an object is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.structures.masks import RunLengths, encode_changes
from mvision.structures.transfer import to_device, to_host

# Pixels that are enlarged at once: 256 MiB in float32 on a GPU, and on a CPU what its caches hold.
MAX_PIXELS = {"cuda": 2**26, "cpu": 2**18}


def same_size(sizes: Sequence[tuple[int, int]], device: torch.device) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """The numbers of images of one (height, width), as many as may be enlarged at once, with this size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, size in enumerate(sizes):
        by_size.setdefault(size, []).append(number)
    for size, numbers in by_size.items():
        together = max(1, MAX_PIXELS.get(device.type, MAX_PIXELS["cuda"]) // (size[0] * size[1]))
        for start in range(0, len(numbers), together):
            yield numbers[start : start + together], size


@torch.no_grad()
def encode_masks(logits: Tensor, which: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[RunLengths]:
    """Run lengths of K masks on images of other sizes, as ``encode_logits`` makes them, up to rounding near 0.

    Args:
        logits: (N, h, w) float, above 0 inside the objects; the grid covers the whole image.
        which: (K,) int64, the masks that are wanted.
        sizes: (height, width) in pixels of the image that each of the K belongs to.
    """
    parts = list(same_size(sizes, logits.device))
    order = np.array([place for places, _ in parts for place in places], dtype=np.int64)
    index = to_device({"which": torch.from_numpy(which[order])}, logits.device)["which"]
    starts: dict[str, Tensor] = {}
    for (places, (height, width)), chosen in zip(parts, index.split([len(places) for places, _ in parts])):
        # Run lengths go down the columns, so the masks are enlarged lying on their side.
        masks = logits.index_select(0, chosen).float().transpose(1, 2).contiguous()
        inside = (F.interpolate(masks[:, None], (width, height), mode="bilinear") > 0).flatten(1)
        changes = inside.clone()  # a first pixel that is inside is a change too: the first run is one of zeros
        changes[:, 1:].logical_xor_(inside[:, :-1])
        starts[str(places[0])] = changes.flatten().nonzero()[:, 0]
    encoded: dict[int, RunLengths] = {}
    for (places, size), found in zip(parts, to_host(starts).values()):
        encoded |= zip(places, encode_changes(found.numpy(), len(places), size))
    return [encoded[place] for place in range(len(order))]


@torch.no_grad()
def encode_labels(maps: Sequence[Tensor]) -> list[list[dict[int, RunLengths]]]:
    """For each of several stacks of integer maps (N, H, W), and each map, the run lengths of every number in it."""
    starts: dict[str, Tensor] = {}
    for index, labels in enumerate(maps):
        columns = labels.transpose(1, 2).flatten(1)
        begins = torch.ones_like(columns, dtype=torch.bool)
        begins[:, 1:] = columns[:, 1:] != columns[:, :-1]
        place = begins.flatten().nonzero()[:, 0]
        starts |= {f"place_{index}": place, f"label_{index}": columns.flatten().index_select(0, place)}
    on_host = {name: tensor.numpy() for name, tensor in to_host(starts).items()}
    encoded = []
    for index, labels in enumerate(maps):
        size = (labels.shape[1], labels.shape[2])
        places = _split(on_host[f"place_{index}"], len(labels), size)
        numbers = np.split(on_host[f"label_{index}"], np.cumsum([len(place) for place in places])[:-1])
        encoded.append([_encode_map(place, number, size) for place, number in zip(places, numbers)])
    return encoded


def _encode_map(begin: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> dict[int, RunLengths]:
    """Run lengths of every label, from the pixels where runs of them begin."""
    runs = np.stack((begin, np.append(begin[1:], size[0] * size[1])), axis=1)
    return {number: encode_changes(runs[label == number].ravel(), 1, size)[0] for number in np.unique(label).tolist()}


def _split(places: np.ndarray, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Rising places in ``count`` images of one size that lie one behind another, as places in each of them."""
    firsts = np.arange(count) * size[0] * size[1]
    parts = np.split(places, np.searchsorted(places, firsts[1:]))
    return [part - first for part, first in zip(parts, firsts)]

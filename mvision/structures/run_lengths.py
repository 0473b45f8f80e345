"""Run lengths of what a GPU has computed: it finds the places where runs begin, and only these are copied to the CPU.

A mask of 640 x 480 pixels takes 300 KB, the places of its runs two or three. All functions work on a CPU as well, where
``encode_logits`` is faster for masks: it computes no more than the part of the image where an object is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.structures.masks import RunLengths, encode_runs
from mvision.structures.transfer import to_device, to_host

MAX_PIXELS = 2**26  # of the masks that are enlarged at once: 256 MiB in float32


@torch.no_grad()
def encode_masks(logits: Tensor, which: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[RunLengths]:
    """Run lengths of K masks on images of other sizes, as ``encode_logits`` makes them, up to rounding near 0.

    Args:
        logits: (N, h, w) float, above 0 inside the objects; the grid covers the whole image.
        which: (K,) int64, the masks that are wanted.
        sizes: (height, width) in pixels of the image that each of the K belongs to.
    """
    order = sorted(range(len(which)), key=lambda index: sizes[index])
    index = to_device({"which": torch.from_numpy(which[order])}, logits.device)["which"]
    starts: dict[str, Tensor] = {}
    parts: list[tuple[list[int], tuple[int, int]]] = []
    done = 0
    while done < len(order):
        height, width = size = sizes[order[done]]
        alike = sum(sizes[place] == size for place in order[done : done + max(1, MAX_PIXELS // (height * width))])
        masks = logits.index_select(0, index[done : done + alike]).float()
        # Run lengths go down the columns, so the masks are enlarged lying on their side.
        columns = F.interpolate(masks.transpose(1, 2).contiguous()[:, None], (width, height), mode="bilinear")
        inside = (columns > 0).flatten(1)
        changes = inside.clone()  # a first pixel that is inside is a change too: the first run is one of zeros
        changes[:, 1:].logical_xor_(inside[:, :-1])
        starts[str(len(parts))] = changes.flatten().nonzero()[:, 0]
        parts.append((order[done : done + alike], size))
        done += alike
    encoded: dict[int, RunLengths] = {}
    for (places, size), found in zip(parts, to_host(starts).values()):
        pixels = size[0] * size[1]
        ends = np.searchsorted(found.numpy(), np.arange(1, len(places)) * pixels)
        for number, (place, runs) in enumerate(zip(places, np.split(found.numpy(), ends))):
            encoded[place] = encode_runs(runs - number * pixels, size)
    return [encoded[place] for place in range(len(order))]


@torch.no_grad()
def encode_labels(maps: Sequence[Tensor]) -> list[dict[int, RunLengths]]:
    """For each of several (H, W) integer maps the run lengths of every number that is in it."""
    starts: dict[str, Tensor] = {}
    for index, labels in enumerate(maps):
        columns = labels.T.flatten()
        begins = torch.ones_like(columns, dtype=torch.bool)
        torch.ne(columns[1:], columns[:-1], out=begins[1:])
        place = begins.nonzero()[:, 0]
        starts |= {f"place_{index}": place, f"label_{index}": columns[place]}
    on_host = {name: tensor.numpy() for name, tensor in to_host(starts).items()}
    encoded = []
    for index, labels in enumerate(maps):
        begin, label = on_host[f"place_{index}"], on_host[f"label_{index}"]
        runs = np.stack((begin, np.append(begin[1:], labels.numel())), axis=1)
        size = (labels.shape[0], labels.shape[1])
        encoded.append(
            {number: encode_runs(runs[label == number].ravel(), size) for number in np.unique(label).tolist()}
        )
    return encoded

"""The union of all layers' matches, by votes: one set of pairs for the box losses of every layer.

With pairs of its own each layer may be taught another object for the same query, which a later layer has to undo.

Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
section 4.2.
"""

from __future__ import annotations

import numpy as np


def union_of_matches(host: np.ndarray) -> np.ndarray:
    """The pairs of a query and an object that any layer matched; of a query's pairs, the one of most layers.

    Of pairs with equally many layers it is that of the object that comes first, so that runs can be repeated.

    Args:
        host: (P, 4) int64 layer, image, query, object.

    Returns:
        (U, 3) int64 image, query, object, ordered by image, then query. No query occurs twice, an object may.
    """
    if not len(host):
        return host[:, 1:]
    shape = tuple(host[:, 1:].max(0) + 1)
    flat, votes = np.unique(np.ravel_multi_index(tuple(host[:, 1:].T), shape), return_counts=True)
    pairs = np.column_stack(np.unravel_index(flat, shape))
    image, query, _ = pairs.T
    pairs = pairs[np.lexsort((-votes, query, image))]  # which keeps the order of objects where all three are equal
    first = np.ones(len(pairs), dtype=bool)
    first[1:] = (pairs[1:, :2] != pairs[:-1, :2]).any(1)
    return pairs[first]


def in_every_layer(pairs: np.ndarray, layers: int) -> np.ndarray:
    """(layers * U, 4) layer, image, query, object of pairs (U, 3) that all layers have."""
    layer = np.repeat(np.arange(layers), len(pairs))
    return np.column_stack((layer, np.tile(pairs, (layers, 1)))).astype(np.int64)

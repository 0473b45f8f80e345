"""The images of an epoch, where images are shown at different rates."""

from __future__ import annotations

import math

import numpy as np


def number_drawn(factors: np.ndarray) -> int:
    """How many images an epoch shows of those with these factors: their sum, rounded down, and at least one."""
    # Not up: then an image whose factor has a fraction near 1 could get one more than that rounded up.
    return max(1, math.floor(float(factors.sum()) + 1e-6))


def draw(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(``number_drawn``, 2) the images of one epoch, in their order: index, and how often it occurs before.

    Every image occurs as often as its factor, rounded down or up. Systematic sampling decides which ones are rounded
    up: the fractions are laid one behind another, in random order, and equally spaced points take the images on which
    they fall.
    """
    counts = np.floor(factors).astype(np.int64)
    more = number_drawn(factors) - int(counts.sum())
    if more > 0:
        order = rng.permutation(len(factors))
        ends = np.cumsum((factors - counts)[order])
        points = (np.arange(more) + rng.random()) * (ends[-1] / more)
        places = np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
        counts += np.bincount(order[places], minlength=len(counts))
    first = np.cumsum(counts) - counts
    return np.stack((np.repeat(np.arange(len(counts)), counts), np.arange(counts.sum()) - np.repeat(first, counts)), 1)

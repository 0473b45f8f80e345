"""Weights that follow from their names: a golden file made with them needs to hold none."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """(shape) float64, the same in every version of NumPy; variances are positive, weights keep the size of maps."""
    values = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))
    if name.endswith("running_var"):
        return (0.3 * values).exp()
    if len(shape) > 1:
        return 0.8 * values / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.3 * values if name.endswith("norm.weight") else 0.3 * values

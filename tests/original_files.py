"""Files as the authors of D-FINE, DEIM and others write them: weights that follow from the names in the authors' code.

``docs/scripts/golden_originals.py`` gives the same weights to the original code.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.drawn_weights import drawn
from tests.reference import random_images

GOLDEN = Path(__file__).with_name("golden_originals.npz")
CLASSES = 3
KEPT = slice(0, 300, 20)
"""The queries whose outputs are kept."""

# Family -> settings of the original code, narrow and shallow, on backbones as published; ``size``: (height, width).
CASES: dict[str, dict[str, Any]] = {
    "dfine": {
        "size": (320, 320), "backbone": "B0", "levels": 2, "neck": 32, "ffn": 48, "expansion": 0.34, "depth": 0.5,
        "dim": 32, "layers": 2, "points": [6, 6], "act": "relu", "reg_scale": 4.0,
    },
    "deim": {
        "size": (128, 128), "backbone": "B0", "levels": 3, "neck": 32, "ffn": 40, "expansion": 0.5, "depth": 0.34,
        "dim": 32, "layers": 2, "points": [3, 6, 3], "act": "silu", "reg_scale": 4.0,
    },
    "rtdetrv4": {
        "size": (160, 160), "backbone": "B2", "levels": 3, "neck": 48, "ffn": 40, "expansion": 1.0, "depth": 0.67,
        "dim": 32, "layers": 3, "points": [3, 6, 3], "act": "silu", "reg_scale": 8.0, "teacher": 24,
    },
    "deim-rtdetrv2": {
        "size": (128, 128), "backbone": 18, "levels": 3, "neck": 32, "ffn": 40, "expansion": 0.5, "depth": 1.0,
        "dim": 32, "layers": 2, "points": [4, 4, 4], "act": "silu",
    },
}  # fmt: skip


def make_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """By the name in the original code, numbers of float32 in float64; scales are around 1, convolutions keep sizes."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if re.search(r"(bn|norm\d?)\.weight$|lab\.scale$", name):
        values = drawn(f"{name} as norm.weight", shape)
    else:
        values = drawn(name, shape) * (1.7 if len(shape) == 4 else 1.0)
    return values.float().double()


def make_images(case: str) -> Tensor:
    """Two images."""
    return random_images(2, *CASES[case]["size"], dtype=torch.float64)


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """All tensors of the original model, and what it gave: ``logits`` and ``boxes`` (2, N, ..) of ``KEPT``."""
    tensors, outputs = _golden(case)
    return dict(tensors), outputs


@cache
def _golden(case: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    return read_golden(GOLDEN, case, make_tensor)


def read_golden(
    path: Path, case: str, make_tensor: Callable[[str, tuple[int, ...]], Tensor]
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The tensors of a model, those that are not in the file drawn by ``make_tensor``, and what it gave by name."""
    with np.load(path) as file:
        shapes: Mapping[str, list[int]] = json.loads(lzma.decompress(file["shapes"].tobytes()))[case]
        given = {key.removeprefix(f"{case} "): file[key] for key in file.files if key.startswith(f"{case} ")}
    tensors = {name: make_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    stored = {key for key in given if key.startswith("tensor ")}
    tensors |= {key.removeprefix("tensor "): torch.from_numpy(given[key]) for key in stored}
    return tensors, {key: array for key, array in given.items() if key not in stored}


def packed(shapes: Mapping[str, Mapping[str, list[int]]]) -> np.ndarray:
    """Case -> name -> shape, for a golden file: names of cases are much alike, which its own compression cannot use."""
    return np.frombuffer(lzma.compress(json.dumps(shapes).encode()), np.uint8)


def change(name: str, value: Tensor | None) -> Callable[[dict[str, Any]], None]:
    """A function that gives a tensor of a model another value, or removes it."""

    def apply(tensors: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return apply


def write_original(path: Path, case: str, **parts: Any) -> Path:
    """A file with the averaged weights of a case, beside what a checkpoint of a training has."""
    tensors, _ = golden(case)
    content = {"date": "2024-12-01T12:00:00", "last_epoch": 3, "ema": {"module": tensors, "updates": 5}, **parts}
    torch.save(content, path)
    return path

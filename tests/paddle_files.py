"""Files as PaddlePaddle writes them, with weights of Mask-RT-DETR that follow from the names in PaddleDetection.

``docs/scripts/golden_paddle.py`` gives the same weights to the original code, and has Paddle write a few small files.
"""

from __future__ import annotations

import json
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvision import UserError, load
from tests.drawn_weights import drawn
from tests.reference import random_images

GOLDEN = Path(__file__).with_name("golden_paddle.npz")
CLASSES = 3
KEPT = slice(0, None, 20)
"""The queries whose outputs are kept; of masks every third of these, and every fourth row and column."""
MASKS = (slice(None), slice(0, None, 60), slice(1, None, 4), slice(None, None, 4))
CENTRED = "neck.enc_mask_output.1.bias"
"""Not drawn, but such that about half of the masks' pixels are positive."""

# Case -> settings of the original code: backbones as published, the rest narrow and shallow. ``levels``: the map with
# attention, counted as there, from stride 4 on; ``sizes``: of the sides of the images.
CASES: dict[str, dict[str, Any]] = {
    "s": {
        "arch": "S", "sizes": (128, 160), "neck": 32, "ffn": 40, "layers": 1, "level": 2, "expansion": 0.5,
        "mask_channels": [12, 8], "prototypes": 16, "dim": 32, "decoder_layers": 2, "dim_ffn": 48, "queries": 300,
    },
    "l": {
        "arch": "L", "sizes": (128, 160), "neck": 48, "ffn": 40, "layers": 2, "level": 3, "expansion": 1.0,
        "mask_channels": [16, 12], "prototypes": 8, "dim": 32, "decoder_layers": 3, "dim_ffn": 40, "queries": 300,
    },
}  # fmt: skip
_NORM = re.compile(r"(bn|norm\d?|enc_output\.1|input_proj\.\d\.1)\.weight$")


def make_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """By the name in the original code, numbers of float32; scales are around 1, convolutions keep maps' sizes."""
    if name.endswith("_variance"):
        values = drawn(f"{name} as running_var", shape)
    elif _NORM.search(name):
        values = drawn(f"{name} as norm.weight", shape)
    else:
        of_neck = 1.2 if name.startswith("neck") and "mask" not in name else 1.0
        gain = (1.7 if name.startswith("backbone") else of_neck) if len(shape) == 4 else 1.0
        values = drawn(name, shape) * (0.3 if "bbox_head" in name else gain)
    return values.float().numpy()


def make_images(side: int) -> Tensor:
    """Two images."""
    return random_images(2, side, side, dtype=torch.float64)


def golden(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All arrays of the original model, and what it gave, ``KIND SIDE`` -> numbers of the queries of ``KEPT``."""
    arrays, outputs = _golden(case)
    return dict(arrays), outputs


@cache
def _golden(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with np.load(GOLDEN) as file:
        shapes = json.loads(file["shapes"].item())[case]
        outputs = {key.removeprefix(f"{case} "): file[key] for key in file.files if key.startswith(f"{case} ")}
    arrays = {name: make_array(name, tuple(shape)) for name, shape in shapes.items()}
    return arrays | {CENTRED: outputs.pop(CENTRED)}, outputs


def by_paddle(name: str) -> bytes:
    """A file that Paddle wrote: ``protocol 2``, ``protocol 4``, ``bfloat16`` or ``nested``."""
    with np.load(GOLDEN) as file:
        return file[f"file {name}"].tobytes()


def write(path: Path, arrays: dict[str, Any], protocol: int = 4) -> Path:
    """A file of ``paddle.save``: the arrays by name, and the names of the parameters in the program."""
    names = {name: f"parameter_{index}.w_0" for index, name in enumerate(arrays)}
    path.write_bytes(pickle.dumps({**arrays, "StructuredToParameterName@@": names}, protocol))
    return path


def refusal(path: Path) -> str:
    """Why a file is refused as weights, in one line that names it."""
    with pytest.raises(UserError) as failure:
        load(path)
    message = str(failure.value)
    assert message.startswith(f"weights {path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return message

"""The settings of EdgeCrafter give the maps of its original encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvision.neck.hybrid_encoder import HybridEncoder
from tests.drawn_weights import drawn
from tests.golden_neck import CASES, FILE, STRIDES, WIDTH, make_maps
from tests.test_neck import max_difference

EDGECRAFTER: dict[str, Any] = {
    "attention_act": "silu",
    "projections": False,
    "lateral_act": False,
    "fusion": "sum",
    "fusion_block": "elan",
    "elan_conv": False,
    "elan_split": True,
    "downsample": "separable",
}


def make_neck(**settings: Any) -> HybridEncoder:
    neck = HybridEncoder([WIDTH] * 3, STRIDES, WIDTH, **settings).eval().double()
    state = {key: x for key, x in neck.state_dict().items() if key.endswith("num_batches_tracked")}
    state |= {key: drawn(key, tuple(x.shape)) for key, x in neck.state_dict().items() if key not in state}
    neck.load_state_dict(state)
    return neck


def golden_maps(case: str) -> list[Tensor]:
    with np.load(FILE) as arrays:
        return [torch.from_numpy(arrays[f"{case} {stride}"]).double() for stride in STRIDES]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_maps_of_the_original(case: str) -> None:
    neck, maps, expected = make_neck(**EDGECRAFTER, **CASES[case]), make_maps(case), golden_maps(case)
    assert min(x.std().item() for x in expected) > 0.1, "small values would hide a difference"
    assert max_difference(neck(maps), expected) <= 1e-6
    assert max_difference(neck.fuse()(maps), expected) <= 1e-6


@pytest.mark.parametrize("other", [{"attention_act": "gelu"}, {"lateral_act": True}, {"norm_eps": 1e-3}])
@torch.no_grad()
def test_settings_without_weights_of_their_own_are_noticed(other: dict[str, Any]) -> None:
    neck = make_neck(**EDGECRAFTER | CASES["small"] | other)
    assert max_difference(neck(make_maps("small")), golden_maps("small")) > 1e-4

"""The masks of ``mask_form: refine`` against those of ECSeg's original decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mvision.heads.instance_seg.head import MaskConfig, MaskHead
from mvision.heads.instance_seg.logits import mask_grid
from mvision.structures import Category
from tests.decoder_inputs import make_weight
from tests.golden_masks import BLOCKS, CLASSES, FILE, SETTINGS, SIZES, STRIDES, WIDTH, make_maps, some

CATEGORIES = [Category(id=index, name=f"class {index}") for index in range(CLASSES)]
EXACTNESS = {torch.float32: 1e-5, torch.float64: 1e-6}  # the file is in float32


def make_head(dtype: torch.dtype = torch.float64, blocks: str = "first", lateral: int | None = None) -> MaskHead:
    """A head in which the layer of the lateral (its channels) alone, if it has one, keeps its initial weights."""
    changes = {"mask_form": "refine", "mask_blocks": blocks, "lateral": lateral is not None}
    config = MaskConfig(**{**SETTINGS, "num_denoising": 0, **changes})
    head = MaskHead(config, [WIDTH] * 3, STRIDES, CATEGORIES, lateral).eval()
    state = {name: x for name, x in head.state_dict().items() if not name.startswith("refine.lateral.")}
    weights = {name: make_weight(name.removeprefix("decoder."), x.shape) for name, x in state.items()}
    head.load_state_dict(weights, strict=False)
    return head.to(dtype)


def golden(name: str) -> Tensor:
    with np.load(FILE) as arrays:
        return torch.from_numpy(arrays[name]).double()


def predict(head: MaskHead, size: str, lateral: Tensor | None = None) -> Tensor:
    dtype = head.refine.bias.dtype
    with torch.no_grad():
        outputs = head([x.to(dtype) for x in make_maps(size)], lateral)
    assert isinstance(outputs, dict)
    assert list(outputs) == ["logits", "boxes", "masks"]
    return some(outputs["masks"][0])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one, relative to numbers above 1."""
    assert found.shape == expected.shape
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()


@pytest.mark.parametrize("dtype", EXACTNESS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_masks_of_the_original(size: str, blocks: str, dtype: torch.dtype) -> None:
    expected = golden(f"{size}, {blocks}")
    assert expected.std() > 0.5, "small values would hide a difference"
    assert difference(predict(make_head(dtype, blocks), size), expected) <= EXACTNESS[dtype]


@pytest.mark.parametrize("size", SIZES)
def test_masks_of_every_layer_in_training(size: str) -> None:
    head, maps = make_head(), make_maps(size)
    with torch.no_grad():
        decoded = head.decoder(maps, every_layer=True)
        features = head.refine(maps[0], None, len(head.refine.blocks), every=True)
        for index, (queries, pixels) in enumerate(zip(decoded.queries, features, strict=True)):
            masks = mask_grid(head.refine.embed(queries), pixels, None)[0]
            assert difference(some(masks), golden(f"{size}, layer {index}")) <= EXACTNESS[torch.float64]


def test_the_forms_of_prediction_differ() -> None:
    assert difference(golden("wide, first"), golden("wide, all")) > 0.1


def test_a_new_lateral_leaves_published_masks_as_they_are() -> None:
    lateral = torch.randn(1, 5, 16, 24).double()
    head = make_head(lateral=5)
    assert difference(predict(head, "wide", lateral), golden("wide, first")) <= EXACTNESS[torch.float64]
    assert head.refine.lateral is not None
    with torch.no_grad():
        head.refine.lateral.norm.weight += 0.1
    assert difference(predict(head, "wide", lateral), golden("wide, first")) > 1e-3

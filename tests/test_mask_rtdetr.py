"""The settings of Mask-RT-DETR give what its description gives, and its parts are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvision import UserError
from mvision.config import parse_model_config
from mvision.heads.instance_seg.head import MaskConfig, MaskHead
from mvision.heads.instance_seg.prototypes import boxes_of_masks
from mvision.heads.query.settings import DecoderConfig
from mvision.structures import Category
from tests import mask_rtdetr_reference as reference
from tests.decoder_inputs import make_weight
from tests.drawn_weights import drawn

CATEGORIES = [Category(id=index, name=f"class {index}") for index in range(3)]
STRIDES, CHANNELS, LATERAL = [8, 16, 32], [12, 12, 12], 5
FAMILY = {
    "mask_form": "prototypes",
    "boxes_from_masks": True,
    "shared_class_head": True,
    "shared_box_head": True,
    "output_norm": True,
}
SMALL = {
    "embed_dim": 16,
    "num_queries": 6,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 24,
    "num_points": 4,
    "pixel_dim": 10,
    "fine_dim": 8,
    "mask_dim": 7,
    "num_denoising": 0,
}
SIZES = {"square": (64, 64), "wide": (64, 128)}


def make_head(**changes: Any) -> MaskHead:
    head = (
        MaskHead(MaskConfig(**{**FAMILY, **SMALL, **changes}), CHANNELS, STRIDES, CATEGORIES, LATERAL).double().eval()
    )
    head.load_state_dict({name: make_weight(name, x.shape) for name, x in head.state_dict().items()})
    return head


def inputs(size: str) -> tuple[list[Tensor], Tensor]:
    height, width = SIZES[size]
    maps = [drawn(f"{size}, {s}", (1, c, height // s, width // s)) for c, s in zip(CHANNELS, STRIDES)]
    return maps, drawn(f"{size}, lateral", (1, LATERAL, height // 4, width // 4))


def differences(head: MaskHead, size: str) -> list[float]:
    """Of logits, boxes and masks the largest one, relative to numbers above 1."""
    maps, lateral = inputs(size)
    of_dtype = head.pixels.out.weight.dtype
    with torch.no_grad():
        outputs = head([x.to(of_dtype) for x in maps], lateral.to(of_dtype))
    state = {name: x.double() for name, x in head.state_dict().items()}
    expected = reference.predict(state, maps, lateral, queries=6, layers=2, heads=2, points=4)
    assert list(outputs) == ["logits", "boxes", "masks"]
    pairs = zip((found[0] for found in outputs.values()), expected, strict=True)
    return [((found - other).abs() / other.abs().clamp(min=1)).max().item() for found, other in pairs]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equal_outputs(size: str, dtype: torch.dtype, most: float) -> None:
    assert max(differences(make_head().to(dtype), size)) <= most


@pytest.mark.parametrize("changed", ["output_norm", "boxes_from_masks"])
def test_what_only_a_setting_tells_is_noticed(changed: str) -> None:
    head = make_head()
    if changed == "output_norm":
        head.decoder.output_norm = torch.nn.Identity()
        head.state_dict = lambda: make_head().state_dict()  # type: ignore[method-assign, assignment]
    else:
        head.config = head.config.model_copy(update={changed: False})
    assert max(differences(head, "square")) > 1e-3


def test_boxes_around_masks() -> None:
    masks = torch.full((1, 3, 8, 10), -1.0)
    masks[0, 0, 2:5, 4:10] = 1.0
    masks[0, 0, 7, 0] = 1.0
    masks[0, 1] = 1.0
    found = boxes_of_masks(masks)[0]
    assert found.tolist() == [pytest.approx([0.5, 0.625, 1.0, 0.75]), pytest.approx([0.5, 0.5, 1.0, 1.0]), [0.0] * 4]


def test_one_head_for_boxes_and_classes() -> None:
    head = make_head()
    assert not [name for name in head.state_dict() if name.startswith(("decoder.box_heads", "decoder.class_heads"))]


def test_settings_that_cannot_be_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"instance-seg.boxes_from_masks: .*mask_form: prototypes"):
        parse_model_config({"heads": {"instance-seg": {"boxes_from_masks": True}}})
    with pytest.raises(ValueError, match="shared_box_head: false"):
        DecoderConfig(shared_box_head=True, box_refinement="distribution")

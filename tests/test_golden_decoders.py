"""The decoder against the original ones of DEIM, DEIM-RT-DETRv2 and EdgeCrafter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision.heads.query.decoder import Decoded, QueryDecoder
from mvision.heads.query.settings import DecoderConfig
from tests.decoder_inputs import CLASSES, FAMILIES, SMALL, make_maps, make_weight

GOLDEN = json.loads(Path(__file__).with_name("golden_decoders.json").read_text())["families"]


def decode(family: str, **changes: Any) -> Decoded:
    """Outputs of all layers."""
    settings, channels = FAMILIES[family]
    config = DecoderConfig(**{**SMALL, **settings, **changes})
    decoder = QueryDecoder(config, channels, CLASSES).double().eval()
    state = decoder.state_dict()
    decoder.load_state_dict({name: make_weight(name, tensor.shape) for name, tensor in state.items()})
    with torch.no_grad():
        return decoder(make_maps(channels), every_layer=True)


def by_name(found: Decoded) -> dict[str, tuple[Tensor, Tensor]]:
    """(logits, boxes) of the one image by the names in the file."""
    layers = zip(found.logits[:, 0], found.boxes[:, 0])
    pairs = {"encoder": (found.encoder_logits[0], found.encoder_boxes[0])}
    if found.pre_logits is not None and found.pre_boxes is not None:
        pairs["pre"] = found.pre_logits[0], found.pre_boxes[0]
    return pairs | {f"layer {index}": layer for index, layer in enumerate(layers)}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_outputs(family: str) -> None:
    found, expected = by_name(decode(family)), GOLDEN[family]
    if family == "EdgeCrafter":  # its code gives the last layer alone
        found = {"layer 2": found["layer 2"]}
    assert found.keys() == expected.keys()
    for name, (logits, boxes) in found.items():
        for ours, theirs in ((logits, expected[name]["logits"]), (boxes, expected[name]["boxes"])):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-8)


CHANGES = [("DEIM", {"act": "relu"}), ("DEIM-RT-DETRv2", {"act": "relu"}), ("EdgeCrafter", {"act": "relu"})]


@pytest.mark.parametrize(
    ("family", "change"), [*CHANGES, ("EdgeCrafter", {"position_once": False}), ("DEIM", {"position_once": True})]
)
def test_what_no_tensor_tells_is_noticed(family: str, change: dict[str, Any]) -> None:
    found = by_name(decode(family, **change))["layer 2"][1]
    assert (found - torch.tensor(GOLDEN[family]["layer 2"]["boxes"])).abs().max() > 1e-3

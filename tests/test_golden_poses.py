"""The pose decoder against the original ones of ECPose and DETRPose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision.heads.poses.decoder import PoseDecoder
from mvision.heads.poses.outputs import Decoded
from mvision.heads.poses.settings import PoseConfig
from tests.decoder_inputs import make_weight
from tests.pose_inputs import CLASSES, FAMILIES, SIZES, make_denoising, make_maps

GOLDEN = json.loads(Path(__file__).with_name("golden_poses.json").read_text())["families"]
CASES = [(family, size) for family, sizes in SIZES.items() for size in sizes]


def decode(family: str, size: str, denoising: bool = True, **changes: Any) -> Decoded:
    """Outputs of all layers."""
    settings, points = FAMILIES[family]
    config = PoseConfig(**{**settings, **changes})
    shapes = SIZES[family][size]
    decoder = PoseDecoder(config, [config.embed_dim] * len(shapes), [points] * CLASSES).double().eval()
    state = decoder.state_dict()
    decoder.load_state_dict({name: make_weight(name, tensor.shape) for name, tensor in state.items()})
    given = make_denoising(points, config.num_queries) if denoising else None
    with torch.no_grad():
        return decoder(make_maps(config.embed_dim, shapes), given, every_layer=denoising)


def by_name(found: Decoded) -> dict[str, tuple[Tensor, Tensor]]:
    """(logits, points) of the one image by the names in the file."""
    pairs = {f"layer {index}": (logits[0, 2:], points[0, 2:]) for index, (logits, points) in enumerate(zip(*found[:2]))}
    noisy = {
        f"denoising {index}": (logits[0, :2], points[0, :2]) for index, (logits, points) in enumerate(zip(*found[:2]))
    }
    assert found.pre_logits is not None
    assert found.pre_points is not None
    assert found.encoder_logits is not None
    assert found.encoder_points is not None
    pre = found.pre_logits[0, 2:], found.pre_points[0, 2:]
    return pairs | noisy | {"pre": pre, "encoder": (found.encoder_logits[0], found.encoder_points[0])}


@pytest.mark.parametrize(("family", "size"), CASES)
def test_equal_outputs_of_all_layers(family: str, size: str) -> None:
    found, expected = by_name(decode(family, size)), GOLDEN[family][size]
    assert found.keys() == expected.keys()
    for name, (logits, points) in found.items():
        for ours, theirs in ((logits, expected[name]["logits"]), (points.flatten(1), expected[name]["points"])):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize(("family", "size"), CASES)
def test_equal_outputs_in_prediction(family: str, size: str) -> None:
    found, expected = decode(family, size, denoising=False), GOLDEN[family][size]["layer 2"]
    assert len(found.logits) == 1
    for ours, theirs in ((found.logits[0, 0], expected["logits"]), (found.points[0, 0].flatten(1), expected["points"])):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("change", [{"bin_reach": 0.6}, {"bin_scale": 5.0}, {"act": "silu"}])
def test_what_no_tensor_tells_is_noticed(change: dict[str, Any]) -> None:
    found = decode("ECPose", "square", denoising=False, **change).points[0, 0].flatten(1)
    assert (found - torch.tensor(GOLDEN["ECPose"]["square"]["layer 2"]["points"])).abs().max() > 1e-3

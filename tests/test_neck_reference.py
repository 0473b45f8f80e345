"""The hybrid encoder computes the numbers of the published one, in evaluation and in training."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision.neck.hybrid_encoder import HybridEncoder
from tests.test_neck import CHANNELS, STRIDES, make_maps, max_difference, randomise_norms

# Keys of transformers' RTDetrModel, as published (< 5) and as today.
NECK_KEYS = [
    (r"^encoder_input_proj\.(\d+)\.0\.", r"projections.\1.conv."),
    (r"^encoder_input_proj\.(\d+)\.1\.", r"projections.\1.norm."),
    (r"^encoder\.(?:aifi|encoder)\.", "aifi."),
    (r"^encoder\.fpn_blocks\.", "top_down."),
    (r"^encoder\.pan_blocks\.", "bottom_up."),
    (r"^encoder\.(lateral_convs|downsample_convs)\.", r"\1."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".attention_norm."),
    (r"\.(?:mlp\.)?fc1\.", ".ffn.layers.0."),
    (r"\.(?:mlp\.)?fc2\.", ".ffn.layers.1."),
    (r"\.final_layer_norm\.", ".ffn_norm."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".blocks.\1.conv3x3."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".blocks.\1.conv1x1."),
]


def make_reference(**settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    hidden = settings.setdefault("encoder_hidden_dim", 32)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, *CHANNELS], depths=[1] * 4, out_indices=[2, 3, 4], layer_type="basic"
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=CHANNELS,
        d_model=hidden,
        decoder_in_channels=[hidden] * 3,
        decoder_layers=1,
        num_queries=3,
        **settings,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.RTDetrModel(config).eval()
    randomise_norms(model)
    with torch.no_grad():
        for parameter in model.encoder.aifi.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def from_reference(reference: nn.Module, **settings: Any) -> HybridEncoder:
    state = {}
    for key, value in reference.state_dict().items():
        if key.startswith(("encoder.", "encoder_input_proj.")):
            for pattern, replacement in NECK_KEYS:
                key = re.sub(pattern, replacement, key)
            state[key] = value
    width = state["projections.0.conv.weight"].shape[0]
    neck = HybridEncoder(CHANNELS, STRIDES, width, share_attention=False, **settings).eval()
    neck.load_state_dict(state)
    return neck


def run_reference(reference: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    projected = [projection(x) for projection, x in zip(reference.encoder_input_proj, maps)]
    return reference.encoder(projected).last_hidden_state


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"hidden_expansion": 0.5}, {"expansion": 0.5}, id="half-width"),
        pytest.param(
            {"encode_proj_layers": [0, 1, 2], "encoder_layers": 2, "encoder_attention_heads": 4},
            {"attention_levels": "all", "num_layers": 2, "num_heads": 4},
            id="every-scale",
        ),
        pytest.param(
            {"encoder_activation_function": "relu", "activation_function": "gelu", "encoder_ffn_dim": 48},
            {"attention_act": "relu", "conv_act": "gelu", "ffn_dim": 48},
            id="activations",
        ),
    ],
)
@torch.no_grad()
def test_numbers_of_the_published_encoder(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    reference = make_reference(**theirs)
    neck = from_reference(reference, **ours)
    assert neck.strides == STRIDES
    for height, width in ((128, 128), (192, 96)):
        maps = make_maps(height, width)
        expected, outputs = run_reference(reference, maps), neck(maps)
        assert max_difference(expected, outputs) <= 1e-5
    reference.double()
    neck.double()
    maps = [x.double() for x in maps]
    expected = run_reference(reference, maps)
    assert min(x.std().item() for x in expected) > 0.05, "random weights must not hide a difference"
    assert max_difference(expected, neck(maps)) <= 1e-9
    assert max_difference(expected, neck.fuse()(maps)) <= 1e-9


def test_training_statistics_and_gradients_are_the_references() -> None:
    reference = make_reference().double().train()
    neck = from_reference(reference).double().train()
    maps = [x.double() for x in make_maps(96, 96)]
    expected, outputs = run_reference(reference, maps), neck(maps)
    assert max_difference(expected, outputs) <= 1e-9
    for result in (expected, outputs):
        sum(x.square().mean() for x in result).backward()
    pairs = [
        (reference.encoder_input_proj[0][0].weight, neck.projections[0].conv.weight),
        (
            reference.encoder.fpn_blocks[0].bottlenecks[0].conv1.norm.weight,
            neck.top_down[0].blocks[0].conv3x3.norm.weight,
        ),
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        reference.encoder.pan_blocks[1].conv1.norm.running_var, neck.bottom_up[1].conv1.norm.running_var
    )

"""The settings of D-FINE's sizes give the numbers of the published encoder, in evaluation and in training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision.neck.hybrid_encoder import HybridEncoder
from tests.test_neck import max_difference, randomise_norms

DFINE: dict[str, Any] = {"fusion_block": "elan", "downsample": "separable", "lateral_act": False}
# Names in transformers' DFineHybridEncoder.
NECK_KEYS = [
    (r"^fpn_blocks\.", "top_down."),
    (r"^pan_blocks\.", "bottom_up."),
    (r"^downsample_convs\.(\d+)\.conv1\.", r"downsample_convs.\1.pointwise."),
    (r"^downsample_convs\.(\d+)\.conv2\.", r"downsample_convs.\1.depthwise."),
    (r"^(top_down|bottom_up)\.(\d+)\.conv2\.", r"\1.\2.branch1.conv."),
    (r"^(top_down|bottom_up)\.(\d+)\.conv3\.", r"\1.\2.branch2.conv."),
    (r"^(top_down|bottom_up)\.(\d+)\.conv4\.", r"\1.\2.conv2."),
    (r"\.csp_rep([12])\.", r".branch\1.csp."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".blocks.\1.conv3x3."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".blocks.\1.conv1x1."),
    (r"\.self_attn\.o_proj\.", ".attention.out_proj."),
    (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".attention_norm."),
    (r"\.mlp\.(?:layers\.0|fc1)\.", ".ffn.layers.0."),
    (r"\.mlp\.(?:layers\.1|fc2)\.", ".ffn.layers.1."),
    (r"\.final_layer_norm\.", ".ffn_norm."),
]


def make_reference(levels: int, **settings: Any) -> nn.Module:
    """transformers' encoder without projections, with norms that are not the identity."""
    pytest.importorskip("transformers")
    from transformers import DFineConfig
    from transformers.models.d_fine.modeling_d_fine import DFineHybridEncoder

    config = DFineConfig(
        encoder_in_channels=[8] * levels,
        feat_strides=[8, 16, 32][-levels:],
        encode_proj_layers=[levels - 1],
        num_feature_levels=levels,
        **settings,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    reference = DFineHybridEncoder(config).eval()
    with torch.no_grad():
        for parameter in reference.aifi.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    randomise_norms(reference)
    return reference.double()


def from_reference(reference: nn.Module, channels: list[int], strides: list[int], **settings: Any) -> HybridEncoder:
    state = {}
    for key, value in reference.state_dict().items():
        for pattern, replacement in NECK_KEYS:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    neck = HybridEncoder(channels, strides, **settings).eval().double()
    randomise_norms(neck)  # of the projections, which the reference's encoder does not have
    state |= {key: value for key, value in neck.state_dict().items() if key.startswith("projections.")}
    neck.load_state_dict(state)
    return neck


def make_maps(channels: list[int], strides: list[int], height: int, width: int) -> list[Tensor]:
    return [torch.randn(2, c, height // s, width // s).double() for c, s in zip(channels, strides)]


def run_reference(reference: nn.Module, neck: HybridEncoder, maps: list[Tensor]) -> list[Tensor]:
    projected = [projection(x) for projection, x in zip(neck.projections, maps)]
    return reference(inputs_embeds=projected).last_hidden_state


@pytest.mark.parametrize(
    ("width", "ffn_dim", "expansion", "depth_mult", "depth", "levels"),
    [
        pytest.param(128, 512, 0.34, 0.5, 2, 2, id="N"),
        pytest.param(256, 1024, 0.5, 0.34, 1, 3, id="S"),
        pytest.param(256, 1024, 1.0, 0.67, 2, 3, id="M"),
        pytest.param(48, 96, 1.0, 1.0, 3, 3, id="X, narrow"),
    ],
)
@torch.no_grad()
def test_numbers_of_the_published_encoder(
    width: int, ffn_dim: int, expansion: float, depth_mult: float, depth: int, levels: int
) -> None:
    reference = make_reference(
        levels,
        encoder_hidden_dim=width,
        encoder_ffn_dim=ffn_dim,
        hidden_expansion=expansion,
        depth_mult=depth_mult,
    )
    channels, strides = [12, 16, 24][-levels:], [8, 16, 32][-levels:]
    ours = {"embed_dim": width, "ffn_dim": ffn_dim, "expansion": expansion, "depth": depth}
    neck = from_reference(reference, channels, strides, **DFINE, **ours)
    cases = [make_maps(channels, strides, *size) for size in ((96, 96), (64, 160), (192, 96))]
    expected = [run_reference(reference, neck, maps) for maps in cases]
    for maps, theirs in zip(cases, expected):
        assert min(x.std().item() for x in theirs) > 0.05, "random weights must not hide a difference"
        assert max_difference(theirs, neck(maps)) <= 1e-9
    neck.fuse()
    for maps, theirs in zip(cases, expected):
        assert max_difference(theirs, neck(maps)) <= 1e-9


def test_training_statistics_and_gradients_are_the_references() -> None:
    reference = make_reference(3, encoder_hidden_dim=32, encoder_ffn_dim=48, hidden_expansion=0.5, depth_mult=0.34)
    channels, strides = [12, 16, 24], [8, 16, 32]
    neck = from_reference(reference, channels, strides, **DFINE, embed_dim=32, ffn_dim=48, expansion=0.5, depth=1)
    reference.train()
    neck.train()
    neck.projections.eval()  # used by both
    maps = make_maps(channels, strides, 96, 64)
    expected, outputs = run_reference(reference, neck, maps), neck(maps)
    assert max_difference(expected, outputs) <= 1e-9
    for result in (expected, outputs):
        sum(x.square().mean() for x in result).backward()
    theirs, ours = reference.fpn_blocks[0], neck.top_down[0]
    pairs = [
        (theirs.conv1.conv.weight, ours.conv1.conv.weight),
        (theirs.csp_rep1.conv2.conv.weight, ours.branch1.csp.conv2.conv.weight),
        (theirs.conv3.norm.weight, ours.branch2.conv.norm.weight),
        (reference.downsample_convs[1].conv2.conv.weight, neck.downsample_convs[1].depthwise.conv.weight),
    ]
    for their_parameter, our_parameter in pairs:
        torch.testing.assert_close(their_parameter.grad, our_parameter.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(theirs.conv4.norm.running_var, ours.conv2.norm.running_var)

"""Every setting of the neck's fusion alone: sizes, gradients, fusing, and the forms in which a model is used."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision import UserError, create_model
from mvision.config import NeckConfig
from mvision.deploy.compare import difference
from mvision.fast.biases import join_biases
from mvision.fast.prepare import prepare
from mvision.neck.fusion import ELANBlock, SplitCSPRepLayer
from mvision.neck.hybrid_encoder import HybridEncoder
from mvision.neck.layers import CSPRepLayer, RepBlock, fuse_modules
from tests.test_neck import CHANNELS, SMALL, STRIDES, make_maps, make_neck, max_difference, randomise_norms

ELAN: dict[str, Any] = {"fusion_block": "elan"}
OPTIONS = [
    pytest.param(settings, id=name)
    for name, settings in {
        "elan": ELAN,
        "elan, no convolution": {**ELAN, "elan_conv": False},
        "elan, split": {**ELAN, "elan_split": True},
        "elan, identity": {**ELAN, "rep_identity": True, "depth": 2, "expansion": 0.5},
        "separable": {"downsample": "separable"},
        "plain laterals": {"lateral_act": False},
        "sum": {"fusion": "sum"},
        "silu": {"attention_act": "silu"},
        "no projections": {"projections": False},
    }.items()
]
DFINE: dict[str, Any] = {**ELAN, "downsample": "separable", "lateral_act": False}
EDGECRAFTER: dict[str, Any] = {
    **DFINE, "elan_conv": False, "elan_split": True, "fusion": "sum", "projections": False, "attention_act": "silu",
}  # fmt: skip


def make(settings: dict[str, Any], strides: list[int] = STRIDES) -> HybridEncoder:
    width = SMALL["embed_dim"]
    channels = CHANNELS if settings.get("projections", True) else [width] * 3
    return make_neck(channels[-len(strides) :], strides, **settings)


def maps_for(
    neck: HybridEncoder, height: int = 100, width: int = 140, batch: int = 2, *, floor: bool = False
) -> list[Tensor]:
    """As ``make_maps``, with the channels and the number of maps that the neck takes."""
    maps = make_maps(height, width, batch, floor=floor)[-len(neck.in_channels) :]
    return [torch.randn(batch, channels, *x.shape[-2:]) for x, channels in zip(maps, neck.in_channels)]


@pytest.mark.parametrize("settings", OPTIONS)
@pytest.mark.parametrize("strides", [STRIDES, STRIDES[1:]])
@torch.no_grad()
def test_maps_keep_their_size_and_fusing_is_exact(settings: dict[str, Any], strides: list[int]) -> None:
    neck = make(settings, strides)
    wide = copy.deepcopy(neck).double()
    sizes = [(100, 140, False), (97, 33, False), (333, 517, True)]
    cases = [maps_for(neck, height, width, floor=floor) for height, width, floor in sizes]
    expected = [neck(maps) for maps in cases]
    wide_expected = [wide([x.double() for x in maps]) for maps in cases]
    for maps, outputs in zip(cases, expected):
        assert [x.shape for x in outputs] == [(2, 16, *x.shape[-2:]) for x in maps]
    neck.fuse()
    wide.fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in neck.modules())
    for maps, outputs, wide_outputs in zip(cases, expected, wide_expected):
        assert max_difference(neck(maps), outputs) <= 1e-5
        assert max_difference(wide([x.double() for x in maps]), wide_outputs) <= 1e-12


@pytest.mark.parametrize("settings", OPTIONS)
def test_every_parameter_learns(settings: dict[str, Any]) -> None:
    neck = make(settings).train()
    maps = [x.requires_grad_() for x in maps_for(neck)]
    sum(x.square().mean() for x in neck(maps)).backward()
    silent = [name for name, parameter in neck.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # A bias on all keys shifts a query's logits alike, which softmax ignores: its gradient is zero but for rounding.
    assert [name for name in silent if not name.endswith("k_proj.bias")] == []
    assert all(x.grad is not None and x.grad.any() for x in maps)


def test_depth_and_width_of_elan_blocks() -> None:
    neck = make({**ELAN, "depth": 2, "expansion": 0.7, "rep_identity": True})
    blocks = [module for module in neck.modules() if isinstance(module, RepBlock)]
    assert len(blocks) == 4 * 2 * 2
    assert all(block.identity is not None for block in blocks)
    widths = {module.conv1x1.conv.out_channels for module in blocks if module.conv1x1 is not None}
    assert widths == {int(0.7 * 16 // 2)} == {5}


@torch.no_grad()
def test_a_split_layer_is_a_csp_layer_whose_two_convolutions_are_one() -> None:
    torch.manual_seed(0)
    plain, split = CSPRepLayer(6, 8, depth=2).eval(), SplitCSPRepLayer(6, 8, depth=2).eval()
    randomise_norms(plain)
    state = {key: x for key, x in plain.state_dict().items() if key.startswith("blocks.")}
    for key, x in plain.conv1.state_dict().items():
        other = plain.conv2.state_dict()[key]
        state[f"conv1.{key}"] = torch.cat([other, x]) if x.ndim else x
    split.load_state_dict(state)
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(split(x), plain(x))


@torch.no_grad()
def test_the_second_branch_takes_what_the_first_gives() -> None:
    torch.manual_seed(0)
    block = ELANBlock(6, 8, depth=1).eval()
    randomise_norms(block)
    x = torch.randn(2, 6, 5, 7)
    kept, changed = block.conv1(x)
    first = block.branch1.conv(block.branch1.csp(changed))
    second = block.branch2.conv(block.branch2.csp(first))
    torch.testing.assert_close(block(x), block.conv2(torch.cat([kept, changed, first, second], 1)))


@pytest.mark.parametrize("block", [ELANBlock(6, 8, depth=1, split=True), SplitCSPRepLayer(6, 8, depth=1)])
@torch.no_grad()
def test_no_convolution_of_a_fused_block_takes_a_part_of_a_map(block: nn.Module) -> None:
    """It would copy the part first."""
    block = fuse_modules(copy.deepcopy(block).eval())
    taken: list[Tensor] = []
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    block(torch.randn(2, 6, 5, 7))
    assert taken
    assert all(x.is_contiguous() for x in taken)
    state = copy.deepcopy(block.state_dict())
    assert list(fuse_modules(block).state_dict()) == list(state)
    other = fuse_modules(copy.deepcopy(block))
    other.load_state_dict(state)


def test_separable_downsampling_by_four_uses_every_pixel() -> None:
    neck = make_neck([6, 10], [8, 32], attention_levels=[], downsample="separable")
    fine = torch.randn(1, 6, 16, 16, requires_grad=True)
    neck.downsample_convs[0](neck.projections[0](fine)).square().sum().backward()
    assert fine.grad is not None
    assert (fine.grad != 0).any(1).all()


# The forms in which a model is used


@torch.no_grad()
def test_the_neck_runs_on_the_meta_device() -> None:
    for settings in (DFINE, EDGECRAFTER):
        with torch.device("meta"):
            neck = HybridEncoder([16] * 3, STRIDES, **{**SMALL, **settings}).eval()
            outputs = neck.fuse()([torch.empty(2, 16, 96 // s, 160 // s) for s in STRIDES])
        assert [x.shape for x in outputs] == [(2, 16, 96 // s, 160 // s) for s in STRIDES]


def test_bf16_autocast_gives_bf16_on_every_scale() -> None:
    for settings in (DFINE, EDGECRAFTER):
        neck = make(settings).train()
        maps = [x.bfloat16() for x in maps_for(neck)]
        with torch.autocast("cpu", torch.bfloat16):
            outputs = neck(maps)
        assert [x.dtype for x in outputs] == [torch.bfloat16] * 3
        sum(x.float().square().mean() for x in outputs).backward()
        assert all(parameter.grad.isfinite().all() for parameter in neck.parameters())


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [("test_resnet", {**DFINE, "embed_dim": 32}), ("test_vit", {**EDGECRAFTER, "embed_dim": 64})],
)
@torch.no_grad()
def test_prepared_models_give_the_same_outputs(backbone: str, settings: dict[str, Any]) -> None:
    named = {f"neck__{name}": value for name, value in {**settings, "num_heads": 4, "depth": 1}.items()}
    torch.manual_seed(0)
    model = create_model("tiny", num_classes=2, backbone__name=backbone, image_size=96, **named).eval()
    randomise_norms(model.neck)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    expected = model(images)
    packed, plain = prepare(copy.deepcopy(model)), prepare(copy.deepcopy(model), packed=False)
    for ready in (packed, plain, join_biases(copy.deepcopy(plain))):
        found, where = difference(expected, ready(images))
        assert found < 1e-4, where


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion_block": "elann"}, "fusion_block='elann' is not one of 'csp', 'elan'"),
        ({"downsample": "pool"}, "downsample='pool' is not one of 'conv', 'separable'"),
        ({"fusion": "cat"}, "fusion='cat' is not one of 'concat', 'sum'"),
        ({"in_channels": [12], "strides": [32], "fusion_block": "c2f"}, "fusion_block='c2f' is not one of"),
        ({"in_channels": [12], "strides": [32], "downsample": "max"}, "downsample='max' is not one of"),
        ({"attention_act": "swish"}, "unknown activation 'swish'"),
        ({"elan_split": True}, "elan_split=True has no effect with fusion_block='csp'; .* set fusion_block='elan'"),
        ({"elan_conv": False}, "elan_conv=False has no effect with fusion_block='csp'"),
        ({**ELAN, "depth": -1}, "depth=-1"),
        ({**ELAN, "elan_split": True, "depth": -1}, "depth=-1"),
        ({**ELAN, "expansion": 0.007}, "expansion=0.007 of 256 channels leaves none for a branch of an ELAN block"),
        (
            {"projections": False, "in_channels": [256, 256, 24]},
            "projections=False takes maps of embed_dim=256 channels as they are, but map 2 has 24",
        ),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridEncoder(**{"in_channels": CHANNELS, "strides": STRIDES, **arguments})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion_block": "elann"}, "model.neck.fusion_block: input should be 'csp' or 'elan' .got 'elann'"),
        ({"downsample": "pool"}, "model.neck.downsample: input should be 'conv' or 'separable' .got 'pool'"),
        ({"fusion": "cat"}, "model.neck.fusion: input should be 'concat' or 'sum' .got 'cat'"),
        ({"attention_act": "swish"}, "model.neck.attention_act: input should be 'gelu', 'relu' or 'silu' .got 'swish'"),
        (
            {"projections": False},
            "model.neck: projections=False takes maps of embed_dim=128 .* but map 0 has 48; set projections=True",
        ),
        ({"elan_split": True}, "model.neck: elan_split=True has no effect with fusion_block='csp'"),
        ({"num_heads": 7}, "model.neck: embed_dim=128 is not a multiple of num_heads=7"),
    ],
)
def test_mistakes_in_a_config_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        create_model("tiny", num_classes=2, **{f"neck__{name}": value for name, value in settings.items()})
    assert "\n" not in str(error.value)


def test_every_setting_of_the_schema_is_an_argument_with_the_same_default() -> None:
    parameters = inspect.signature(HybridEncoder).parameters
    for name, field in NeckConfig.model_fields.items():
        assert parameters[name].default == field.default, name

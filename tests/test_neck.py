"""The hybrid encoder: maps of every kind, its settings, precision and fusing; see also test_neck_*.py."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision.neck.aifi import AIFI
from mvision.neck.hybrid_encoder import HybridEncoder, pyramid_strides
from mvision.neck.layers import RepBlock

CHANNELS, STRIDES = [12, 16, 24], [8, 16, 32]
SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "ffn_dim": 24, "depth": 1}


def make_neck(channels: list[int] = CHANNELS, strides: list[int] = STRIDES, **settings: Any) -> HybridEncoder:
    """A small neck in eval mode with norms that are not the identity."""
    torch.manual_seed(0)
    neck = HybridEncoder(channels, strides, **{**SMALL, **settings}).eval()
    randomise_norms(neck)
    return neck


@torch.no_grad()
def randomise_norms(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.5)
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.5, 2.0)


def make_maps(height: int = 96, width: int = 128, batch: int = 2, *, floor: bool = False) -> list[Tensor]:
    """Maps of an image of this size, from a backbone that rounds down or up at every stride."""
    sizes = [(height // s, width // s) if floor else (-(-height // s), -(-width // s)) for s in STRIDES]
    return [torch.randn(batch, c, *size) for c, size in zip(CHANNELS, sizes)]


def max_difference(a: list[Tensor], b: list[Tensor]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    return max((x - y).abs().max().item() for x, y in zip(a, b))


@pytest.mark.parametrize(("height", "width"), [(96, 128), (333, 517), (97, 31), (1, 1)])
@pytest.mark.parametrize("floor", [False, True])
def test_maps_keep_their_size(height: int, width: int, floor: bool) -> None:
    maps = make_maps(max(height, 32), max(width, 32), floor=True) if floor else make_maps(height, width)
    outputs = make_neck()(maps)
    assert [x.shape for x in outputs] == [(2, 16, *x.shape[-2:]) for x in maps]
    assert all(x.isfinite().all() for x in outputs)


def test_maps_of_unrelated_sizes_keep_them() -> None:
    maps = [torch.randn(1, c, *size) for c, size in zip(CHANNELS, [(9, 30), (11, 7), (2, 5)])]
    assert [x.shape[-2:] for x in make_neck()(maps)] == [(9, 30), (11, 7), (2, 5)]


@pytest.mark.parametrize(
    ("channels", "strides"), [([8], [32]), ([6, 10], [4, 32]), ([3, 5, 7, 9], [4, 8, 16, 32]), ([4, 4], [8, 12])]
)
def test_any_number_of_maps_channels_and_strides(channels: list[int], strides: list[int]) -> None:
    neck = make_neck(channels, strides)
    outputs = neck([torch.randn(2, c, 96 // s, 192 // s) for c, s in zip(channels, strides)])
    assert [x.shape for x in outputs] == [(2, 16, 96 // s, 192 // s) for s in strides]
    assert neck.strides == strides
    assert neck.out_channels == [16] * len(channels)


def test_downsampling_by_four_uses_every_pixel() -> None:
    neck = make_neck([6, 10], [8, 32], attention_levels=[])
    fine = torch.randn(1, 6, 16, 16, requires_grad=True)
    neck.downsample_convs[0](neck.projections[0](fine)).square().sum().backward()
    assert fine.grad is not None
    assert (fine.grad != 0).any(1).all()


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ([8, 16, 32], [8, 16, 32]),
        ([16], [16]),
        ([16, 16], [8, 16]),
        ([16, 16, 16], [8, 16, 32]),
        ([16, 16, 16, 16], [4, 8, 16, 32]),
        ([14, 14, 14, 14], [7, 14, 28, 56]),
        ([7, 7], [7, 14]),
        ([8, 16, 16], [8, 16, 32]),
        ([4, 8, 8, 8], [4, 8, 16, 32]),
        ([16, 16, 24], [16, 32, 48]),
    ],
)
def test_pyramid_strides(strides: list[int], expected: list[int]) -> None:
    assert pyramid_strides(strides) == expected


@pytest.mark.parametrize("strides", [[16, 16, 16], [8, 16, 16], [14, 14, 14, 14]])
def test_repeated_strides_become_a_pyramid(strides: list[int]) -> None:
    channels = [12] * len(strides)
    neck = make_neck(channels, strides)
    size = 16 * 14
    outputs = neck([torch.randn(1, 12, size // s, size // s) for s in strides])
    assert [x.shape[-1] for x in outputs] == [size // s for s in neck.strides]
    assert len(set(neck.strides)) == len(strides)


# Settings


def test_default_attention_is_on_the_coarsest_scale_alone() -> None:
    neck = make_neck()
    assert neck.attention_levels == [2]
    attended: list[torch.Size] = []
    neck.aifi[0].register_forward_hook(lambda module, inputs, output: attended.append(output.shape))
    neck(make_maps(96, 128))
    assert attended == [(2, 16, 3, 4)]


@pytest.mark.parametrize(
    ("settings", "levels", "num_aifi"),
    [
        ({"attention_levels": "all"}, [0, 1, 2], 1),
        ({"attention_levels": "all", "share_attention": False}, [0, 1, 2], 3),
        ({"attention_levels": [-1, 1]}, [1, 2], 1),
        ({"attention_levels": []}, [], 0),
    ],
)
def test_attention_levels_and_sharing(settings: dict[str, Any], levels: list[int], num_aifi: int) -> None:
    neck = make_neck(**settings)
    assert neck.attention_levels == levels
    assert sum(isinstance(module, AIFI) for module in neck.modules()) == num_aifi
    maps = make_maps()
    attended: list[int] = []
    for aifi in neck.aifi:
        aifi.register_forward_hook(lambda module, inputs, output: attended.append(output.shape[-1]))
    neck(maps)
    assert attended == [maps[level].shape[-1] for level in levels]


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_levels": "all", "position": "learned", "share_attention": False, "num_layers": 2},
        {"attention_levels": "all", "position": "learned", "attention": "window", "window_size": 3},
        {"rep_identity": True, "expansion": 0.5, "depth": 2, "dropout": 0.1},
        {"attention_levels": []},
    ],
)
def test_every_parameter_learns(settings: dict[str, Any]) -> None:
    neck = make_neck(**settings).train()
    sum(x.square().mean() for x in neck(make_maps(100, 140))).backward()
    silent = [name for name, parameter in neck.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # A bias on all keys shifts a query's logits alike, which softmax ignores: its gradient is zero but for rounding.
    assert [name for name in silent if not name.endswith("k_proj.bias")] == []


def test_pyramid_of_a_plain_vit_learns() -> None:
    neck = make_neck([12] * 4, [16] * 4).train()
    sum(x.square().mean() for x in neck([torch.randn(2, 12, 5, 7) for _ in range(4)])).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


def test_depth_and_identity_reach_every_fusion_block() -> None:
    neck = make_neck(depth=2, rep_identity=True)
    blocks = [module for module in neck.modules() if isinstance(module, RepBlock)]
    assert len(blocks) == 4 * 2
    assert all(block.identity is not None for block in blocks)


def test_learned_positions_work_at_every_size_and_differ_by_scale() -> None:
    neck = make_neck(position="learned", attention_levels="all")
    for height, width in ((640, 640), (333, 517), (32, 1024)):
        assert all(x.isfinite().all() for x in neck(make_maps(height, width, batch=1)))
    assert not torch.equal(neck.position.scales[0], neck.position.scales[1])


@torch.no_grad()
def test_window_modes() -> None:
    maps = make_maps(160, 224)
    neck = make_neck(attention_levels="all", window_size=28)
    everywhere = neck(maps)
    neck.attention = "window"
    assert max_difference(neck(maps), everywhere) <= 1e-5, "one window over each map"
    neck.window_size = 5
    inside = neck(maps)
    assert max_difference(inside, everywhere) > 1e-2
    neck.attention = "auto"
    neck.window_threshold = 20 * 28
    assert max_difference(neck(maps), everywhere) == 0
    neck.window_threshold = 5 * 7 - 1
    assert max_difference(neck(maps), inside) == 0


def test_auto_is_global_up_to_1280_pixels_by_default() -> None:
    neck = make_neck(attention="auto")
    assert neck._window(torch.empty(1, 16, 40, 40)) == 0
    assert neck._window(torch.empty(1, 16, 40, 41)) == 20


# Precision, memory, fusing


@pytest.mark.parametrize("identity", [False, True])
@torch.no_grad()
def test_fusing_is_exact_and_once(identity: bool) -> None:
    maps = make_maps(100, 140)
    neck = make_neck(depth=3, rep_identity=identity)
    wide, wide_maps = copy.deepcopy(neck).double(), [x.double() for x in maps]
    expected, wide_expected = neck(maps), wide(wide_maps)
    assert neck.fuse() is neck
    assert not any(isinstance(module, nn.BatchNorm2d) for module in neck.modules())
    assert max_difference(neck(maps), expected) <= 1e-5
    assert max_difference(wide.fuse()(wide_maps), wide_expected) <= 1e-12
    again = neck(maps)
    assert max_difference(neck.fuse()(maps), again) == 0
    other = make_neck(depth=3, rep_identity=identity).fuse()
    other.load_state_dict(neck.state_dict())
    assert max_difference(copy.deepcopy(other)(maps), again) == 0


def test_bf16_autocast_gives_bf16_on_every_scale() -> None:
    neck = make_neck(attention_levels="all", position="learned").train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = neck(make_maps())
    assert [x.dtype for x in outputs] == [torch.bfloat16] * 3
    sum(x.float().square().mean() for x in outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in neck.parameters())


@torch.no_grad()
def test_memory_format_goes_through() -> None:
    maps = make_maps()
    neck = make_neck()
    expected = neck(maps)
    assert all(x.is_contiguous() for x in expected)
    neck = neck.to(memory_format=torch.channels_last)
    outputs = neck([x.to(memory_format=torch.channels_last) for x in maps])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in outputs)
    assert max_difference(outputs, expected) <= 1e-5


# With timm


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_mambaout"])
@torch.no_grad()
def test_any_timm_backbone(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 160} if "vit" in name else {}
    backbone = timm.create_model(name, features_only=True, **options).eval()
    info = backbone.feature_info
    neck = make_neck(info.channels()[-3:], info.reduction()[-3:])
    maps = backbone(torch.randn(1, 3, 160, 160))[-3:]
    if getattr(backbone, "output_fmt", None) == "NHWC":
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    outputs = neck(maps)
    assert [x.shape for x in outputs] == [(1, 16, -(-160 // s), -(-160 // s)) for s in neck.strides]


def test_importing_the_neck_needs_torch_alone() -> None:
    heavy = ("timm", "torchvision", "albumentations", "transformers", "cv2", "scipy", "pydantic", "PIL")
    code = f"import sys, mvision.neck; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 100, "num_heads": 8}, "embed_dim=100 is not a multiple of num_heads=8"),
        ({"embed_dim": 30, "num_heads": 3}, "embed_dim=30 is not a multiple of 4.*embed_dim=32"),
        ({"strides": [8, 16]}, r"in_channels=\[12, 16, 24\] and strides=\[8, 16\] must have one number per map"),
        ({"in_channels": [], "strides": []}, "at least one"),
        ({"in_channels": [0, 16, 24]}, "must be positive"),
        ({"strides": [32, 16, 8]}, r"strides=\[32, 16, 8\] must not decrease: give the maps finest first"),
        ({"attention": "windows"}, "attention='windows' is not one of 'global', 'window', 'auto'"),
        ({"attention_levels": "finest"}, "attention_levels='finest' is not one of 'coarsest', 'all'"),
        ({"attention_levels": [3]}, r"attention_levels=\[3\] names map 3, but there are 3 maps"),
        ({"position": "sine"}, "position='sine' is not one of 'sincos', 'fraction', 'learned'"),
        ({"window_size": 0}, "window_size=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"depth": -1}, "depth=-1"),
        ({"conv_act": "swish"}, "unknown activation 'swish'"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridEncoder(**{"in_channels": CHANNELS, "strides": STRIDES, **arguments})


def test_maps_that_do_not_fit_are_named() -> None:
    neck, maps = make_neck(), make_maps()
    with pytest.raises(ValueError, match=r"built for 3 maps \(in_channels=\[12, 16, 24\]\) and got 2"):
        neck(maps[:2])
    with pytest.raises(ValueError, match=r"map 0 must be \(B, 12, H, W\) and is \(2, 24, 3, 4\)$"):
        neck(maps[::-1])
    with pytest.raises(ValueError, match=r"map 1 must be .* looks channels-last .*permute\(0, 3, 1, 2\)"):
        neck([maps[0], maps[1].permute(0, 2, 3, 1), maps[2]])
    with pytest.raises(ValueError, match=r"map 2 must be \(B, 24, H, W\) and is \(24, 3, 4\)"):
        neck([maps[0], maps[1], maps[2][0]])

"""Backbones of two libraries behave alike: maps by stride, their own normalisation, uint8 or float."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from mvision import UserError
from mvision.backbone import Backbone, check_backbone_name, feature_nets, freeze
from mvision.config import BackboneConfig
from mvision.storage import hub

SIZE = (64, 96)


def build(name: str, size: tuple[int, int] = SIZE, **settings: object) -> Backbone:
    return Backbone(BackboneConfig(name=name, **settings), size).eval()


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("test_resnet", [8, 16, 32], [48, 192, 96]),
        ("test_resnet", [4, 8, 16, 32], [32, 48, 192, 96]),
        ("test_efficientnet", [16], [48]),
        ("test_convnext", [8, 32], [32, 64]),
        ("test_mambaout", [8, 16, 32], [32, 48, 64]),  # channels last inside, as Swin
        ("test_maxvit", [8, 16, 32], [64, 96, 128]),  # fixed input size
        ("smp:mobilenet_v2", [8, 16, 32], [32, 96, 1280]),
        ("smp:mit_b0", [4, 16], [32, 160]),  # has an empty level
    ],
)
def test_maps_have_the_wanted_strides(name: str, strides: list[int], channels: list[int]) -> None:
    size = (64, 64) if "maxvit" in name else SIZE
    backbone = build(name, size, strides=strides)
    maps = backbone(torch.rand(2, 3, *size))
    assert backbone.strides == strides
    assert backbone.channels == channels
    assert [tuple(x.shape) for x in maps] == [(2, c, size[0] // s, size[1] // s) for c, s in zip(channels, strides)]


def test_swin_gives_nchw() -> None:
    backbone = build("swin_tiny_patch4_window7_224", strides=[8, 16])
    maps = backbone(torch.rand(1, 3, *SIZE))
    assert [tuple(x.shape) for x in maps] == [(1, 192, 8, 12), (1, 384, 4, 6)]
    other = backbone(torch.rand(1, 3, 96, 128))
    assert [tuple(x.shape[2:]) for x in other] == [(12, 16), (6, 8)]


def test_plain_vit_gives_maps_of_its_one_stride() -> None:
    backbone = build("test_vit")
    maps = backbone(torch.rand(1, 3, *SIZE))
    assert backbone.strides == [16, 16, 16]
    assert [tuple(x.shape[2:]) for x in maps] == [(4, 6)] * 3
    assert not torch.equal(maps[0], maps[2])
    assert backbone.any_size
    assert backbone(torch.rand(1, 3, 128, 64))[0].shape[2:] == (8, 4)


def test_vit_blocks_are_spread_and_end_with_the_last() -> None:
    """The maps are those of blocks 3, 4 and 5 of six, as the whole network computes them."""
    backbone = build("test_vit", normalize="none")
    assert tuple(backbone.net.feature_info.out_indices) == (3, 4, 5)
    images = torch.rand(1, 3, *SIZE)
    expected = backbone.net.model.forward_intermediates(images, indices=[5], intermediates_only=True)[0]
    assert torch.equal(backbone(images)[-1], expected)


def test_images_are_stretched_to_whole_patches() -> None:
    backbone = build("test_vit", (64, 96))
    seen: list[tuple[int, ...]] = []
    backbone.net.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    assert backbone(torch.rand(1, 3, 70, 96))[0].shape[2:] == (5, 6)
    assert seen == [(80, 96)]


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "smp:mobilenet_v2"])
def test_uint8_is_the_same_as_float(name: str) -> None:
    backbone = build(name)
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    for a, b in zip(backbone(images), backbone(images.float() / 255)):
        assert torch.equal(a, b)


def test_normalisation_is_the_networks_own() -> None:
    images = torch.rand(1, 3, *SIZE)
    half = build("test_convnext")  # mean and std 0.5
    imagenet = build("resnet18d")
    for backbone, mean, std in ((half, [0.5] * 3, [0.5] * 3), (imagenet, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
        by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for a, b in zip(backbone(images), backbone.net(by_hand)[-3:]):
            assert torch.allclose(a, b, atol=1e-5)


def test_normalisation_is_saved_with_the_weights() -> None:
    backbone = build("test_convnext")
    assert {"mean", "std"} <= set(backbone.state_dict())
    plain = build("test_convnext", normalize="none")
    assert not {"mean", "std"} & set(plain.state_dict())
    plain.net.load_state_dict(backbone.net.state_dict())
    images = torch.rand(1, 3, *SIZE)
    assert torch.equal(plain((images - 0.5) / 0.5)[0], backbone(images)[0])
    plain.set_normalization(backbone.mean, backbone.std)
    assert plain.config.normalize == "auto"
    assert torch.equal(plain(images)[0], backbone(images)[0])


def test_no_later_stages_are_built() -> None:
    names = {name.split(".")[0] for name, _ in build("test_resnet", strides=[8, 16]).net.named_parameters()}
    assert "layer3" in names
    assert "layer4" not in names


@pytest.mark.parametrize("name", ["test_efficientnet", "smp:mobilenet_v2", "smp:efficientnet-b0", "test_convnext"])
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    """Distributed training would wait for the others: these networks build layers behind the last map."""
    backbone = build(name, strides=[8, 16]).train()
    torch.stack([x.sum() for x in backbone(torch.rand(2, 3, *SIZE))]).sum().backward()
    without = [key for key, value in backbone.named_parameters() if value.requires_grad and value.grad is None]
    assert not without


def test_building_leaves_the_random_state_alone() -> None:
    """Only the weights themselves are drawn: the first and the second build in a process give the same ones."""
    first, second = (torch.manual_seed(3) and build("test_resnet", (96, 96)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_missing_stride_names_what_there_is() -> None:
    with pytest.raises(UserError, match=r"test_resnet has strides 2, 4, 8, 16, 32; .*got \[8, 64\]"):
        build("test_resnet", strides=[8, 64])
    with pytest.raises(UserError, match="in rising order"):
        build("test_resnet", strides=[16, 8])
    with pytest.raises(UserError, match=r"mit_b0 has strides 4, 8, 16, 32"):
        build("smp:mit_b0", strides=[2, 4])


def test_the_deepest_map_of_a_stride_is_taken() -> None:
    """Dilated networks and some transformers have several."""
    from mvision.backbone.feature_nets import _by_stride

    assert _by_stride("net", [4, 8, 8, 16, 16], [8, 16]) == [2, 4]


def test_size_that_the_network_cannot_take() -> None:
    with pytest.raises(UserError, match="levit_128s cannot take images of 64x96"):
        build("levit_128s", strides=[16, 32])
    fixed = build("test_vit_relpos", (64, 64))
    assert not fixed.any_size
    with pytest.raises(UserError, match="was built for images of 64x64 and cannot take 96x64"):
        fixed(torch.rand(1, 3, 96, 64))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("convnext_tny", "convnext_tiny"),
        ("ResNet-50", "resnet50"),
        ("smp:resnt18", "smp:resnet18"),
        ("mit_b0", "smp:mit_b0"),
    ],
)
def test_unknown_names_suggest_near_ones(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"did you mean .*{right}"):
        check_backbone_name(wrong)


def test_known_names() -> None:
    for name in ("resnet18d", "resnet50.a1_in1k", "smp:mit_b0", "convnext_tiny"):
        check_backbone_name(name)
    with pytest.raises(UserError, match=r"no weights called 'nope': choose one of resnet50d, resnet50d\."):
        check_backbone_name("resnet50d.nope")
    with pytest.raises(UserError, match="no known name is like it"):
        check_backbone_name("!!")


def test_pretrained_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_reachable", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("test_resnet", "smp:resnet18"):
        with pytest.raises(UserError, match=r"cannot be loaded .*pretrained=false") as failure:
            build(name, pretrained=True)
        assert "\n" not in str(failure.value)


def test_smp_weights_for_research_only_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    from segmentation_models_pytorch import encoders

    real = encoders.get_encoder
    monkeypatch.setattr(encoders, "get_encoder", lambda *args, weights, **rest: real(*args, weights=None, **rest))
    monkeypatch.setattr(encoders, "get_preprocessing_params", lambda *_, **__: {"mean": [0.1] * 3, "std": [0.2] * 3})
    with pytest.warns(UserWarning, match="mit_b0 are for non-commercial use"):
        backbone = build("smp:mit_b0", pretrained=True)
    assert torch.allclose(backbone.mean, torch.full((3, 1, 1), 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("smp:resnet18", pretrained=True)


def test_stage1_shortcut_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    plain, vd = build("resnet18d"), build("resnet18d", stage1_shortcut=True)
    extra = set(vd.state_dict()) - set(plain.state_dict())
    assert {"net.layer1.0.downsample.1.weight", "net.layer1.0.downsample.2.running_var"} <= extra
    vd.load_state_dict(plain.state_dict(), strict=False)
    images = torch.rand(1, 3, *SIZE)
    for a, b in zip(plain(images), vd(images)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="not for resnet50d"):
        build("resnet50d", stage1_shortcut=True)


def test_frozen_modules_stay_in_eval_mode_and_can_be_copied() -> None:
    model = nn.Sequential(build("test_resnet"), nn.Identity())
    freeze(model[0])
    before = copy.deepcopy(model.state_dict())
    copies = [model, copy.deepcopy(model)]
    stored = io.BytesIO()
    torch.save(model, stored)
    copies.append(torch.load(io.BytesIO(stored.getvalue()), weights_only=False))
    for each in copies:
        each.train()
        maps = each(torch.rand(2, 3, *SIZE))
        assert not any(x.requires_grad for x in maps)
        assert not any(part.training for part in each[0].modules())
        assert all(torch.equal(value, each.state_dict()[name]) for name, value in before.items())


def test_half_precision_and_export() -> None:
    backbone = build("test_convnext").to(torch.bfloat16)
    maps = backbone(torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8))
    assert maps[0].dtype == torch.bfloat16
    exported = torch.export.export(build("test_resnet"), (torch.rand(1, 3, *SIZE),))
    assert len(exported.module()(torch.rand(1, 3, *SIZE))) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_is_probed_in_any_mode_of_the_caller(mode) -> None:
    feature_nets.probe.cache_clear()
    with mode():
        unused, _ = feature_nets.probe("test_resnet", (8, 16, 32), (64, 64))
    assert unused == feature_nets.probe.__wrapped__("test_resnet", (8, 16, 32), (64, 64))[0]


@pytest.mark.parametrize("name", ["test_resnet", "smp:mobilenet_v2"])
def test_frozen_norms_keep_their_statistics_and_train_their_scale(name: str) -> None:
    """Also after the conversion that training on several GPUs makes, which replaces the norms."""
    backbone = build(name, freeze_norms=True)
    images = torch.rand(2, 3, *SIZE)
    expected = backbone(images)
    for net in (backbone, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(backbone))):
        before = {key: value.clone() for key, value in net.net.named_buffers()}
        assert before
        found = net.train()(images)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other)
        assert all(torch.equal(value, before[key]) for key, value in net.net.named_buffers())
        sum(x.square().sum() for x in found).backward()
        norms = [m for m in net.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(norm.weight.grad is not None for norm in norms)
        assert sum(bool(norm.weight.grad.any()) for norm in norms) > len(norms) // 2  # some blocks start at zero
        assert net.net.training


def test_frozen_norms_need_batch_norms() -> None:
    with pytest.raises(UserError, match=r"freeze_norms: test_convnext has no batch norms.*set it to false"):
        build("test_convnext", freeze_norms=True)


@pytest.mark.parametrize(
    ("name", "given", "own_weights", "expected"),
    [
        ("test_resnet", "auto", True, True),
        ("test_resnet", "auto", False, False),
        ("test_convnext", "auto", True, False),
        ("test_resnet", False, True, False),
        ("test_resnet", True, False, True),
    ],
)
def test_norms_are_frozen_where_the_backbone_starts_from_its_weights(
    name: str, given: object, own_weights: bool, expected: bool
) -> None:
    backbone = build(name, freeze_norms=given)
    backbone.decide_norms(own_weights)
    assert backbone.config.freeze_norms is expected
    norms = [m for m in backbone.train().net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.training is not expected for norm in norms)

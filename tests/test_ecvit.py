"""EdgeCrafter's ViTs, pyramids of plain ViTs, and files of weights for a backbone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import mvision
from mvision import UserError
from mvision.backbone import Backbone, ecvit
from mvision.backbone.ecvit import EcViT
from mvision.backbone.ecvit_names import SIZES, Size
from mvision.backbone.own_weights import load_file
from mvision.backbone.pyramid import MeanPyramid, pyramid_scales
from mvision.config import BackboneConfig, load_config
from mvision.model import create_model
from mvision.weights import save_weights
from tests import golden_ecvit
from tests.drawn_weights import drawn

SIZE = (64, 96)
SMALL: dict[str, object] = {"neck__embed_dim": 32, "image_size": 64, "heads__detection__num_queries": 20}


def build(name: str = "test_vit", size: tuple[int, int] = SIZE, laterals: tuple[int, ...] = (), **settings) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(name=name, **settings), size, laterals).eval()


def mean_vit(**settings) -> Backbone:
    return build(pyramid="mean-bilinear", **settings)


def authors_file(net: EcViT, path: Path, prefix: str = "backbone.") -> None:
    """The network's drawn weights with the names that the authors' files have."""
    names = {key: key.replace("cls_token", "register_token") for key in net.state_dict()}
    tensors = {f"{prefix}{names[key]}": drawn(names[key], tuple(x.shape)) if x.ndim else x
               for key, x in net.state_dict().items()}  # fmt: skip
    save_file({**tensors, f"{prefix}rope_embed.periods": torch.ones(8)}, path)


@pytest.mark.parametrize("network", golden_ecvit.NETWORKS)
def test_maps_of_the_original(network: str, tmp_path: Path) -> None:
    """In float64; the weights come through a file with the authors' names."""
    net = EcViT(Size(*golden_ecvit.NETWORKS[network])).double().eval()
    authors_file(net, tmp_path / "vit.safetensors")
    load_file(net, str(tmp_path / "vit.safetensors"), "ecvit_t")
    golden = np.load(golden_ecvit.FILE)
    for size in golden_ecvit.SIZES:
        with torch.no_grad():
            maps = MeanPyramid(pyramid_scales(16, [8, 16, 32]))(net(golden_ecvit.make_images(size)))
        for level, x in enumerate(maps):
            expected = torch.from_numpy(golden[golden_ecvit.key(network, size, level)])
            assert expected.abs().max() > 1
            assert (x[:1, golden_ecvit.CHANNELS] - expected).abs().max() <= 1e-6


def test_the_golden_networks_have_the_proportions_of_the_published_ones() -> None:
    for network, name in (("s", "ecvit_s"), ("s_plus", "ecvit_s_plus")):
        assert golden_ecvit.NETWORKS[network][1:] == SIZES[name][1:]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ecvit_t", 5.56), ("ecvit_t_plus", 9.87), ("ecvit_s", 22.17), ("ecvit_s_plus", 29.25)],
)
def test_sizes_of_the_published_networks(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = EcViT(SIZES[name])
    assert sum(x.numel() for x in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.03)


def test_ecvit_is_a_backbone() -> None:
    backbone = build("ecvit_t")
    assert (backbone.config.pyramid, backbone.channels, backbone.strides) == ("mean-bilinear", [192] * 3, [8, 16, 32])
    assert {"net.blocks.11.attn.qkv.weight", "net.cls_token", "net.patch_embed.proj.bias"} <= set(backbone.state_dict())
    for image in (torch.rand(1, 3, *SIZE), torch.rand(2, 3, 96, 64)):
        assert [x.shape[2:] for x in backbone(image)] == [
            tuple(side // s for side in image.shape[2:]) for s in (8, 16, 32)
        ]
    with pytest.raises(UserError, match=r"no library has weights of ecvit_t: .*model\.backbone\.weights"):
        build("ecvit_t", pretrained=True)
    with pytest.raises(UserError, match="ecvit_t has the pyramid mean-bilinear alone"):
        load_config("ecvit_t", overrides={"model.backbone.pyramid": "last"})
    with pytest.raises(UserError, match="did you mean .*ecvit_t"):
        build("ecvit_tt")


def test_the_pyramid_is_the_mean_of_the_last_two_blocks_resized() -> None:
    backbone = mean_vit(normalize="none")
    images = torch.rand(1, 3, *SIZE)
    a, b = backbone.net.model.forward_intermediates(images, indices=[4, 5], intermediates_only=True)
    fine, same, coarse = backbone(images)
    assert torch.allclose(same, (a + b) / 2, atol=1e-6)
    assert torch.allclose(coarse, F.avg_pool2d((a + b) / 2, 2), atol=1e-6)
    assert torch.allclose(fine, F.interpolate((a + b) / 2, scale_factor=2.0, mode="bilinear"), atol=1e-6)
    assert not [name for name in backbone.state_dict() if "pyramid" in name]


def test_strides_of_patches_that_are_no_power_of_two() -> None:
    assert pyramid_scales(14, [8, 16, 32]) == [2, 1, 0.5]
    assert pyramid_scales(16, [4, 8, 16, 32]) == [4, 2, 1, 0.5]
    for patch, strides in ((14, [4, 8, 16]), (16, [15, 16]), (16, [32, 16])):
        with pytest.raises(UserError, match=r"strides: .* cannot be made from the patches of"):
            pyramid_scales(patch, strides)


def test_details_are_appended_and_give_a_lateral() -> None:
    backbone = mean_vit(detail=8, laterals=(4,))
    own = backbone.channels[0] - 16
    assert (backbone.channels, backbone.laterals) == ([own + 16, own + 32, own + 32], {4: 8})
    images = torch.rand(2, 3, *SIZE)
    lateral, *maps = backbone(images)
    assert lateral.shape == (2, 8, 16, 24)
    assert [x.shape[2:] for x in maps] == [(8, 12), (4, 6), (2, 3)]
    plain = mean_vit()
    plain.load_state_dict(backbone.state_dict(), strict=False)
    for x, alone in zip(maps, plain(images)):
        assert torch.equal(x[:, :own], alone)
    backbone.train()
    torch.stack([x.sum() for x in backbone(images)]).sum().backward()
    assert not [name for name, x in backbone.named_parameters() if x.requires_grad and x.grad is None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "test_resnet", "pyramid": "mean-bilinear"}, r"is for plain ViTs.* test_resnet has strides 2, 4"),
        ({"name": "test_resnet", "detail": 8}, "detail: 8 is added to a pyramid of a plain ViT alone"),
        ({"detail": 8}, "set model.backbone.pyramid=mean-bilinear, or detail to 0"),
        ({"detail": 8, "pyramid": "mean-bilinear", "strides": [9, 16]}, r"strides 2, 4, 8, \.\.\..* are \[9, 16\]"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_network(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**settings)


@pytest.mark.parametrize(("name", "detail"), [("ecvit_short", 8), ("test_vit", 0)])
def test_fused_exported_and_other_sizes(name: str, detail: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ecvit, "DEPTH", 2)
    monkeypatch.setitem(SIZES, "ecvit_short", Size(64, 2, 2.0))
    backbone = build(name, pyramid="mean-bilinear", detail=detail)
    images, others = torch.rand(1, 3, *SIZE), torch.rand(1, 3, 128, 64)
    with torch.no_grad():
        for parameter in backbone.buffers():
            if parameter.ndim == 1 and parameter.is_floating_point() and len(parameter) > 3:
                parameter.add_(0.2 * torch.rand_like(parameter))
        expected = [backbone(images), backbone(others)]
        backbone.fuse()
        fused = [backbone(images), backbone(others)]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    for before, after in zip(expected, fused):
        for a, b in zip(before, after):
            assert torch.allclose(a, b, atol=1e-4)
    if not detail:
        return
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "backbone.onnx"
    torch.onnx.export(backbone, (images,), file, dynamo=True)
    session = onnxruntime.InferenceSession(file)
    for a, b in zip(fused[0], session.run(None, {session.get_inputs()[0].name: images.numpy()})):
        assert np.abs(a.numpy() - b).max() < 1e-4


def vit_file(path: Path, prefix: str = "", name: str = "test_vit", **changes: Tensor | None) -> Path:
    torch.manual_seed(7)
    tensors = {**timm.create_model(name).state_dict(), **changes}
    tensors = {prefix + key: value.contiguous() for key, value in tensors.items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


@cache
def last_map(name: str) -> tuple[Tensor, Tensor]:
    """An image, and what timm's network with the tensors of ``vit_file`` makes of it."""
    torch.manual_seed(7)
    whole = timm.create_model(name).eval()
    images = torch.rand(1, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    with torch.no_grad():
        return images, whole.forward_intermediates(images, intermediates_only=True)[-1]


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone.net."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_weights_with_timms_names(tmp_path: Path, name: str, suffix: str, prefix: str) -> None:
    file = vit_file(tmp_path / f"weights{suffix}", prefix, name)
    images, expected = last_map(name)
    backbone = build(name, tuple(images.shape[2:]), weights=str(file), normalize="none")
    with torch.no_grad():
        assert torch.allclose(backbone(images)[-1], expected, atol=1e-5)


def test_learned_positions_are_resized_to_other_images(tmp_path: Path) -> None:
    file = vit_file(tmp_path / "weights.safetensors")
    backbone = build(weights=str(file), normalize="none")
    torch.manual_seed(7)
    with torch.no_grad():
        whole = timm.create_model("test_vit", dynamic_img_size=True).eval()
        images = torch.rand(1, 3, *SIZE)
        expected = whole.forward_intermediates(images, intermediates_only=True)[-1]
        assert torch.allclose(backbone(images)[-1], expected, atol=1e-5)


NAN = torch.full((64,), float("nan"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blocks.0.norm1.bias": None},
            r"has no tensor blocks\.0\.norm1\.bias: give weights of test_vit, or set",
        ),
        ({"blocks.0.norm1.bias": torch.ones(3)}, r"blocks\.0\.norm1\.bias is 3, and test_vit has 64"),
        ({"blocks.9.norm1.bias": torch.ones(64)}, r"has a tensor blocks\.9\.norm1\.bias that is unknown"),
        ({"blocks.0.norm1.bias": NAN}, r"blocks\.0\.norm1\.bias has NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    file = vit_file(tmp_path / "weights.safetensors", **changes)
    with pytest.raises(UserError, match=message) as failure:
        build(weights=str(file))
    assert str(failure.value).startswith(f"model.backbone.weights {file}")
    assert "\n" not in str(failure.value)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.pth").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_bytes(b"nothing")
    messages = {
        "a.safetensors": "damaged",
        "a.pth": "not a file of torch.save",
        "a.txt": "ends in",
        "b.pth": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as failure:
            build(weights=str(tmp_path / name))
        assert "\n" not in str(failure.value)
    own = timm.create_model("test_vit").state_dict()
    twice = {f"{prefix}.{key}": value.clone() for prefix in ("student", "teacher") for key, value in own.items()}
    save_file(twice, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"more than once, below student\. and teacher\."):
        build(weights=str(tmp_path / "c.safetensors"))


def test_saved_models_do_not_need_the_file(tmp_path: Path) -> None:
    file = vit_file(tmp_path / "backbone.safetensors")
    model = create_model("test_vit", num_classes=2, backbone__weights=str(file), **SMALL)
    save_weights(model, tmp_path / "model.safetensors")
    file.unlink()
    loaded = mvision.load(tmp_path / "model.safetensors")
    assert loaded.config.backbone.weights is None
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[key], value)

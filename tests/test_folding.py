"""Norms of other libraries' networks are folded where that changes nothing, and left alone where it would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.hgnet import LearnableAffineBlock
from torch import Tensor, nn

from mvision.backbone import Backbone
from mvision.backbone.affine import Floor
from mvision.backbone.folding import Observed, fold_norms, observe
from mvision.config import BackboneConfig

SIZE = (64, 96)


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def stir(net: nn.Module) -> nn.Module:
    """Statistics and weights that no norm has by chance."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for tensor in (module.running_mean, module.bias):
                tensor.data = 0.1 * torch.randn(tensor.shape, generator=generator)
            for tensor in (module.running_var, module.weight):
                tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return net.eval()


# Norms next to activations, norms that contain them, branches that timm itself merges, and smp's own network.
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "repvgg_a0", "hgnetv2_b0", "smp:mobilenet_v2"])
def test_a_fused_backbone_gives_the_same_maps_without_norms(name: str) -> None:
    backbone = Backbone(BackboneConfig(name=name), SIZE)
    stir(backbone)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected = backbone(images)
        assert norms(backbone)
        found = backbone.fuse()(images)
        assert not norms(backbone)
        again = backbone.fuse()(images)
    for a, b, c in zip(expected, found, again):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
        assert torch.equal(b, c)


def test_norms_without_statistics_and_other_norms_stay() -> None:
    net = stir(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)))
    folded = fold_norms(copy.deepcopy(net), call)
    assert [type(module) for module in folded] == [type(module) for module in net]


class _Odd(nn.Module):
    """A convolution and a norm with something between them, besides them, or twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.kind == "standardised":
            return self.norm(F.conv2d(x, self.conv.weight / self.conv.weight.std()))
        y = self.conv(x)
        if self.kind == "shifted":
            return self.norm(y + 1)
        if self.kind == "read twice":
            return self.norm(y) + y
        if self.kind == "returned":
            return [y, self.norm(y)]
        if self.kind == "norm twice":
            return self.norm(self.norm(y))
        if self.kind == "conv twice":
            return self.norm(self.conv(y))
        return self.act(self.norm(y))


IMAGE = torch.empty(1, 3, 8, 8, device="meta")


def call(net: nn.Module) -> Tensor:
    return net(IMAGE)


@pytest.mark.parametrize(
    "kind", ["standardised", "shifted", "read twice", "returned", "norm twice", "conv twice", "plain"]
)
def test_only_a_norm_that_alone_reads_a_convolution_is_folded(kind: str) -> None:
    net = stir(_Odd(kind))
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = net(image)
        assert observe(net, call).followers == ({"conv": "norm"} if kind == "plain" else {})
        found = fold_norms(net, call)(image)
    assert norms(net) == (kind != "plain")
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b)
    if kind == "plain":
        assert observe(net, call) == Observed({"conv": "act"}, {"conv": [1, 3, 8, 8]}, first="conv")


def test_a_network_that_needs_data_stays_as_it_is() -> None:
    class Looks(_Odd):
        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() > 0
            return self.norm(self.conv(x))

    net = stir(Looks("plain"))
    assert observe(net, call) == Observed()
    assert norms(fold_norms(net, call)) == 1


class _Sums(nn.Module):
    """A residual block, and blocks that look like one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.shortcut, self.act = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.kind == "in place":
            y += self.shortcut(x)
        elif self.kind == "scaled":
            y = torch.add(y, self.shortcut(x), alpha=2)
        elif self.kind == "broadcast":
            y = y + self.shortcut(x).mean((2, 3), keepdim=True)
        elif self.kind == "read before":
            y = y.relu() + y + self.shortcut(x)
        elif self.kind == "added to itself":
            y = y + y
        else:
            y = y + self.shortcut(x)
        if self.kind == "sum read twice":
            return self.act(y) + y
        return [y, self.act(y)] if self.kind == "sum returned" else self.act(y)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("plain", ["conv", "shortcut"]),
        ("in place", ["conv", "shortcut"]),
        ("scaled", []),
        ("broadcast", []),
        ("read before", ["shortcut"]),
        ("added to itself", []),
        ("sum read twice", []),
        ("sum returned", []),
    ],
)
def test_sums_with_one_reader_are_seen(kind: str, found: list[str]) -> None:
    seen = observe(_Sums(kind), call)
    assert list(seen.after_sums) == found
    assert set(seen.after_sums.values()) <= {"act"}
    assert not seen.followers


@pytest.mark.parametrize("name", ["resnet18d", "hgnetv2_b0", "vit_tiny_patch16_224"])
def test_the_scale_of_images_goes_into_the_first_convolution(name: str) -> None:
    backbone = stir(Backbone(BackboneConfig(name=name), SIZE))
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        expected = backbone(images)
        backbone.fuse()
        assert backbone._takes_pixels
        for found in (backbone(images), backbone(images / 255)):
            for a, b in zip(expected, found):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_images_that_something_else_reads_keep_their_scale() -> None:
    class Reads(_Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * x.mean()

    assert observe(Reads("plain"), call).first == ""
    assert observe(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1)), call).first == ""
    assert observe(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), call).first == "0"


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_scaled_activations_go_into_the_convolutions(scale: float) -> None:
    backbone = stir(Backbone(BackboneConfig(name="hgnetv2_b0"), SIZE))
    blocks = [module for module in backbone.modules() if isinstance(module, LearnableAffineBlock)]
    for block in blocks:
        block.scale.data.fill_(scale)
        block.bias.data.fill_(0.25)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        expected = backbone(images)
        found = backbone.fuse()(images)
    left = sum(isinstance(module, LearnableAffineBlock) for module in backbone.modules())
    assert len(blocks) > 20
    assert left == (0 if scale > 0 else len(blocks))  # a ReLU of a negative multiple is none of the sum
    assert sum(isinstance(module, Floor) for module in backbone.modules()) == len(blocks) - left
    for a, b in zip(expected, found):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))

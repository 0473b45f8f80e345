"""Norms of other libraries' networks are folded where that changes nothing, and left alone where it would."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.backbone import Backbone
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


def call(net: nn.Module) -> Tensor:
    return net(torch.empty(1, 3, 8, 8, device="meta"))


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
        assert observe(net, call) == Observed({"conv": "act"}, {"conv": [1, 3, 8, 8]})


def test_a_network_that_needs_data_stays_as_it_is() -> None:
    class Looks(_Odd):
        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() > 0
            return self.norm(self.conv(x))

    net = stir(Looks("plain"))
    assert observe(net, call) == Observed()
    assert norms(fold_norms(net, call)) == 1

"""A model made ready to predict gives what it gave before, with fewer passes over its maps."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from timm.models.hgnet import LearnableAffineBlock
from torch import Tensor, nn

from mvision import create_model
from mvision.backbone.affine import Floor
from mvision.compat import has_packed_convolutions
from mvision.deploy.compare import difference
from mvision.fast.biases import join_biases
from mvision.fast.packed import ACTIVATIONS, FEWEST_WEIGHTS, MLP_ACTIVATIONS, PackedConv2d, PackedLinear, pack
from mvision.fast.prepare import prepare
from mvision.machine import cpu_has_bf16
from mvision.model import Model
from mvision.neck.layers import ACTIVATIONS as BY_NAME
from mvision.neck.layers import MLP
from tests.test_joint import TASKS, make_model

DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")),
]

pytestmark = pytest.mark.skipif(not has_packed_convolutions(), reason="not a build of PyTorch with oneDNN's operators")


@pytest.fixture(scope="module")
def model() -> Model:
    """All tasks, with norms that have seen something."""
    torch.manual_seed(0)
    made = make_model([*TASKS, "semantic-seg"])
    with torch.no_grad():
        made.train()(torch.rand(4, 3, 64, 96))
    return made.eval()


def test_packed_convolutions_give_the_same_outputs(model: Model) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    ready = prepare(copy.deepcopy(model))
    plain = prepare(copy.deepcopy(model), packed=False)
    assert not any(isinstance(module, nn.Conv2d | nn.BatchNorm2d) for module in ready.modules())
    with torch.no_grad():
        for other in (ready, plain):
            found, where = difference(model(images), other(images))
            assert found < 1e-4, where
    # Other sizes and numbers of images than the weights were laid out with.
    images = torch.randint(0, 256, (3, 3, 96, 160), dtype=torch.uint8)
    with torch.no_grad():
        assert difference(plain(images), ready(images))[0] < 1e-4


def test_activations_go_into_the_convolutions_before_them(model: Model) -> None:
    ready = prepare(copy.deepcopy(model))
    packed = {name: module for name, module in ready.named_modules() if isinstance(module, PackedConv2d)}
    assert {module.activation for module in packed.values()} == {"none", "relu", "swish"}
    assert packed["neck.top_down.0.blocks.0.conv"].activation == "swish"
    left = [name for name, module in ready.named_modules() if type(module) in ACTIVATIONS]
    # After sums and linear layers there is no convolution to go into.
    assert not [name for name in left if "layer" not in name and "decoder" not in name and "embed" not in name]


@pytest.mark.parametrize("activation", ["none", "relu", "swish", "hardswish"])
def test_a_packed_convolution_is_the_convolution_and_its_activation(activation: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=1, groups=2, bias=activation != "none")
    kinds = {name: kind for kind, name in ACTIVATIONS.items()}
    after = nn.Identity() if activation == "none" else kinds[activation]()
    x = torch.randn(2, 6, 9, 12)
    with torch.no_grad():
        expected = after(conv(x))
        for memory_format in (torch.contiguous_format, torch.channels_last):
            found = PackedConv2d(conv, [1, 6, 20, 20], activation)(x.to(memory_format=memory_format))
            torch.testing.assert_close(found, expected)


def test_packed_convolutions_end_at_a_floor() -> None:
    """As scaled activations do, see ``mvision.backbone.affine``."""
    torch.manual_seed(0)
    made = create_model("hgnetv2_b0", num_classes=2, image_size=64, neck__embed_dim=32)
    for module in made.modules():
        if isinstance(module, LearnableAffineBlock):
            module.scale.data.fill_(0.5)
            module.bias.data.fill_(-0.25)
    with torch.no_grad():
        made.train()(torch.rand(4, 3, 64, 64))
        ready, joined = (prepare(copy.deepcopy(made.eval()), packed=packed) for packed in (True, False))
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        for other in (ready, joined, join_biases(joined)):
            assert difference(made(images), other(images))[0] < 1e-4
    assert not any(isinstance(module, Floor) for both in (ready, joined) for module in both.modules())
    limited = [module for module in ready.modules() if getattr(module, "activation", "") == "hardtanh"]
    assert {module.limits[0] for module in limited} == {-0.25}


class _Net(nn.Module):
    """A model's config and one MLP, a layer whose weight is used otherwise, and one that is too small."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=(8, 8))
        self.mlp = MLP(24, 96, 40, 3, act=act)
        self.other, self.small = nn.Linear(24, 96), nn.Linear(24, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2).transpose(1, 2).flatten(1).unflatten(1, (-1, 24))
        return torch.cat((self.mlp(x), self.other(x) * self.other.weight.sum(), self.small(x)), -1)


@pytest.mark.parametrize("act", list(BY_NAME))
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_linear_layers_are_packed_with_their_activation(act: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, images = _Net(act).to(dtype).eval(), torch.randn(2, 3, 8, 8).to(dtype)
    expected = net(images)
    ready = pack(copy.deepcopy(net))
    found = ready(images)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4 if dtype == torch.float32 else 0.02)
    packed = {name: part.activation for name, part in ready.named_modules() if isinstance(part, PackedLinear)}
    kind = MLP_ACTIVATIONS[BY_NAME[act]]
    both = {"mlp.layers.0": kind, "mlp.layers.1": kind, "mlp.layers.2": "none"}
    assert packed == (both if dtype == torch.float32 else {**both, "small": "none"})
    assert type(ready.other) is nn.Linear  # its weight is used by more than its calls


def test_no_large_linear_layer_is_left(model: Model) -> None:
    ready = prepare(copy.deepcopy(model))
    left = {name: part for name, part in ready.named_modules() if isinstance(part, nn.Linear)}
    assert all(part.weight.numel() < FEWEST_WEIGHTS for part in left.values()), list(left)


def test_nothing_is_packed_in_bf16_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN would refuse it. PyTorch's own operators compute in it everywhere, slowly."""
    monkeypatch.setattr("mvision.machine.cpu_has_bf16", lambda: False)
    packed = prepare(make_model(TASKS[:1]), "bf16")
    assert not any(isinstance(module, (PackedConv2d, PackedLinear)) for module in packed.modules())

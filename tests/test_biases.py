"""Convolutions whose bias is added together with the activation that follows give what they gave before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvision.deploy.compare import difference
from mvision.errors import UserError
from mvision.fast.biases import BiasActivation, join_biases
from mvision.fast.prepare import prepare
from mvision.model import Model
from tests.test_joint import TASKS, make_model


@pytest.fixture(scope="module")
def model() -> Model:
    """All tasks with norms that have seen something, fused."""
    made = make_model([*TASKS, "semantic-seg"])
    with torch.no_grad():
        made.train()(torch.rand(4, 3, 64, 96))
    return prepare(made.eval(), packed=False)


@torch.no_grad()
def test_the_same_outputs_without_a_bias_in_a_convolution(model: Model) -> None:
    joined = join_biases(copy.deepcopy(model))
    assert any(isinstance(part, nn.Conv2d) and part.bias is not None for part in model.modules())
    assert not any(isinstance(part, nn.Conv2d) and part.bias is not None for part in joined.modules())
    for batch in (2, 1):
        images = torch.randint(0, 256, (batch, 3, 64, 96), dtype=torch.uint8)
        for _ in range(2):  # nothing is written over what a later call needs
            found, where = difference(model(images), joined(images))
            assert found < 1e-4, where
    assert {part.activation for part in joined.modules() if isinstance(part, BiasActivation)} == {
        "none",
        "relu",
        "silu",
    }


@torch.no_grad()
def test_biases_of_both_branches_are_added_after_the_sum(model: Model) -> None:
    joined = join_biases(copy.deepcopy(model))
    name = next(n for n, part in model.named_modules() if n.startswith("backbone") and n.endswith("downsample.1"))
    block = name.removesuffix(".downsample.1")
    before, after = model.get_submodule(block), joined.get_submodule(block)
    last = [n for n, part in before.named_children() if isinstance(part, nn.Conv2d)][-1]
    both = before.get_submodule(last).bias + before.get_submodule("downsample.1").bias
    act = [part for part in after.children() if isinstance(part, BiasActivation)]
    assert len(act) == 1
    torch.testing.assert_close(act[0].bias.detach(), both)
    x = torch.randn(2, before.get_submodule("conv1").in_channels, 8, 8)
    torch.testing.assert_close(after(x.clone()), before(x.clone()))


def test_fp16_is_refused_on_a_cpu(model: Model) -> None:
    with pytest.raises(UserError, match="fp16: a CPU does not compute in fp16; use bf16 or fp32"):
        prepare(copy.deepcopy(model), "fp16")

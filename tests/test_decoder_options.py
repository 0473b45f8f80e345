"""The conformance suite for every option of the decoder alone, and for all options of a family together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvision import create_model
from mvision.errors import UserError
from mvision.heads.base import Head
from mvision.neck.layers import fuse_modules
from tests.decoder_inputs import DFINE
from tests.test_heads import STRIDES, make_features, make_head, make_targets, total

DISTRIBUTION = {"box_refinement": "distribution"}
EDGECRAFTER = {**DFINE, "memory_projection": False, "position_mlp": "deep", "position_once": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "silu": {"act": "silu"},
    "gelu": {"act": "gelu"},
    "no memory projection": {"memory_projection": False},
    "deep position": {"position_mlp": "deep"},
    "position limit": {"position_limit": 1.5},
    "position once": {"position_once": True},
    "points for each level": {"num_points": [3, 6, 1]},
    "no attention projections": {"attention_projections": False},
    "discrete": {"sampling": "discrete"},
    "gate": {"gate": True},
    "distribution": DISTRIBUTION,
    "other bins": {**DISTRIBUTION, "num_bins": 8, "bin_scale": 2, "bin_reach": 1},
    "quality": {**DISTRIBUTION, "location_quality": True},
    "dense": {**DISTRIBUTION, "dense_weight": 1.0},
    "shared classifier": {**EDGECRAFTER, "shared_class_head": True},
    "D-FINE": DFINE,
    "EdgeCrafter": EDGECRAFTER,
}
FAMILIES = {"D-FINE": DFINE, "EdgeCrafter": EDGECRAFTER}
option = pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
family = pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)


def make(settings: dict[str, Any], task: str = "detection") -> Head[Any, Any]:
    """A small head on maps of its own width."""
    return make_head(task, **{"input_projection": "if_needed", "embed_dim": 16, **settings})


def randomised(head: Head[Any, Any]) -> Head[Any, Any]:
    """In eval mode; what is zero at the start would hide mistakes."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head.eval()


@option
@pytest.mark.parametrize("objects", [(3, 1), (0, 0)])
def test_every_parameter_gets_a_finite_gradient(settings: dict[str, Any], objects: tuple[int, int]) -> None:
    head, targets = make(settings), make_targets(*objects)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(make_features(), targets=targets)
    terms = head.loss(outputs, targets)
    assert all(value.isfinite() for value in terms.values())
    total(terms).backward()
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    frozen = {name for name, _ in head.named_parameters()} - set(trained)
    assert {name.split(".")[-2] for name in frozen} == ({"sampling_offsets"} if "sampling" in settings else set())


@option
def test_reduced_precision(settings: dict[str, Any]) -> None:
    head = randomised(make(settings))
    with torch.no_grad():
        expected = head(make_features())["boxes"]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = head(make_features())
        plain = head.bfloat16()([feature.bfloat16() for feature in make_features()])
    for found in (mixed, plain):
        assert found["boxes"].dtype == torch.float32
        assert all(value.isfinite().all() for value in found.values())
    assert found["boxes"].shape == expected.shape


@family
def test_export_with_a_free_batch(settings: dict[str, Any]) -> None:
    head = randomised(fuse_modules(make({**settings, "input_projection": "always"})))
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ([{0: batch} for _ in STRIDES],)
    program = torch.export.export(head, (make_features(3),), dynamic_shapes=shapes, strict=False)
    check_equal(head, program.module())


def test_it_compiles_without_a_break() -> None:  # D-FINE's: see test_operators.py
    head = randomised(make(EDGECRAFTER))
    torch._dynamo.reset()
    check_equal(head, torch.compile(head, fullgraph=True, backend="eager"))


def check_equal(head: Head[Any, Any], other: Any) -> None:
    """Both give the same for other maps than those of an export."""
    features = make_features(5)
    with torch.no_grad():
        expected, found = head(features), other(features)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@family
def test_masks_learn_with_the_options(settings: dict[str, Any]) -> None:
    head, targets = make(settings, "instance-seg"), make_targets(2, 0)
    terms = head.loss(head(make_features(), targets=targets), targets)
    total(terms).backward()
    assert {"mask", "dice", "fgl", "box_pre"} <= terms.keys()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"location_quality": True}, r"location_quality: .* needs box_refinement: distribution \(got True\)"),
        ({"num_points": [3, 6]}, r"num_points \[3, 6\] has to be one number, or one for each of the 3 levels"),
        ({"num_points": [3, 0, 3]}, r"num_points: .* greater than 0"),
        ({**DISTRIBUTION, "num_bins": 31}, r"num_bins: input should be a multiple of 2 \(got 31\)"),
        ({"act": "tanh"}, r"act: input should be 'relu', 'silu' or 'gelu' \(got 'tanh'\)"),
        ({"num_heads": 7}, r"embed_dim=\d+ is not a multiple of num_heads=7"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.heads\.detection(\.|: ){message}[^\n]*$"):
        create_model("tiny", ["detection"], num_classes=2, heads={"detection": settings})

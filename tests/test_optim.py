"""Parameter groups, the learning rate at a step, Muon, and the moving average of the weights."""

import math

import pytest
import torch

from mvision.config import TrainConfig
from mvision.engine.optim import Ema, build_optimizer, set_learning_rate
from mvision.engine.state import _check_optimizer_state
from mvision.model import create_model


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(warmup_steps=4, final_lr=0.1, lr=1e-3, backbone_lr=1e-4)
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, config)
    factors = [set_learning_rate(optimizer, config, step, 24) for step in range(25)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == pytest.approx(1.0)
    assert factors[14] == pytest.approx(0.55)
    assert factors[24] == pytest.approx(0.1)
    in_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for group in optimizer.param_groups:
        peak = 1e-4 if id(group["params"][0]) in in_backbone else 1e-3
        assert all((id(parameter) in in_backbone) == (peak == 1e-4) for parameter in group["params"])
        assert (group["peak_lr"], group["lr"]) == pytest.approx((peak, 0.1 * peak))


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.6, 0.2])])
def test_other_schedules(schedule, expected):
    config = TrainConfig(schedule=schedule, warmup_steps=4, final_lr=0.2)
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "peak_lr": 2.0}])
    assert set_learning_rate(optimizer, config, 1, 24) == pytest.approx(0.4)
    assert [set_learning_rate(optimizer, config, step, 24) for step in (4, 14, 24)] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected[-1])


def test_norms_biases_and_embeddings_are_not_decayed():
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert plain | decayed == set(names.values())
    assert "heads.detection.decoder.label_embed.weight" in plain
    assert all(not name.endswith("bias") for name in decayed)


def test_muon_takes_the_matrices_and_leaves_the_rest_to_adamw():
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for g in optimizer.param_groups if g["use_muon"] for p in g["params"]}
    assert {names[id(p)] for g in optimizer.param_groups for p in g["params"]} == set(names.values())
    projection = "heads.detection.decoder.layers.0.self_attention.q_proj.weight"
    assert {"neck.projections.0.conv.weight", projection} <= matrices
    assert not any(name.endswith("bias") or "norm" in name or "embed" in name.split(".")[-2] for name in matrices)
    assert "heads.detection.decoder.memory_class.weight" not in matrices  # two rows: as many as classes
    weight = model.get_parameter(projection)
    before = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad = noise * torch.logspace(0, -1, weight.shape[1])
    optimizer.step()
    step = ((weight - before) / optimizer.param_groups[0]["lr"]).flatten(1)
    # An orthogonalised step moves all directions nearly alike, whatever the gradient's spectrum: three Newton-Schulz
    # steps bring the upper half of the singular values within a factor of two.
    gradient, moved = (torch.linalg.svdvals(matrix) for matrix in (weight.grad, step))
    assert gradient.max() / gradient.median() > 4
    assert moved.max() / moved.median() < 2


def test_the_average_follows_quickly_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.9, warmup=10)
    torch.nn.init.ones_(model.weight)
    ema.update(model, step=0)
    assert ema.module.weight.item() == pytest.approx(1 - 0.9 * (1 - math.exp(-0.1)), abs=1e-5)
    assert ema.get_decay(1000) == pytest.approx(0.9)


def test_a_saved_state_of_an_optimiser_fits_its_parameter_and_group():
    """What the optimiser would notice at its first step alone, with an error of its own, or not at all."""
    parameter, group = torch.zeros(4), {"use_muon": False}
    _check_optimizer_state("norm.bias", parameter, {"use_muon": False, "step": torch.zeros(())}, group)
    _check_optimizer_state("norm.bias", parameter, {"exp_avg": torch.zeros(4)}, {})
    for wrong in ({"use_muon": True}, {"use_muon": [[[]]]}, {"use_muon": 0}, {"exp_avg": torch.zeros(5)}):
        with pytest.raises(ValueError, match=r"norm\.bias"):
            _check_optimizer_state("norm.bias", parameter, wrong, group)

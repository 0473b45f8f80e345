"""Parameter groups, the learning rate at a step, Muon, and the moving average of the weights."""

import copy
import functools
import math

import pytest
import timm.optim.muon
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvision.engine import muon
from mvision.engine.optim import Ema, build_optimizer, set_learning_rate
from mvision.engine.state import _check_optimizer_state
from mvision.errors import UserError
from mvision.machine import processor
from mvision.model import create_model
from tests.small_runs import train_settings


def test_learning_rate_warms_up_and_falls():
    config = train_settings(warmup_steps=4, final_lr=0.1, lr=1e-3, backbone_lr=1e-4)
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
    config = train_settings(schedule=schedule, warmup_steps=4, final_lr=0.2)
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "peak_lr": 2.0}])
    assert set_learning_rate(optimizer, config, 1, 24) == pytest.approx(0.4)
    assert [set_learning_rate(optimizer, config, step, 24) for step in (4, 14, 24)] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected[-1])


@pytest.mark.parametrize("warmup", [0, 40])
@pytest.mark.parametrize(("flat", "last"), [(0.5, 100), (0.5, 0), (0.0, 30), (1.0, 100), (0.95, 100), (0.5, 1000)])
def test_the_flat_cosine_is_flat_then_falls_and_stays(warmup, flat, last):
    """Every step against DEIM's formula (RTMDet's), with the warm-up of all schedules."""
    config = train_settings(schedule="flat_cosine", flat=flat, warmup_steps=warmup, final_lr=0.4)
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "peak_lr": 2.0}])
    begin = max(warmup, int(flat * 1000))
    for step in range(1000):
        if step < warmup:
            expected = (step + 1) / (warmup + 1)
        elif step < begin:
            expected = 1.0
        elif step >= 1000 - last:
            expected = 0.4
        else:
            expected = 0.4 + 0.6 * 0.5 * (1 + math.cos(math.pi * (step - begin) / (1000 - begin - last)))
        assert set_learning_rate(optimizer, config, step, 1000, last) == pytest.approx(expected, abs=1e-12), step
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected)


def test_other_schedules_know_no_last_steps():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "peak_lr": 1.0}])
    for schedule in ("cosine", "linear", "constant"):
        config = train_settings(schedule=schedule, warmup_steps=3, flat=0.7)
        for step in range(20):
            plain = set_learning_rate(optimizer, config, step, 20)
            assert set_learning_rate(optimizer, config, step, 20, last=10) == plain


def test_norms_biases_and_embeddings_are_not_decayed():
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, train_settings(weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert plain | decayed == set(names.values())
    assert "heads.detection.decoder.label_embed.weight" in plain
    assert all(not name.endswith("bias") for name in decayed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("name", "excluded"),
    [
        ("ecvit_t", {"cls_token"}),
        ("test_vit", {"model.cls_token", "model.pos_embed"}),
        ("test_vit4", {"model.reg_token", "model.pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"layers_0.blocks.0.attn.relative_position_bias_table"}),  # 169 rows
    ],
)
def test_tokens_and_positions_of_a_backbone_are_not_decayed(name, excluded, optimizer):
    small = {"neck__embed_dim": 32, "image_size": 64, "heads__detection__num_queries": 20}
    with torch.device("meta"):
        model = create_model(name, num_classes=2, **small)
    groups = build_optimizer(model, train_settings(weight_decay=0.05, optimizer=optimizer)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {names[id(p)] for g in groups if not g["weight_decay"] and not g.get("use_muon") for p in g["params"]}
    assert {f"backbone.net.{inner}" for inner in excluded} <= plain
    more = {n for n in plain if model.get_parameter(n).ndim > 1 and n.startswith("backbone.")}
    assert all(
        n.split(".")[-1] in ("cls_token", "reg_token", "pos_embed", "relative_position_bias_table") for n in more
    )


@pytest.mark.parametrize("name", ["resnet18d", "hgnetv2_b0", "test_convnext", "smp:mobilenet_v2"])
def test_convolutional_backbones_have_nothing_besides_norms_and_biases_without_decay(name):
    assert create_model(name, num_classes=2, image_size=64).backbone.without_decay() == []


def test_muon_takes_the_matrices_and_leaves_the_rest_to_adamw():
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, train_settings(optimizer="muon", weight_decay=0.05))
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


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(0.1 * parameter.detach() + 0.01 * noise)


@pytest.mark.parametrize("waste", [0, 2**26])
def test_muon_trains_as_timms_does(monkeypatch, waste):
    """With matrices of each shape apart, and with several shapes in a stack; a state of timm's can be loaded."""
    exact = functools.partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    monkeypatch.setattr(muon, "WASTE", {"cpu": waste})
    config = train_settings(optimizer="muon", lr=8e-3, backbone_lr=4e-3, beta2=0.99, weight_decay=0.01)
    ours = create_model("tiny", num_classes=2).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    optimizer, other = build_optimizer(ours, config), build_optimizer(theirs, config)
    groups = [{key: value for key, value in group.items() if key != "betas"} for group in other.param_groups]
    reference = timm.optim.muon.Muon(groups, betas=(0.9, 0.99), nesterov=True, ns_steps=3)
    optimizer.dtype = torch.float32
    for step in range(6):
        gradients(ours, step)
        gradients(theirs, step)
        if step == 3:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": reference.state_dict()["state"]})
        optimizer.step()
        reference.step()
        for (name, first), second in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-6, msg=name)
    states = [dict(enumerate(one.state_dict()["state"].values())) for one in (optimizer, reference)]
    assert [state.keys() for state in states[0].values()] == [state.keys() for state in states[1].values()]


@pytest.mark.parametrize(("flags", "dtype"), [("avx2", torch.float32), ("avx2 avx512_bf16", torch.bfloat16)])
def test_muon_multiplies_in_bf16_only_where_the_processor_does(monkeypatch, flags, dtype):
    monkeypatch.setattr(processor, "cpu_field", lambda name: flags)
    optimizer = build_optimizer(create_model("tiny", num_classes=2), train_settings(optimizer="muon"))
    assert optimizer.dtype is dtype


def test_muon_takes_up_parameters_that_have_a_gradient_now_and_then():
    """Each with the bias correction of the steps that it was in, as in AdamW."""
    values = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    other = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    group = {"lr": 0.1, "weight_decay": 0.1}
    optimizer = muon.Muon([{"params": values, "use_muon": False, **group}], betas=(0.9, 0.99))
    reference = timm.optim.muon.Muon(
        [{"params": other, "use_muon": False, **group}], betas=(0.9, 0.99), nesterov=True, ns_steps=3
    )
    for step in range(5):
        for one in (values, other):
            one[0].grad = torch.tensor([1.0, -2.0, 0.5]) + step
            one[1].grad = None if step in (0, 3) else torch.tensor([0.1, 0.2, -0.3])
        optimizer.step()
        reference.step()
        torch.testing.assert_close(values, other)


def test_a_step_of_muon_is_few_operations():
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, train_settings(optimizer="muon"))
    ema = Ema(model, decay=0.9, warmup=10)
    for step in range(2):
        gradients(model, step)
        with Counter() as counter:
            optimizer.step()
            ema.update(model, step)
    assert len(list(model.parameters())) > 200
    assert counter.count < 450  # 4,700 with timm's


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


def test_the_learning_rate_of_a_backbone_falls_from_layer_to_layer():
    small = {"neck__embed_dim": 32, "image_size": 64, "heads__detection__num_queries": 20}
    model = create_model("test_vit", num_classes=2, backbone__pyramid="mean-bilinear", backbone__detail=4, **small)
    optimizer = build_optimizer(model, train_settings(lr=1e-3, backbone_lr=1e-4, layer_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["backbone.net.model.blocks.5.mlp.fc1.weight"] == pytest.approx(1e-4)
    assert rates["backbone.net.model.blocks.4.mlp.fc1.bias"] == pytest.approx(1e-4 / 2)
    assert rates["backbone.net.model.blocks.0.norm1.weight"] == pytest.approx(1e-4 / 2**5)
    assert rates["backbone.net.model.pos_embed"] == pytest.approx(1e-4 / 2**6)
    outside = {name: rate for name, rate in rates.items() if not name.startswith("backbone.net.")}
    assert set(outside.values()) == {1e-3}
    assert "backbone.detail.convs.0.conv.weight" in outside
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_layers_of_convolutional_backbones():
    model = create_model("resnet18d", num_classes=2, image_size=64)
    layers = model.backbone.layers_from_end()
    last = layers["net.layer4.1.conv1.weight"]
    assert (last, layers["net.layer4.0.conv1.weight"], layers["net.layer1.0.conv1.weight"]) == (0, 1, 7)
    assert max(layers.values()) == layers["net.conv1.0.weight"] == 8
    convnext = create_model("test_convnext", num_classes=2, image_size=64).backbone.layers_from_end()
    assert convnext["net.stem_0.weight"] == max(convnext.values())
    other = create_model("smp:mobilenet_v2", num_classes=2, image_size=64)
    with pytest.raises(UserError, match=r"train\.layer_decay: the order of the layers of backbone smp:mobilenet_v2"):
        build_optimizer(other, train_settings(layer_decay=0.8))

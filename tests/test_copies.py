"""``Model.predict`` runs a prepared copy of the model, which follows the model's weights."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from mvision import Model, UserError, create_model
from mvision.fast import copies
from mvision.fast.copies import prepared_copy
from mvision.fast.packed import PackedConv2d
from mvision.inference.predict import predict_images
from mvision.structures import Instances

CPU = torch.device("cpu")
PICTURE = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)


@pytest.fixture
def model() -> Model:
    """A small one, in training mode, whose norms have statistics that differ from those of a batch."""
    torch.manual_seed(0)
    made = create_model("tiny", ["detection"], num_classes=3, image_size=64, neck__embed_dim=32)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return made.train()


def plain(model: Model) -> Instances:
    """Results of the model itself."""
    return predict_images(model, [PICTURE], 0.0)[0]


def predict(model: Model) -> Instances:
    return model.predict([PICTURE], 0.0, precision="fp32")[0]


def assert_same(found: Instances, expected: Instances, tolerance: float = 1e-4) -> None:
    """Scores as sets: with random weights they are close together, and rounding reorders them."""
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(np.sort(found.scores), np.sort(expected.scores), rtol=0, atol=tolerance)


def differs(found: Instances, other: Instances) -> bool:
    return len(found) != len(other) or bool(np.abs(np.sort(found.scores) - np.sort(other.scores)).max() > 1e-4)


def test_a_copy_gives_the_models_results_and_leaves_the_model_as_it_was(model: Model) -> None:
    modes, weights = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    parts, random = list(model.named_modules()), torch.get_rng_state()
    expected, found = plain(model), predict(model)
    assert_same(found, expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert list(model.named_modules()) == parts
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    ready = prepared_copy(model, CPU, "fp32")
    assert ready.fused
    assert not ready.training
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    if copies.prepare.__globals__["has_packed_convolutions"]():
        assert any(isinstance(part, PackedConv2d) for part in ready.modules())


def test_a_copy_is_made_once_for_a_precision(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        copies, "_make", lambda model, choice, make=copies._make: (made.append(choice), make(model, choice))[1]
    )
    for precision in ("fp32", "bf16", "fp32", "bf16"):
        first = prepared_copy(model, CPU, precision)
        assert prepared_copy(model, torch.device("cpu"), precision) is first
        assert next(first.parameters()).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert made == [(CPU, "fp32"), (CPU, "bf16")]
    with ThreadPoolExecutor(4) as executor:
        model.neck.requires_grad_(False)  # not a change of the weights
        assert len(set(executor.map(lambda _: prepared_copy(model, CPU, "fp32"), range(8)))) == 1
    assert len(made) == 2


def step(optimizer: Callable[..., torch.optim.Optimizer], **settings: bool) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters(), lr=0.01, **settings).step()

    return change


def in_data(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def load_other(model: Model) -> None:
    torch.manual_seed(7)
    model.load_state_dict({k: v + 0.05 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def statistics(model: Model) -> None:
    """As native batch norm does it, without counting the change."""
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 64) * 5)


def replaced_parameter(model: Model) -> None:
    for module in model.heads.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach() * 0.5)


def replaced_data(model: Model) -> None:
    for parameter in model.neck.parameters():
        parameter.data = parameter.data * 0.8


CHANGES = {
    "fused AdamW": step(torch.optim.AdamW, fused=True),
    "foreach AdamW": step(torch.optim.AdamW, foreach=True),
    "plain SGD": step(torch.optim.SGD, foreach=False),
    "data": in_data,
    "load_state_dict": load_other,
    "statistics of norms": statistics,
    "parameter": replaced_parameter,
    "data of parameters": replaced_data,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_followed(change: str, model: Model) -> None:
    before = predict(model)
    CHANGES[change](model)
    found = predict(model)
    assert_same(found, plain(model))
    assert differs(found, before)
    assert len(copies._of_all.by_model[model]._by_choice) == 1  # the old copy is gone


def test_one_changed_number_is_noticed(model: Model) -> None:
    before = prepared_copy(model, CPU, "fp32")
    weight = next(module.weight for module in model.neck.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        weight[1, 1] += 1
    assert prepared_copy(model, CPU, "fp32") is not before


def test_a_changed_config_is_followed(model: Model) -> None:
    before = prepared_copy(model, CPU, "fp32")
    model.config.categories[0].name = "renamed"
    assert prepared_copy(model, CPU, "fp32") is not before
    assert prepared_copy(model, CPU, "fp32").config == model.config


def test_copies_stay_out_of_what_is_copied_or_saved(model: Model) -> None:
    def size() -> int:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return buffer.tell()

    before = size()
    predict(model)
    assert size() == before
    assert copy.deepcopy(model) not in copies._of_all.by_model


def test_a_copy_goes_with_its_model() -> None:
    model = create_model("tiny", ["detection"], num_classes=3, image_size=64, neck__embed_dim=32)
    ready = weakref.ref(prepared_copy(model, CPU, "fp32"))
    del model
    gc.collect()
    assert ready() is None


def test_weights_of_the_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        made = copy.deepcopy(model).eval()
        expected = predict(made)
        in_data(made)
        changed = predict(made)
    assert differs(changed, expected)
    assert_same(predict(made), changed)
    assert_same(expected, predict(model))


def test_autocast_and_gradients_of_the_caller_do_not_matter(model: Model) -> None:
    expected = predict(model)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        found = predict(model)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_fused_model_runs_as_it_is(model: Model) -> None:
    fused = copy.deepcopy(model).fuse()
    assert_same(fused.predict([PICTURE], 0.0)[0], plain(model))
    assert fused not in copies._of_all.by_model
    assert_same(predict(fused), plain(model))
    assert_same(fused.predict([PICTURE], 0.0, device="cpu")[0], plain(model))
    with pytest.raises(UserError, match="a fused model predicts as it is, on cpu in float32; load its weights again"):
        fused.predict([PICTURE], precision="bf16")
    ready = prepared_copy(model, CPU, "fp32")
    assert ready._for_prediction("auto", None) is ready


def test_precisions_and_devices_that_cannot_be_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--precision fp16: CPUs do not compute in fp16"):
        model.predict([PICTURE], precision="fp16")
    with pytest.raises(UserError, match="--device banana: not usable here"):
        model.predict([PICTURE], device="banana")
    monkeypatch.setattr("mvision.machine.cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match="--precision bf16: this CPU does not compute in bf16"):
        model.predict([PICTURE], precision="bf16")
    model.predict([PICTURE], device="cpu")
    assert list(copies._of_all.by_model[model]._by_choice) == [(CPU, "fp32")]


def test_the_runtime_is_said_once(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mvision"):
        for _ in range(2):
            predict(model)
        in_data(model)
        predict(model)
    (line,) = caplog.messages
    assert line.startswith(
        "Model.predict: PyTorch on cpu in fp32, image size 64x64, by a prepared copy of the weights ("
    )


@pytest.mark.parametrize(
    ("own_level", "root_level", "expected"),
    [
        (None, None, "first\nsecond\n"),
        (logging.WARNING, None, ""),
        (None, logging.WARNING, ""),
        (None, logging.INFO, "root: first\nroot: second\n"),
    ],
    ids=["by default", "silenced", "of a program that logs warnings", "of a program that logs more"],
)
def test_where_the_line_goes(
    own_level: int | None,
    root_level: int | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger, root = logging.Logger("mvision"), logging.RootLogger(logging.WARNING)
    logger.parent = root
    monkeypatch.setattr(copies, "_log", logger)
    if own_level is not None:
        logger.setLevel(own_level)
    if root_level is not None:  # as logging.basicConfig does
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("root: %(message)s"))
        root.addHandler(handler)
        root.setLevel(root_level)
    copies.say("first")
    copies.say("second")
    assert capsys.readouterr() == ("", expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_copies_on_a_gpu(precision: str, model: Model) -> None:
    expected = plain(model)
    for _ in range(3):  # also where CUDA graphs are replayed
        (found,) = model.predict([PICTURE], 0.0, precision=precision, device="cuda")  # type: ignore[arg-type]
        assert_same(found, expected, 1e-2)
    assert model.device.type == "cpu"
    CHANGES["fused AdamW"](model)
    (found,) = model.predict([PICTURE], 0.0, precision=precision, device="cuda")  # type: ignore[arg-type]
    assert_same(found, plain(model), 1e-2)
    moved = copy.deepcopy(model).to("cuda")
    (found,) = moved.predict([PICTURE], 0.0, precision=precision)  # type: ignore[arg-type]
    assert_same(found, plain(model), 1e-2)
    CHANGES["data"](moved)
    (found,) = moved.predict([PICTURE], 0.0, precision=precision)  # type: ignore[arg-type]
    assert_same(found, plain(moved.cpu()), 1e-2)

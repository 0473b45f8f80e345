"""Predictions and training steps do not wait for the GPU, and start no more operators than recorded here.

A pretended GPU counts, so none is needed; see ``pretend_gpu`` and ``operator_counts``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mvision import Model
from tests.operator_counts import CATEGORIES, HEADS, Counts, build, prediction, training_step
from tests.pretend_gpu import OnDevice, PretendedGpu, on_device

# Operators of `tiny` for a batch of two: of a prediction, and of a training step with and without objects. They are the
# numbers that `python -m tests.operator_counts --test` prints, and may grow by 3 %. Each costs a launch on a GPU: a
# change that needs more says in its commit message what for, and changes the number here.
OPERATORS = {
    "detection": (324, 1545, 1377),
    "detection as in D-FINE": (331, 1648, 1476),
    "instance-seg": (379, 2009, 1619),
    "keypoints": (308, 1431, 1291),
    "keypoints minimal": (201, 974, 974),
    "semantic-seg": (223, 717, 717),
    "joint": (611, 3038, 2508),
}
GROWTH = 1.03
# Copies to the GPU and back: of a prediction, and of a training step with and without objects.
COPIES = {
    "detection": ((0, 1), (2, 1), (2, 0)),
    "detection as in D-FINE": ((0, 1), (2, 1), (2, 0)),
    "instance-seg": ((1, 2), (5, 1), (3, 0)),
    "keypoints": ((0, 1), (2, 1), (1, 0)),
    "keypoints minimal": ((0, 1), (2, 1), (1, 0)),
    "semantic-seg": ((1, 2), (1, 0), (1, 0)),
    "joint": ((2, 6), (8, 2), (5, 0)),
}
# Masks go to the CPU as run lengths, whose number is not known before: one wait for all masks or regions of a size. The
# alternative is to copy all pixels.
ALLOWED = {"nonzero at mvision/structures/run_lengths.py": 2}

head = pytest.mark.parametrize("head", list(HEADS))


def check(counts: Counts, head: str, case: int, allowed: dict[str, int]) -> None:
    """Compare what was counted with what is recorded: a prediction (0), a step with (1) or without objects (2)."""
    waits: Counter[str] = Counter()
    for what, number in counts.waits.items():
        waits[what.rpartition(":")[0]] += number  # without the line
    assert all(number <= allowed.get(place, 0) for place, number in waits.items()), f"waits: {dict(counts.waits)}"
    for found, recorded in zip((counts.to_device, counts.to_host), COPIES[head][case]):
        assert found <= recorded, f"copies: {counts.to_device, counts.to_host} instead of {COPIES[head][case]}"
    recorded = OPERATORS[head][case]
    assert counts.kernels <= GROWTH * recorded, f"{counts.kernels} operators instead of {recorded}, see OPERATORS"


@head
def test_a_prediction_waits_once_for_its_results(head: str) -> None:
    check(prediction("tiny", head), head, 0, ALLOWED)


@head
def test_a_training_step_waits_once_for_each_matching(head: str) -> None:
    check(training_step("tiny", head), head, 1, {})


@head
def test_a_training_step_without_objects_does_not_wait_for_labels(head: str) -> None:
    check(training_step("tiny", head, objects=(0, 0)), head, 2, {})


@pytest.mark.parametrize("head", ["joint", "detection as in D-FINE", "keypoints minimal"])  # joint has the others
@torch.no_grad()
def test_a_prediction_compiles_without_a_break(head: str) -> None:
    model = build("tiny", head, 64).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, found = model(images), compiled(images)
    for task, outputs in expected.items():
        for name, value in outputs.items():
            torch.testing.assert_close(found[task][name], value, rtol=1e-3, atol=1e-4)


def on_gpu(call: Any) -> tuple[Any, PretendedGpu]:
    with PretendedGpu() as gpu:
        return call(cast(Tensor, OnDevice(torch.arange(6.0).view(2, 3)))), gpu


@pytest.mark.parametrize(
    "call",
    [
        lambda x: float(x[0, 0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 2],
        lambda x: x.nonzero(),
        lambda x: torch.repeat_interleave(x[0].long()),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(x.device),
    ],
)
def test_the_pretended_gpu_counts_waits(call: Any) -> None:
    assert on_gpu(call)[1].waits.total() == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.tensor([1.0, 2, 3], device=x.device) * x,
        lambda x: x.new_tensor([1.0, 2, 3]) * x,
        lambda x: torch.zeros(3) + x,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
    ],
)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(call: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        on_gpu(call)


def test_the_pretended_gpu_computes_as_the_cpu_does() -> None:
    (found, gpu) = on_gpu(lambda x: (x.clamp(min=1) @ torch.ones(3, 2, device=x.device)).t())
    assert isinstance(found, OnDevice)
    assert torch.equal(found.inner, torch.tensor([[4.0, 12], [4, 12]]))
    assert gpu.kernels == {"clamp": 1, "ones": 1, "mm": 1}
    assert not gpu.waits


def test_a_model_on_the_pretended_gpu_gives_what_it_gives_on_the_cpu() -> None:
    model = build("tiny", "detection", 64).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images)["detection"]["boxes"]
        moved = cast(Model, on_device(model))
        with PretendedGpu():
            found = moved(cast(Tensor, OnDevice(images)))["detection"]["boxes"]
    torch.testing.assert_close(found.inner, expected)
    assert len(model.categories) == len(CATEGORIES)

"""On a GPU: what a prepared model gives by a CUDA graph is what it gives without one."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision import Model, create_model
from mvision.deploy.compare import difference
from mvision.fast.biases import BiasActivation
from mvision.fast.cuda_graphs import GRAPHS, Replays, replay_graphs
from mvision.fast.prepare import prepare
from mvision.machine import Precision
from mvision.structures import Category
from tests.test_joint import TASKS, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZE = (64, 96)
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A capture that fails is told in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(captured|CUDA graph)")
        yield


def with_statistics(model: Model, size: tuple[int, int] = SIZE) -> Model:
    """Norms that have seen something, on the GPU."""
    model = model.cuda()
    with torch.no_grad():
        model.train()(torch.rand(4, 3, *size, device="cuda"))
    return model.eval()


def make_images(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    pictures = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)
    return pictures.cuda().permute(0, 3, 1, 2)


def replays(model: Any) -> Replays:
    return model._replays


def comparable(outputs: Any, precision: Precision) -> Any:
    """The outputs; in half precision without the places of keypoints.

    cuDNN chooses other algorithms for a graph, whose rounding moves the highest place of an untrained, flat heatmap.
    """
    if precision == "fp32":
        return outputs
    places = ("keypoints", "similarity")
    return {task: {name: x for name, x in of.items() if name not in places} for task, of in outputs.items()}


def check_against_eager(model: Any, batches: list[int], precision: Precision, size: tuple[int, int] = SIZE) -> None:
    """Every batch is predicted without a graph, captured and replayed; then all are replayed again."""
    for batch in [*batches, *batches]:
        inputs = make_images(batch, size)
        expected = comparable(model._plain(inputs), precision)
        for _ in range(3):
            found, where = difference(expected, comparable(model(inputs), precision))
            assert found <= TOLERANCES[precision], (batch, where)
    assert len(replays(model)) == len(batches)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "tasks", [["detection"], ["instance-seg"], ["keypoints"], ["semantic-seg"], [*TASKS, "semantic-seg"]], ids="-".join
)
@torch.no_grad()
def test_every_task_by_a_graph(tasks: list[str], precision: Precision) -> None:
    plain = with_statistics(make_model(tasks))
    model = prepare(copy.deepcopy(plain), precision)
    check_against_eager(model, [2, 1, 5], precision)
    if precision == "fp32" or tasks == ["detection"]:  # rounding changes which grid points of flat scores are chosen
        expected, given = (comparable(one(make_images(2)), precision) for one in (plain, model))
        found, where = difference(expected, given)
        assert found <= 3 * TOLERANCES[precision], where
    assert not any(isinstance(part, nn.Conv2d) and part.bias is not None for part in model.modules())
    assert any(isinstance(part, BiasActivation) for part in model.modules())


@pytest.mark.parametrize("name", ["tiny", "small"])
@torch.no_grad()
def test_shipped_models_by_a_graph_and_what_capturing_costs(name: str) -> None:
    people = [Category(id=1, name="person", keypoints=["a", "b", "c"]), Category(id=2, name="dog")]
    size = (320, 320)
    plain = with_statistics(create_model(name, TASKS, categories=people, image_size=320), size)
    model = prepare(plain, "bf16")
    check_against_eager(model, [1, 4], "bf16", size)
    inputs = make_images(3, size)
    model(inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(inputs)
    torch.cuda.synchronize()
    captured = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(20):
        model(inputs)
    torch.cuda.synchronize()
    print(f"\n{name}: a capture took {captured:.2f} s, a replay {(time.perf_counter() - start) / 20 * 1e3:.2f} ms")


@torch.no_grad()
def test_more_shapes_than_graphs() -> None:
    model: Any = prepare(with_statistics(make_model(["detection"])), "bf16")
    for batch in range(1, GRAPHS + 3):
        inputs = make_images(batch)
        expected = model._plain(inputs)
        for _ in range(3):
            assert difference(expected, model(inputs))[0] <= TOLERANCES["bf16"]
    assert len(replays(model)) == GRAPHS
    model.float()
    assert len(replays(model)) == 0
    assert copy.deepcopy(model)(make_images(1))["detection"]["boxes"].isfinite().all()


@torch.no_grad()
def test_threads_with_streams_of_their_own() -> None:
    model: Any = prepare(with_statistics(make_model(["detection"])), "fp32")
    expected = {batch: model._plain(make_images(batch)) for batch in (1, 2)}
    torch.cuda.synchronize()  # the threads read it in streams of their own

    def work(seed: int) -> list[float]:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            batches = [1 + (seed + number) % 2 for number in range(20)]
            return [difference(expected[batch], model(make_images(batch)))[0] for batch in batches]

    with ThreadPoolExecutor(3) as pool:  # its results raise what was raised in the threads
        for found in pool.map(work, range(3)):
            assert max(found) <= TOLERANCES["fp32"]
    assert len(replays(model)) == 2


class Waits(nn.Module):
    """Asks for a number in its forward pass, which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device="cuda"), requires_grad=False)

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Any]:
        total = images.float().sum()
        return {"task": {"sum": total * self.weight if total.item() > 0 else total}}


@torch.no_grad()
def test_a_model_that_waits_for_the_gpu_runs_without_a_graph() -> None:
    model = Waits().eval()
    replay_graphs(model)
    inputs = make_images(2)
    model(inputs)
    with pytest.warns(UserWarning, match="cannot be captured"):
        model(inputs)
    for _ in range(2):
        assert model(inputs)["task"]["sum"] == inputs.float().sum()
    assert torch.rand(3, device="cuda").isfinite().all()
    # Another model can still be captured.
    check_against_eager(prepare(with_statistics(make_model(["detection"])), "bf16"), [1], "bf16")


@pytest.mark.parametrize("after", [None, nn.ReLU(), nn.SiLU()], ids=str)
def test_bias_and_activation_after_a_convolution(after: nn.Module | None) -> None:
    x = torch.randn(2, 24, 9, 7, device="cuda").to(memory_format=torch.channels_last)
    bias = torch.randn(24, device="cuda")
    expected = x + bias[:, None, None]
    expected = expected if after is None else after(expected)
    torch.testing.assert_close(BiasActivation(bias, after)(x.clone()), expected)


@torch.no_grad()
def test_compiled_and_captured() -> None:
    model: Any = prepare(with_statistics(make_model(["detection"])), "fp32", compile=True)
    inputs = make_images(2)
    expected = model._plain(inputs)
    with pytest.warns(UserWarning, match="torch.compile took"):
        model(inputs)
    for _ in range(3):
        assert difference(expected, model(inputs))[0] <= TOLERANCES["fp32"]
    assert len(replays(model)) == 1

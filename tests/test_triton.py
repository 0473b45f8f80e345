"""Kernels in Triton against PyTorch's operators: compiled where there is a GPU, by Triton's interpreter elsewhere.

The interpreter is chosen by an environment variable that Triton reads when it is imported, so one test runs the others
of this file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision import machine
from mvision.fast.bias_activation import add_bias_activation_
from mvision.heads.instance_seg.logits import PRIOR_LOWEST, add_prior_
from mvision.heads.query import deformable, sampling
from mvision.heads.query.deformable import DeformableAttention
from mvision.heads.query.sampling import sample_grid, sample_levels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
runs_kernels = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.skipif(INTERPRETED, reason="it runs in the process that this test starts")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@runs_kernels
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 64, 5, 7), torch.bfloat16), ((1, 3, 9, 1), torch.float32), ((3, 300, 2, 3), torch.float16)],
)
def test_bias_and_activation(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    from mvision.fast.bias_activation_triton import launch

    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)
    bias = torch.randn(shape[1], device=DEVICE).to(dtype)
    expected = x.float() + bias.float()[:, None, None]
    if activation != "none":
        expected = getattr(torch.nn.functional, activation)(expected)
    by_kernel, planes = x.clone(), x.clone(memory_format=torch.contiguous_format)
    launch(by_kernel, bias, activation)
    for found in (by_kernel, add_bias_activation_(x, bias, activation), add_bias_activation_(planes, bias, activation)):
        torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_prior_of_masks(dtype: torch.dtype) -> None:
    from mvision.heads.instance_seg.prior_triton import launch

    torch.manual_seed(0)
    product, weight = torch.randn(2, 3, 37, 41).to(DEVICE, dtype), torch.rand(2, 3, 1).to(DEVICE, dtype)
    across, down = 1 - 3 * torch.rand(2, 3, 41).to(DEVICE), 4 * torch.rand(2, 3, 37).to(DEVICE)
    prior = (across[..., None, :] - down[..., None]).clamp(min=PRIOR_LOWEST)
    expected, by_kernel = product.float() + weight.float()[..., None] * prior, product.clone()
    launch(by_kernel, weight, across, down, PRIOR_LOWEST)
    for found in (by_kernel, add_prior_(product, weight, across, down)):
        torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert machine.has_triton(), "Triton failed"


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation 'gelu' is not one of none, relu, silu"):
        add_bias_activation_(torch.zeros(1, 1, 1, 1), torch.zeros(1), "gelu")  # type: ignore[arg-type]


def test_where_triton_fails_it_is_told_once_and_operators_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TRITON_IS_INSTALLED", True)
    monkeypatch.setattr(machine, "_triton_fails", False)
    calls = []

    def fails() -> str:
        calls.append(1)
        raise FileNotFoundError("no\ngcc")

    assert machine.with_triton(lambda: "kernel", lambda: "operators") == "kernel"
    with pytest.warns(UserWarning, match=r"slower operators of PyTorch.*C compiler.*\(FileNotFoundError: no gcc\)"):
        assert machine.with_triton(fails, lambda: "operators") == "operators"
    assert not machine.has_triton()
    assert machine.with_triton(fails, lambda: "operators") == "operators"
    assert len(calls) == 1
    monkeypatch.setattr(machine, "_triton_fails", False)
    with pytest.raises(torch.OutOfMemoryError):
        machine.with_triton(_out_of_memory, lambda: None)
    assert machine.has_triton()


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("no memory left")


@needs_gpu
def test_bias_in_a_cuda_graph_is_one_kernel() -> None:
    x = torch.randn(8, 64, 40, 40, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    start, bias = x.clone(), torch.randn(64, device="cuda", dtype=torch.bfloat16)
    add_bias_activation_(x, bias, "relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_bias_activation_(x, bias, "relu")
    x.copy_(start)
    graph.replay()
    torch.testing.assert_close(x, torch.relu(start.float() + bias.float()[:, None, None]).bfloat16())
    assert machine.has_triton(), "Triton failed"


CASES = {
    "as in r18": (2, 3, 2, 32, [(5, 7), (3, 4), (2, 2)], [4, 4, 4], torch.float32),
    "one level, odd width": (1, 5, 2, 5, [(4, 6)], [3], torch.float32),
    "wide, many points": (2, 2, 1, 70, [(3, 3), (2, 5)], [5, 5], torch.float32),
    "eight levels": (1, 2, 2, 8, [(level + 1, 9 - level) for level in range(8)], [1] * 8, torch.float32),
    "eight levels, unlike": (1, 2, 2, 8, [(level + 1, 9 - level) for level in range(8)], [*range(1, 9)], torch.float32),
    "as in D-FINE": (2, 3, 2, 32, [(5, 7), (3, 4), (2, 2)], [3, 6, 3], torch.float32),
    "bf16": (2, 2, 2, 32, [(6, 6), (3, 3)], [4, 4], torch.bfloat16),
    "fp16": (1, 4, 2, 16, [(6, 6), (3, 3)], [3, 1], torch.float16),
}


def _sampling_inputs(case: str) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]], list[int]]:
    batch, queries, heads, dim, shapes, points, dtype = CASES[case]
    torch.manual_seed(0)
    tokens, total = sum(height * width for height, width in shapes), sum(points)
    value = torch.randn(batch, tokens, heads, dim).to(dtype)
    # A third of the points lies outside of the map, one far from it.
    locations = torch.rand(batch, queries, heads, total, 2) * 1.6 - 0.3
    locations[0, 0, 0, 0] = torch.tensor([40.0, -30.0])
    weights = torch.rand(batch, queries, heads, total).to(dtype)
    return value.to(DEVICE), locations.to(DEVICE), weights.to(DEVICE), shapes, points


def _flat(shapes: list[tuple[int, int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


@runs_kernels
@pytest.mark.parametrize("case", CASES)
def test_sampling_and_its_gradients(case: str) -> None:
    *inputs, shapes, points = _sampling_inputs(case)
    dtype = inputs[0].dtype
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected = sample_grid(*exact, shapes, points)
    found = sample_levels(*inputs, _flat(shapes), points)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert found.dtype == dtype
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, direction)
    for tensor, gradient, right in zip(inputs, gradients, torch.autograd.grad(expected, exact, direction.double())):
        assert gradient.dtype == tensor.dtype
        scale = float(right.abs().max())
        torch.testing.assert_close(gradient.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    assert machine.has_triton(), "Triton failed"


@runs_kernels
@pytest.mark.parametrize("number", [1e30, -1e30, float("inf"), float("nan")])
def test_nothing_is_sampled_where_there_is_no_place(number: float) -> None:
    value, locations, weights, shapes, points = _sampling_inputs("one level, odd width")
    locations[0, 1, 0, :, 0] = number
    locations.requires_grad_()
    out = sample_levels(value, locations, weights, _flat(shapes), points)
    assert out[0, 1, :5].tolist() == [0] * 5
    assert out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), locations)
    assert not gradient[0, 1, 0].any()
    assert gradient.isfinite().all()


@runs_kernels
def test_sampling_of_values_in_another_order() -> None:
    value, locations, weights, shapes, points = _sampling_inputs("as in r18")
    expected = sample_levels(value, locations, weights, _flat(shapes), points)
    heads_first = value.transpose(1, 2).contiguous().transpose(1, 2)
    channels_apart = value.transpose(1, 3).contiguous().transpose(1, 3)
    for other in (heads_first, channels_apart):
        torch.testing.assert_close(sample_levels(other, locations, weights, _flat(shapes), points), expected)


def test_sampling_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_triton_fails", True)
    *tensors, shapes, points = _sampling_inputs("fp16")
    inputs = [tensor.double().requires_grad_() for tensor in tensors]
    expected, found = sample_grid(*inputs, shapes, points), sample_levels(*inputs, _flat(shapes), points)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    direction = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(expected, inputs, direction), torch.autograd.grad(found, inputs, direction)):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_the_operators_keep_the_rules_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, outputs without data, and gradients when compiled; by PyTorch's operators, which need no GPU."""
    monkeypatch.setattr(machine, "_triton_fails", True)
    *tensors, shapes, points = _sampling_inputs("one level, odd width")
    inputs = [tensor.cpu().requires_grad_() for tensor in tensors]
    torch.library.opcheck(sample_levels, (*inputs, _flat(shapes), points))
    direction = torch.randn(1, 5, 10)
    backward = torch.ops.mvision.sample_levels_backward.default
    checks = ("test_schema", "test_faketensor")  # it has no gradients of its own
    torch.library.opcheck(
        backward, (direction, *(x.detach() for x in inputs), _flat(shapes), points), test_utils=checks
    )


def test_when_the_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TRITON_IS_INSTALLED", True)
    monkeypatch.setattr(machine, "_triton_fails", False)
    shapes = [(2, 2)] * 3

    def serves(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, shapes: Any = shapes) -> bool:
        return sampling.kernel_serves(SimpleNamespace(device=torch.device(device), dtype=dtype), shapes)

    assert serves()
    assert serves(dtype=torch.float32, shapes=[(2, 2)] * 8)
    assert not serves(dtype=torch.float64)
    assert not serves(shapes=[(2, 2)] * 9)
    assert not serves(device="cpu")
    assert not serves(device="mps")
    with monkeypatch.context() as exporting:
        name = "is_exporting" if hasattr(torch.compiler, "is_exporting") else "is_compiling"
        exporting.setattr(torch.compiler, name, lambda: True)
        assert not serves()
    with monkeypatch.context() as deterministic:
        deterministic.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert not serves()
    monkeypatch.setattr(machine, "_triton_fails", True)
    assert not serves()


SHAPES = [(20, 20), (10, 10), (5, 5)]


def _attention(points: int | list[int] = 4) -> tuple[DeformableAttention, tuple[Tensor, ...]]:
    """Deformable attention as in r18 with places that depend on the queries, and (queries, references, memory)."""
    torch.manual_seed(0)
    attention = DeformableAttention(256, 8, 3, points).to(DEVICE)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.02)
    torch.nn.init.normal_(attention.attention_weights.weight, std=0.02)
    inputs = (torch.randn(2, 50, 256), torch.rand(2, 50, 4), torch.randn(2, 525, 256))
    return attention, tuple(tensor.to(DEVICE) for tensor in inputs)


@runs_kernels
def test_attention_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, inputs = _attention()
    queries, references, memory = (tensor[:1] for tensor in inputs)
    inputs = (queries[:, :2], references[:, :2], memory)  # the interpreter is slow
    results = []
    for use in (False, True):
        monkeypatch.setattr(deformable, "kernel_serves", lambda value, shapes, use=use: use)
        out = attention(*inputs, SHAPES)
        results.append((out, *torch.autograd.grad(out.square().sum(), attention.parameters())))
    assert ["sample_levels" in _graph(out) for out, *_ in results] == [False, True]
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _graph(out: Tensor) -> str:
    """Names of the functions that made a tensor."""
    names, nodes = [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(f"{node.name()} {type(node)}")
        nodes.extend(parent for parent, _ in node.next_functions if parent is not None)
    return " ".join(names)


@needs_gpu
@pytest.mark.parametrize("points", [4, [3, 6, 3]])
def test_attention_in_a_cuda_graph(points: int | list[int]) -> None:
    attention, inputs = _attention(points)
    attention.bfloat16()
    queries, references, memory = inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16()
    with torch.inference_mode():
        attention(queries, references, memory, SHAPES)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(queries, references, memory, SHAPES)
        references.copy_(torch.rand_like(references))
        graph.replay()
        torch.testing.assert_close(out, attention(queries, references, memory, SHAPES))
    assert machine.has_triton(), "Triton failed"


@needs_gpu
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_compiled(gradients: bool) -> None:
    attention, inputs = _attention()
    compiled = torch.compile(attention, fullgraph=True)
    with torch.set_grad_enabled(gradients):
        expected, found = attention(*inputs, SHAPES), compiled(*inputs, SHAPES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if gradients:
        assert "sample_levels" in _graph(expected)
        parameters = list(attention.parameters())
        pairs = [torch.autograd.grad(out.square().sum(), parameters) for out in (expected, found)]
        for right, gradient in zip(*pairs):
            torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
    assert machine.has_triton(), "Triton failed"


@needs_gpu
def test_attention_in_training_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are bf16 then, places and weights float32, and every parameter has the gradients of grid_sample."""
    attention, inputs = _attention()
    results = []
    for use in (True, False):
        monkeypatch.setattr(deformable, "kernel_serves", lambda value, shapes, use=use: use)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = attention(*inputs, SHAPES)
        results.append(torch.autograd.grad(out.float().square().sum(), attention.parameters()))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
    assert machine.has_triton(), "Triton failed"


@needs_gpu
def test_the_kernel_is_faster_than_grid_sampling() -> None:
    """At the sizes of r18 (16 images, bf16), where the copies of ``sample_grid`` take much longer than its sampling."""
    shapes, points = [(80, 80), (40, 40), (20, 20)], [4, 4, 4]
    value = torch.randn(16, 8400, 8, 32, device="cuda", dtype=torch.bfloat16)
    locations, weights = torch.rand(16, 300, 8, 12, 2, device="cuda"), torch.rand(16, 300, 8, 12, device="cuda")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for _ in range(2):  # the first time compiles
        events[0].record()
        sample_levels(value, locations, weights, _flat(shapes), points)
        events[1].record()
        sample_grid(value, locations, weights, shapes, points)
        events[2].record()
    torch.cuda.synchronize()
    assert events[0].elapsed_time(events[1]) < events[1].elapsed_time(events[2])

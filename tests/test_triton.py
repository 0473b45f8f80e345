"""Kernels in Triton against PyTorch's operators: compiled where there is a GPU, by Triton's interpreter elsewhere.

The interpreter is chosen by an environment variable that Triton reads when it is imported, so one test runs the others
of this file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mvision import machine
from mvision.fast.triton_kernels import add_bias_activation_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
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
    from mvision.fast.triton_bias import launch

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

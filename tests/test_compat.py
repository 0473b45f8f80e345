"""The parts of other libraries that no library promises to keep are still there and still do what they did.

Every test is named after the entry of ``mvision.compat`` that it runs.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from mvision import compat
from mvision.machine import cpu_has_bf16

DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")),
]


def test_every_entry_has_a_test() -> None:
    tree = ast.parse(inspect.getsource(compat))
    entries = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    entries |= {node.targets[0].id.lower() for node in tree.body if isinstance(node, ast.Assign)}
    tests = [name for name in globals() if name.startswith("test_")]
    for entry in entries:
        assert any(entry in test for test in tests), f"no test for mvision.compat.{entry}"


def test_worker_sentinels_and_stop_workers() -> None:
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    assert compat.worker_sentinels(loader) == []
    iterator = iter(loader)  # kept: an iterator that is deleted ends its workers itself
    next(iterator)
    sentinels = compat.worker_sentinels(loader)
    assert len(sentinels) == 1
    assert not wait(sentinels, timeout=0)
    compat.stop_workers(loader)
    assert wait(sentinels, timeout=10) == sentinels
    assert compat.worker_sentinels(loader) == []
    assert len(list(loader)) == 4  # the loader can be used again
    compat.stop_workers(loader)


def test_stop_workers_of_a_loader_without_workers() -> None:
    loader = DataLoader(range(4))
    list(loader)
    assert compat.worker_sentinels(loader) == []
    compat.stop_workers(loader)
    assert len(list(loader)) == 4


def test_copy_all() -> None:
    sources = [torch.rand(3), torch.rand(2, 2)]
    targets = [torch.zeros(3), torch.zeros(2, 2)]
    compat.copy_all(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources))
    compat.copy_all([], [])


def test_add_all_multiply_all_and_move_all_towards() -> None:
    tensors = [torch.ones(3), torch.ones(2, 2)]
    compat.add_all(tensors, [torch.ones(3), 2 * torch.ones(2, 2)], 0.5)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1.5], [2.0]]
    compat.multiply_all(tensors, [2.0, 3.0])
    assert [tensor.unique().tolist() for tensor in tensors] == [[3.0], [6.0]]
    compat.move_all_towards(tensors, [torch.zeros(3), torch.zeros(2, 2)], 0.25)
    assert [tensor.unique().tolist() for tensor in tensors] == [[2.25], [4.5]]
    compat.add_all([], [], 1.0)
    compat.multiply_all([], [])
    compat.move_all_towards([], [], 1.0)


@pytest.mark.skipif(not compat.has_packed_convolutions(), reason="a build of torch without oneDNN, or not on x86")
def test_has_packed_convolutions_pack_convolution_weight_and_packed_convolution() -> None:
    conv, x = nn.Conv2d(16, 32, 3, stride=2, padding=1), torch.randn(2, 16, 12, 10)
    settings = ([1, 1], [2, 2], [1, 1], 1)
    with torch.no_grad():
        weight = compat.pack_convolution_weight(conv.weight, settings, list(x.shape))
        for activation, function in (("none", nn.Identity()), ("relu", F.relu), ("swish", F.silu)):
            found = compat.packed_convolution(x, weight, conv.bias, settings, activation)
            assert torch.allclose(found, function(conv(x)), atol=1e-5)


@pytest.mark.skipif(not compat.has_packed_convolutions(), reason="a build of torch without oneDNN, or not on x86")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_linear_weight_and_packed_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, tolerance = nn.Linear(32, 48).to(dtype), 1e-5 if dtype == torch.float32 else 0.03
    functions = {"none": nn.Identity(), "relu": F.relu, "swish": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}
    with torch.no_grad():
        weight = compat.pack_linear_weight(linear.weight, 300)
        for shape in ((32,), (5, 32), (2, 0, 32), (1, 300, 32), (2, 3, 4, 32)):
            x = torch.randn(shape).to(dtype)
            for activation, function in functions.items():
                found = compat.packed_linear(x, weight, linear.bias, activation)
                torch.testing.assert_close(found, function(linear(x)), atol=tolerance, rtol=0.02)
        torch.testing.assert_close(compat.packed_linear(x, weight, None, "none"), F.linear(x, linear.weight))


def test_onnx_name_scopes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1)))
    program = torch.onnx.export(net, (torch.zeros(1, 1, 2, 2),), dynamo=True, verbose=False)
    conv = next(node for node in program.model.graph if node.op_type == "Conv")
    assert ast.literal_eval(conv.metadata_props[compat.ONNX_NAME_SCOPES])[:3] == ["", "0", "0.0"]


def test_albumentations_alone() -> None:
    """It works without huggingface_hub, which can be imported afterwards."""
    code = """
        import sys
        from mvision.compat import albumentations_alone
        with albumentations_alone():
            import albumentations
        assert "huggingface_hub" not in sys.modules
        import huggingface_hub, numpy
        albumentations.ColorJitter()(image=numpy.zeros((2, 2, 3), numpy.uint8))
        with albumentations_alone():
            assert sys.modules["huggingface_hub"] is huggingface_hub
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 0


def test_shared_bytes() -> None:
    for count in (0, 1000):
        tensor = compat.shared_bytes(count)
        assert tensor.shape == (count,)
        assert tensor.dtype == torch.uint8
        assert tensor.is_shared()


def test_openvino_keep_float32(tmp_path: Path) -> None:
    """The installed version reads one of the marks, as it does a mark that it wrote itself."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset8

    from mvision.deploy.coordinates import mark

    x = opset8.parameter([1, 4], name="x")
    total = opset8.add(x, x, name="total")
    openvino.save_model(openvino.Model([total], [x]), tmp_path / "m.xml", compress_to_fp16=False)
    mark(tmp_path / "m.xml", {"total"})
    model = openvino.Core().read_model(tmp_path / "m.xml")
    operators = {operator.get_friendly_name(): operator for operator in model.get_ops()}
    names = {key.split("::")[-1].rstrip("_0123456789") for key in operators["total"].get_rt_info()}
    assert names & {attribute["name"] for attribute in compat.OPENVINO_KEEP_FLOAT32}, names


def test_reset_accelerate() -> None:
    from accelerate import Accelerator

    compat.reset_accelerate()
    Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(cpu=True, mixed_precision="bf16")
    compat.reset_accelerate()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    compat.reset_accelerate()


def test_hub_offline_unless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    asked: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with compat.hub_offline_unless(lambda address: bool(asked.append(address))):
        assert asked == [constants.ENDPOINT]
        with pytest.raises(OfflineModeIsEnabled):
            get_session().get(constants.ENDPOINT)
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download("nobody/nothing", "config.json", cache_dir=tmp_path)
    assert constants.HF_HUB_OFFLINE is False
    with compat.hub_offline_unless(lambda address: True):
        assert constants.HF_HUB_OFFLINE is False


def test_compilation_error_and_room_for_graphs() -> None:
    from torch._dynamo import config

    layer = nn.Linear(2, 2)
    layer.compile(backend=lambda graph, inputs: 1 / 0, dynamic=False)
    with pytest.raises(compat.compilation_error(), match="division"):
        layer(torch.zeros(1, 2))
    shapes: list[int] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        shapes.append(1)
        return graph

    layer.compile(backend=record, dynamic=False)
    before = config.recompile_limit
    with compat.room_for_graphs(12):
        for size in range(2, 14):
            layer(torch.zeros(size, 2))
    assert len(shapes) == 12
    assert config.recompile_limit == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_end_failed_capture() -> None:
    device, pool = torch.device("cuda"), torch.cuda.graph_pool_handle()
    number = torch.ones(1, device=device)
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
        number.item()
    compat.end_failed_capture(device, pool)
    assert torch.rand(3, device=device).isfinite().all()

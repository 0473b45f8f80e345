"""Which way a model runs for prediction, and that lower precision leaves coordinates alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision import UserError, load
from mvision.deploy import runtimes as roads
from mvision.deploy.coordinates import coordinate_operators, mark
from mvision.deploy.export import export
from mvision.deploy.exported import ExportedModel, openvino_core
from mvision.deploy.fast import prepare
from mvision.deploy.runtimes import open_fastest
from mvision.heads.query.deformable import DeformableAttention
from mvision.machine import cpu_has_bf16
from mvision.model import Model
from mvision.weights import save_weights
from tests.test_joint import TASKS, make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two tasks, and an export of one of them."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model(TASKS[:2])
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))
    save_weights(model.eval(), folder / "best.safetensors")
    if pytest.importorskip("openvino") and pytest.importorskip("onnxscript"):
        export(str(folder), format="openvino", tasks=[TASKS[0]], log=lambda line: None)
    return folder


def test_the_export_in_a_run_is_taken_where_it_can_be(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roads, "cpu_has_bf16", lambda: True)
    made = run / "best_openvino"
    model, messages = open_fastest(str(run), [TASKS[0]], CPU, "fp32")
    assert isinstance(model, ExportedModel)
    assert messages == f"OpenVINO on cpu in fp32: {made}"
    for source, tasks in ((run, []), (run, [TASKS[1]]), (run / "best.safetensors", [TASKS[0]])):
        model, messages = open_fastest(str(source), tasks, CPU, "fp32")
        assert isinstance(model, Model)
        assert messages.startswith("PyTorch on cpu in fp32")
        assert ("faster after mvision export" in messages) == (source == run)
    newer = made.stat().st_mtime + 10
    os.utime(run / "best.safetensors", (newer, newer))
    assert isinstance(open_fastest(str(run), [TASKS[0]], CPU, "fp32")[0], Model)


def test_bf16_is_taken_where_the_hardware_has_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = str(run / "best.safetensors")
    for has in (True, False):
        monkeypatch.setattr(roads, "cpu_has_bf16", lambda has=has: has)
        monkeypatch.setattr("mvision.machine.cpu_has_bf16", lambda has=has: has)
        model, messages = open_fastest(weights, [], CPU)
        assert next(model.parameters()).dtype == (torch.bfloat16 if has else torch.float32)
        assert messages == f"PyTorch on cpu in {'bf16' if has else 'fp32'}"
    with pytest.raises(UserError, match="--precision bf16: this CPU does not compute in bf16"):
        open_fastest(weights, [], CPU, "bf16")
    with pytest.raises(UserError, match="--precision bf16: ONNX Runtime has fp32 alone"):
        open_fastest("model.onnx", [], CPU, "bf16")


def test_weights_in_bf16_leave_coordinates_in_float32(run: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    weights = str(run / "best.safetensors")
    with torch.no_grad():
        expected, found = load(weights)(images)[TASKS[0]], prepare(load(weights), "bf16")(images)[TASKS[0]]
    assert found["boxes"].dtype == torch.float32
    # Random weights find much the same everywhere: which cell becomes which query is chance, the best score is not.
    first, second = (outputs["logits"].float().sigmoid().amax((1, 2)) for outputs in (expected, found))
    assert 0 < (first - second).abs().max() < 0.02


class _Attention(nn.Module):
    """Deformable attention that looks at one place of a map."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(8, 1, 1, 1)
        for name in ("value_proj", "output_proj"):
            nn.init.eye_(getattr(self.attention, name).weight)
        nn.init.zeros_(self.attention.sampling_offsets.bias)
        self.correction = nn.Linear(8, 4)
        nn.init.zeros_(self.correction.bias)
        self.side = side
        wave = (torch.arange(side) % 8 - 4).abs() / 4  # up and down within eight cells
        rows, columns = wave[:, None].expand(side, side), wave.expand(side, side)
        self.register_buffer("memory", torch.stack([columns, rows] * 4, -1).view(1, -1, 8))

    def forward(self, queries: Tensor, boxes: Tensor) -> Tensor:
        memory = self.memory.expand(len(boxes), -1, -1)
        return self.attention(queries, (boxes + self.correction(queries)).sigmoid(), memory, [(self.side, self.side)])


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")
def test_openvino_samples_the_right_cells_in_bf16(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    side, count = 200, 64
    module = _Attention(side).eval()
    places = torch.rand(2, count, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    inputs = (torch.zeros(2, count, 8), places.logit())
    with torch.no_grad():
        program = torch.onnx.export(module, inputs, dynamo=True, input_names=["queries", "boxes"], verbose=False)
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    model = openvino.convert_model(str(tmp_path / "model.onnx"))
    operators = coordinate_operators(model)
    names: dict[str, Any] = {operator.get_friendly_name(): operator for operator in model.get_ordered_ops()}
    assert {names[name].get_type_name() for name in operators} >= {"Sigmoid", "Floor", "Subtract", "Convert"}
    assert not {names[name].get_type_name() for name in operators} & {"MatMul", "Softmax"}
    error = {}
    for marked in (True, False):
        path = tmp_path / f"{marked}.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        if marked:
            mark(path, operators)
        compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        found = torch.from_numpy(next(iter(compiled([x.numpy() for x in inputs]).values())))
        with torch.no_grad():
            error[marked] = (found - module(*inputs)).abs().mean().item()
    assert error[True] < 2e-3  # bf16 of values in 0..1
    assert error[False] > 2e-2  # coordinates that reach 180, in bf16

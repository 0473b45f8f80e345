"""The hybrid encoder exported, traced, scripted and compiled: the same maps at every size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_neck import CHANNELS, STRIDES, make_maps, make_neck, max_difference

EXPORTED = [
    pytest.param({}, id="default"),
    pytest.param({"attention_levels": "all", "position": "learned"}, id="learned"),
    pytest.param({"attention": "window", "window_size": 3}, id="window"),
]
ANY_SHAPE = ([{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}] * 3,)


def other_maps() -> list[list[Tensor]]:
    """Maps for a graph exported from one example: other sizes and batches, sizes rounded up and down."""
    return [make_maps(160, 192, 1), make_maps(333, 517, 3), make_maps(333, 517, 2, floor=True)]


@pytest.mark.parametrize("settings", EXPORTED)
@torch.no_grad()
def test_torch_export_with_any_batch_and_size(settings: dict[str, Any]) -> None:
    neck = make_neck(**settings)
    program = torch.export.export(neck, (make_maps(224, 256),), dynamic_shapes=ANY_SHAPE, strict=False).module()
    for maps in other_maps():
        assert max_difference(program(maps), neck(maps)) <= 1e-5


@torch.no_grad()
def test_automatic_windows_export_as_global_attention_where_sizes_are_free() -> None:
    neck = make_neck(attention="auto", window_size=3, window_threshold=30)
    program = torch.export.export(neck, (make_maps(224, 256),), dynamic_shapes=ANY_SHAPE, strict=False).module()
    neck.attention = "global"
    for maps in other_maps():
        assert max_difference(program(maps), neck(maps)) <= 1e-5


@pytest.mark.xfail(
    torch.__version__ < (2, 11), reason="torch 2.6's exporter cannot resize to a dynamic size", strict=False
)
@torch.no_grad()
def test_onnx_with_any_batch_and_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    neck = make_neck().fuse()
    program = torch.onnx.export(neck, (make_maps(224, 256),), dynamo=True, dynamic_shapes=ANY_SHAPE, verbose=False)
    program.save(tmp_path / "neck.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "neck.onnx", providers=["CPUExecutionProvider"])
    for maps in other_maps():
        names = [node.name for node in session.get_inputs()]
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, maps)})
        assert max_difference([torch.from_numpy(x) for x in outputs], neck(maps)) <= 1e-4


@pytest.mark.parametrize("settings", EXPORTED)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_trace_and_script_follow_the_size(settings: dict[str, Any]) -> None:
    neck = make_neck(**settings)
    graphs = [torch.jit.trace(neck, (make_maps(224, 256),), check_trace=False), torch.jit.script(neck)]
    graphs.append(torch.jit.script(copy.deepcopy(neck).fuse()))
    for maps in other_maps():
        for graph in graphs:
            assert max_difference(graph(maps), neck(maps)) <= 1e-5


@torch.no_grad()
def test_compiles_into_one_graph() -> None:
    neck = make_neck(CHANNELS[:2], STRIDES[:2], attention="auto", window_size=6, window_threshold=200)
    compiled = torch.compile(neck, fullgraph=True, backend="eager")
    for maps in (maps[:2] for maps in other_maps()):  # global, then in windows
        assert max_difference(compiled(maps), neck(maps)) <= 1e-5

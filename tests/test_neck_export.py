"""The hybrid encoder exported, traced, scripted and compiled: the same maps at every size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision.neck.hybrid_encoder import HybridEncoder
from tests.test_neck import CHANNELS, STRIDES, make_maps, make_neck, max_difference
from tests.test_neck_options import EDGECRAFTER, make, maps_for

EXPORTED = [
    pytest.param({}, id="default"),
    pytest.param({"attention_levels": "all", "position": "learned"}, id="learned"),
    pytest.param({"attention": "window", "window_size": 3}, id="window"),
]
ANY_SHAPE = ([{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}] * 3,)


def other_maps(neck: HybridEncoder) -> list[list[Tensor]]:
    """Maps for a graph exported from one example: other sizes and batches, sizes rounded up and down."""
    return [maps_for(neck, 160, 192, 1), maps_for(neck, 333, 517, 3), maps_for(neck, 333, 517, 2, floor=True)]


@pytest.mark.parametrize("settings", EXPORTED)
@torch.no_grad()
def test_torch_export_with_any_batch_and_size(settings: dict[str, Any]) -> None:
    neck = make_neck(**settings)
    program = torch.export.export(neck, (make_maps(224, 256),), dynamic_shapes=ANY_SHAPE, strict=False).module()
    for maps in other_maps(neck):
        assert max_difference(program(maps), neck(maps)) <= 1e-5


@torch.no_grad()
def test_automatic_windows_export_as_global_attention_where_sizes_are_free() -> None:
    neck = make_neck(attention="auto", window_size=3, window_threshold=30)
    program = torch.export.export(neck, (make_maps(224, 256),), dynamic_shapes=ANY_SHAPE, strict=False).module()
    neck.attention = "global"
    for maps in other_maps(neck):
        assert max_difference(program(maps), neck(maps)) <= 1e-5


@pytest.mark.xfail(
    torch.__version__ < (2, 11), reason="torch 2.6's exporter cannot resize to a dynamic size", strict=False
)
@torch.no_grad()
def test_onnx_with_any_batch_and_size(tmp_path: Path) -> None:
    assert_same_in_onnx(make_neck().fuse(), tmp_path / "neck.onnx")


def assert_same_in_onnx(neck: HybridEncoder, path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    example = maps_for(neck, 224, 256)
    torch.onnx.export(neck, (example,), dynamo=True, dynamic_shapes=ANY_SHAPE, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for maps in other_maps(neck):
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, maps)})
        assert max_difference([torch.from_numpy(x) for x in outputs], neck(maps)) <= 1e-4


@pytest.mark.parametrize("settings", EXPORTED)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_trace_and_script_follow_the_size(settings: dict[str, Any]) -> None:
    neck = make_neck(**settings)
    graphs = [torch.jit.trace(neck, (make_maps(224, 256),), check_trace=False), torch.jit.script(neck)]
    graphs.append(torch.jit.script(copy.deepcopy(neck).fuse()))
    for maps in other_maps(neck):
        for graph in graphs:
            assert max_difference(graph(maps), neck(maps)) <= 1e-5


@torch.no_grad()
def test_compiles_into_one_graph() -> None:
    neck = make_neck(CHANNELS[:2], STRIDES[:2], attention="auto", window_size=6, window_threshold=200)
    compiled = torch.compile(neck, fullgraph=True, backend="eager")
    for maps in other_maps(neck):  # global, then in windows
        assert max_difference(compiled(maps), neck(maps)) <= 1e-5


# The settings of the fusion, all at once


@pytest.fixture(scope="module")
def fusion_neck() -> HybridEncoder:
    return make({**EDGECRAFTER, "elan_conv": True})


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_other_fusions_are_exported_scripted_and_compiled(fusion_neck: HybridEncoder) -> None:
    example = maps_for(fusion_neck, 224, 256)
    program = torch.export.export(fusion_neck, (example,), dynamic_shapes=ANY_SHAPE, strict=False).module()
    for graph in (program, torch.jit.script(fusion_neck), torch.jit.script(copy.deepcopy(fusion_neck).fuse())):
        for maps in other_maps(fusion_neck):
            assert max_difference(graph(maps), fusion_neck(maps)) <= 1e-5
    compiled = torch.compile(fusion_neck, fullgraph=True, backend="eager")
    assert max_difference(compiled(example), fusion_neck(example)) <= 1e-5


@pytest.mark.xfail(
    torch.__version__ < (2, 11), reason="torch 2.6's exporter cannot resize to a dynamic size", strict=False
)
@torch.no_grad()
def test_onnx_of_other_fusions(fusion_neck: HybridEncoder, tmp_path: Path) -> None:
    assert_same_in_onnx(copy.deepcopy(fusion_neck).fuse(), tmp_path / "neck.onnx")

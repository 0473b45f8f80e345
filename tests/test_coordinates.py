"""Coordinates of OpenVINO models are found, marked, and computed in float32."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision.compat import OPENVINO_KEEP_FLOAT32
from mvision.deploy.coordinates import coordinate_operators, mark
from mvision.deploy.sessions import openvino_core
from mvision.heads.query.deformable import DeformableAttention
from mvision.heads.query.distribution import BoxDistribution
from mvision.machine import cpu_has_bf16


@pytest.fixture(scope="module")
def sampler() -> Any:
    """Boxes, corrected by a product with weights, whose floor is an index into features; and an unrelated sigmoid."""
    pytest.importorskip("openvino")
    import numpy as np
    from openvino import Model, Type
    from openvino import opset13 as ops

    def named(node: Any, name: str) -> Any:
        node.set_friendly_name(name)
        return node

    queries, boxes = (named(ops.parameter([4, 8], Type.f32), name) for name in ("queries", "boxes"))
    features = named(ops.parameter([200, 8], Type.f32), "features")
    weights = np.zeros((8, 8), np.float32)
    correction = named(ops.matmul(queries, weights, False, False), "correction")
    position = named(
        ops.multiply(named(ops.sigmoid(named(ops.add(boxes, correction), "sum")), "centre"), np.float32(199)), "at"
    )
    index = named(ops.convert(named(ops.floor(position), "floor"), "i64"), "index")
    distance = named(ops.subtract(position, named(ops.convert(index, "f32"), "back")), "distance")
    value = named(ops.reduce_sum(ops.gather(features, index, 0), 1), "value")
    activated = named(ops.sigmoid(named(ops.matmul(features, weights, False, False), "product")), "activation")
    return Model([ops.multiply(value, distance), activated], [queries, boxes, features], "sampler")


def test_everything_that_an_index_is_made_from_is_a_coordinate(sampler: Any) -> None:
    operators = coordinate_operators(sampler)
    assert {"sum", "centre", "at", "floor", "index"} <= operators
    assert "distance" in operators  # uses a coordinate, and is not part of the index
    assert not operators & {"correction", "product", "activation", "value", "queries", "boxes"}


def test_the_mark_is_in_the_saved_model(sampler: Any, tmp_path: Path) -> None:
    import openvino

    path = tmp_path / "model.xml"
    openvino.save_model(sampler, path, compress_to_fp16=False)
    for _ in range(2):  # marking twice adds nothing
        mark(path, {"sum", "floor"})
    layers = ElementTree.parse(path).getroot().iterfind("layers/layer")
    marked = {layer.get("name"): [a.attrib for a in layer.iterfind("rt_info/attribute")] for layer in layers}
    assert {name for name, attributes in marked.items() if attributes} == {"sum", "floor"}
    assert [entry["name"] for entry in marked["sum"]] == [entry["name"] for entry in OPENVINO_KEEP_FLOAT32]
    assert openvino_core().read_model(path).get_friendly_name() == "sampler"


@pytest.fixture(scope="module")
def integral() -> Any:
    """Boxes that are the mean of a distribution which two layers add up, and a mixture of features."""
    pytest.importorskip("openvino")
    import numpy as np
    from openvino import Model, Type
    from openvino import opset13 as ops

    def named(node: Any, name: str) -> Any:
        node.set_friendly_name(name)
        return node

    corners, changes, features = (ops.parameter([64, 33], Type.f32) for _ in range(3))
    distances = np.linspace(-4, 4, 33, dtype=np.float32)[None]
    total = named(ops.add(corners, changes), "total")
    probabilities = named(ops.softmax(total, -1), "probabilities")
    mean = named(ops.reduce_sum(named(ops.multiply(probabilities, distances), "parts"), 1, True), "mean")
    shares = named(ops.softmax(ops.matmul(features, features, False, True), -1), "shares")
    mixed = named(ops.matmul(shares, features, False, False), "mixed")
    outputs = [named(ops.multiply(mean, np.float32(1)), "scaled"), ops.multiply(mixed, np.float32(1))]
    for output, name in zip(outputs, ("detection.boxes", "detection.logits")):
        output.output(0).get_tensor().set_names({name})
    return Model(outputs, [corners, changes, features], "integral")


def test_boxes_are_coordinates_back_to_the_corrections_of_their_distribution(integral: Any) -> None:
    operators = coordinate_operators(integral)
    assert {"scaled", "mean", "parts", "probabilities", "total"} <= operators
    assert not operators & {"shares", "mixed"}


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")
def test_openvino_takes_the_mean_of_a_distribution_in_float32(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    distribution = BoxDistribution(32, 4.0, 0.5)

    class Boxes(nn.Module):
        def forward(self, corners: Tensor, initial: Tensor) -> Tensor:
            return distribution.boxes(distribution.probabilities(corners), initial)

    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(2, 64, 132, generator=generator).mul(4).bfloat16().float()  # as a product in bf16 gives them
    inputs = (corners, torch.rand(2, 64, 4, generator=generator).bfloat16().float())
    program = torch.onnx.export(Boxes(), inputs, dynamo=True, output_names=["detection.boxes"], verbose=False)
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    model = openvino.convert_model(str(tmp_path / "model.onnx"))
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    mark(tmp_path / "model.xml", coordinate_operators(model))
    compiled = openvino_core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    found = torch.from_numpy(compiled([x.numpy() for x in inputs])["detection.boxes"])
    torch.testing.assert_close(found, Boxes()(*inputs), rtol=0, atol=1e-5)


class _Attention(nn.Module):
    """Deformable attention that samples one position of a map."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(8, 1, 1, 1)
        for name in ("value_proj", "output_proj"):
            nn.init.eye_(getattr(self.attention, name).weight)
        nn.init.zeros_(self.attention.sampling_offsets.bias)
        self.correction = nn.Linear(8, 4)
        nn.init.zeros_(self.correction.bias)
        self.side = side
        wave = (torch.arange(side) % 8 - 4).abs() / 4  # a triangle wave with a period of eight pixels
        rows, columns = wave[:, None].expand(side, side), wave.expand(side, side)
        self.register_buffer("memory", torch.stack([columns, rows] * 4, -1).view(1, -1, 8))

    def forward(self, queries: Tensor, boxes: Tensor) -> Tensor:
        memory = self.memory.expand(len(boxes), -1, -1)
        return self.attention(queries, (boxes + self.correction(queries)).sigmoid(), memory, [(self.side, self.side)])


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")
def test_openvino_samples_the_right_positions_in_bf16(tmp_path: Path) -> None:
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
    assert error[True] < 2e-3  # rounding of values in 0..1 to bf16
    assert error[False] > 2e-2  # rounding of coordinates up to 180 to bf16

"""Exported models give what PyTorch gives, and can be used wherever weights can."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mvision import UserError, load
from mvision.commands.export import export
from mvision.commands.info import info_text
from mvision.commands.predict import predict_job
from mvision.commands.val import validate
from mvision.deploy import compare
from mvision.deploy.compare import difference
from mvision.deploy.export import write_openvino
from mvision.deploy.exported import ExportedModel, is_exported
from mvision.deploy.opset import set_opset
from mvision.deploy.runtimes import open_fastest
from mvision.inference.predict import predict_images
from mvision.weights import save_weights
from tests.decoder_inputs import DFINE
from tests.test_joint import TASKS, make_model

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model with D-FINE's decoder, whose norms have statistics."""
    more = {"semantic-seg": {"pyramid_dim": 16, "embed_dim": 32}, "instance-seg": DFINE}
    model = make_model([*TASKS, "semantic-seg"], **more)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_weights(model.eval(), path)
    return path


@pytest.fixture(scope="module")
def onnx(weights: Path) -> Path:
    messages: list[str] = []
    export(str(weights), dynamic_size=True, opset=17, log=messages.append)
    assert sum("largest difference from PyTorch" in line for line in messages) == 4
    assert any("batch 4, 64 x 96" in line for line in messages)
    return weights.with_name("best.onnx")


def same(model: ExportedModel, weights: Path, *shape: int) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = load(weights)(images), model(images)
    assert {task: sorted(outputs) for task, outputs in found.items()} == {
        task: sorted(outputs) for task, outputs in expected.items()
    }
    assert difference(expected, found)[0] < 1e-3


def test_onnx_of_all_tasks_at_any_batch_and_size(onnx: Path, weights: Path) -> None:
    model = ExportedModel(onnx)
    assert model.tasks == [*TASKS, "semantic-seg"]
    for shape in ((1, 3, 64, 96), (5, 3, 64, 96), (2, 3, 128, 64)):
        same(model, weights, *shape)


def test_the_opset_is_the_one_that_was_asked_for(onnx: Path) -> None:
    import onnx as library

    model = library.load(onnx)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17}
    assert model.ir_version == 8  # what programs that know no newer opset read
    library.checker.check_model(model)


def test_openvino_of_all_tasks(onnx: Path, weights: Path, tmp_path: Path) -> None:
    """The graph of the other format, as the command makes it; ``openvino`` is what the command itself writes."""
    openvino = pytest.importorskip("openvino")
    write_openvino(openvino.convert_model(str(onnx)), tmp_path / "made", json.dumps(described(onnx)))
    model = ExportedModel(tmp_path / "made")
    assert model.tasks == [*TASKS, "semantic-seg"]
    assert is_exported(tmp_path / "made")
    for shape in ((3, 3, 64, 96), (1, 3, 128, 64)):
        same(model, weights, *shape)


def test_exports_find_what_the_weights_find(onnx: Path, weights: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    (found,) = predict_images(ExportedModel(onnx), [picture], 0.0)
    (expected,) = load(weights).predict([picture], 0.0, precision="fp32")
    assert len(found) == len(expected) > 0
    assert found.keypoints is not None
    assert found.masks is not None
    assert found.regions is not None
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    dropped = ExportedModel(onnx, tasks=["keypoints"])
    assert dropped.tasks == ["keypoints"]
    with pytest.raises(UserError, match="there is no head 'depth', only detection"):
        ExportedModel(onnx, tasks=["depth"])


def test_predict_and_val_take_exports(onnx: Path, weights: Path, squares: Path, tmp_path: Path) -> None:
    picture = str(squares / "images" / "val_0.jpg")
    summary = predict_job([picture], weights=str(onnx), tasks=["detection"], output=tmp_path / "out", threshold=0)
    assert summary.images == 1
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())
    for file in (squares / "annotations").iterdir():  # the classes of the model
        file.write_text(file.read_text().replace('"blue"', '"dog"'))
    for source in (onnx, weights):
        validate(str(source), tasks=["detection"], data=str(squares), output=tmp_path / source.suffix, device="cpu")
    first, second = (json.loads((tmp_path / s / "metrics.json").read_text()) for s in (".onnx", ".safetensors"))
    assert first["detection"]["AP"] == pytest.approx(second["detection"]["AP"], abs=0.02)


def test_queries_in_another_order_are_no_difference() -> None:
    outputs = {"detection": {"boxes": torch.rand(1, 8, 4), "logits": torch.randn(1, 8, 3)}}
    order = torch.randperm(8)
    shuffled = {"detection": {name: value[:, order] for name, value in outputs["detection"].items()}}
    assert difference(outputs, shuffled)[0] < 1e-6
    best = outputs["detection"]["logits"][0].amax(-1).argmax()
    shuffled["detection"]["boxes"][0, (order == best).nonzero()[0, 0], 2] += 0.05
    assert difference(outputs, shuffled) == (pytest.approx(0.05, abs=1e-5), "detection.boxes")


@pytest.mark.parametrize("name", ["boxes", "logits"])
def test_nan_is_a_difference(name: str) -> None:
    outputs = {"detection": {"boxes": torch.rand(1, 8, 4), "logits": torch.randn(1, 8, 3)}}
    broken = {"detection": {**outputs["detection"], name: torch.full_like(outputs["detection"][name], float("nan"))}}
    assert not difference(outputs, broken)[0] <= compare.TOLERANCE


def test_only_queries_with_high_scores_are_compared() -> None:
    logits = torch.arange(8.0).view(1, 8, 1) - 4  # the last two are the best quarter
    boxes = torch.rand(1, 8, 4)
    for query, expected in ((0, 0.0), (5, 0.0), (6, 0.03), (7, 0.03)):
        moved = boxes.clone()
        moved[0, query] += 0.03
        found, _ = difference({"d": {"boxes": boxes, "logits": logits}}, {"d": {"boxes": moved, "logits": logits}})
        assert found == pytest.approx(expected, abs=1e-6), query


def test_logits_are_compared_as_probabilities() -> None:
    for name, expected in (("masks", 0.2689), ("visibility", 0.2689), ("embeddings", 1.0)):
        found = difference({"t": {name: torch.tensor([0.0, 9.0])}}, {"t": {name: torch.tensor([-1.0, 9.0])}})
        assert found == (pytest.approx(0.5 - 0.2689 if expected < 1 else 1.0, abs=1e-3), f"t.{name}")


@pytest.fixture(scope="module")
def openvino(weights: Path) -> Path:
    pytest.importorskip("openvino")
    export(str(weights), format="openvino", tasks=["detection"], log=lambda line: None)
    return weights.with_name("best_openvino")


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_load_opens_exports(format: str, weights: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(format)
    model = load(path)
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    (found,) = model.predict(picture, 0.0)
    (expected,) = load(weights, tasks=model.tasks).predict(picture, 0.0, precision="fp32")
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    assert model.categories == load(weights).categories
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(picture, 0.0)[0].boxes, found.boxes)
    assert load(path, tasks=["detection"]).tasks == ["detection"]
    with pytest.raises(UserError, match="runs on the CPU, not on cuda"):
        load(path, device="cuda")


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_threads_share_an_export(format: str, request: pytest.FixtureRequest) -> None:
    """Images of two batch sizes, so that two compiled graphs are used in turn."""
    model = ExportedModel(request.getfixturevalue(format))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(0, 256, (1 + number % 2, 3, 64, 96), dtype=torch.uint8, generator=generator)
        for number in range(64)
    ]
    serial = [model(images)["detection"] for images in inputs]
    model = ExportedModel(request.getfixturevalue(format))  # nothing is compiled yet
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda images: model(images)["detection"], inputs))
    for expected, outputs in zip(serial, found):
        for name, value in expected.items():
            assert torch.equal(outputs[name], value)


def test_info_describes_exports(onnx: Path, openvino: Path, weights: Path) -> None:
    text = info_text(weights=str(onnx))
    assert "ONNX Runtime" in text
    assert "64 high, 96 wide; other multiples of 32 too" in text
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in text
    text = info_text(weights=str(openvino))
    assert "tasks                    detection\n" in text
    assert "output detection.logits  any x 10 x 2" in text


def test_an_export_stands_in_for_its_weights_only(openvino: Path, weights: Path) -> None:
    model, line = open_fastest(str(weights.parent), ["detection"], torch.device("cpu"), "fp32")
    assert isinstance(model, ExportedModel)
    assert line == f"OpenVINO on cpu in fp32, image size 64x96: {openvino}"
    model, line = open_fastest(str(weights.parent), ["detection", "keypoints"], torch.device("cpu"), "fp32")
    assert not isinstance(model, ExportedModel)
    assert "best_openvino is not used: it lacks keypoints" in line


DESCRIPTIONS = {
    "{": "the description of the model in it is damaged",
    "[" * 100_000: "the description of the model in it is damaged .nested too deeply",
    "[]": "it has no section model",
    '{"model": 3}': "it has no section model",
    '{"model": {"bakbone": {}}}': "unknown key",
    '{"model": {}}': "cannot be built .model.heads is empty",
}


@pytest.mark.parametrize(("text", "message"), DESCRIPTIONS.items(), ids=range(len(DESCRIPTIONS)))
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_foreign_and_damaged_descriptions(
    format: str, text: str, message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load(with_description(request.getfixturevalue(format), tmp_path, text))
    assert "\n" not in str(raised.value)


def with_description(path: Path, folder: Path, text: str) -> Path:
    """A copy of an export with another description."""
    if path.is_dir():
        copy = Path(shutil.copytree(path, folder / "copy"))
        tree = ElementTree.parse(copy / "model.xml")
        tree.getroot().find("rt_info/mvision").set("value", text)  # type: ignore[union-attr]
        tree.write(copy / "model.xml")
        return copy
    import onnx as library

    model = library.load(path)
    library.helper.set_model_props(model, {"mvision": text})
    library.save(model, folder / "copy.onnx")
    return folder / "copy.onnx"


def described(path: Path) -> dict:
    """The description of an export as it is stored."""
    import onnx as library

    return json.loads({entry.key: entry.value for entry in library.load(path).metadata_props}["mvision"])


def test_a_description_that_is_not_of_the_graph(onnx: Path, tmp_path: Path) -> None:
    for change, message in (
        (
            {"categories": [described(onnx)["model"]["categories"][1]]},
            r"has shape \[(None|10), 2\], and the described model \[10, 1\]",
        ),
        ({"image_size": [64, 64]}, None),  # it takes any size
        ({"backbone": {"name": "nonsense"}}, "backbone 'nonsense' is unknown to timm"),
        ({"heads": {"instance-seg": {"num_layers": 1_000_000}}}, "num_layers: input should be less than or equal"),
    ):
        description = described(onnx)
        description["model"] |= change
        path = with_description(onnx, tmp_path, json.dumps(description))
        if message is None:
            load(path)
            continue
        with pytest.raises(UserError, match=message):
            load(path)


def test_an_export_cannot_ask_for_more_memory_than_it_has_bytes(onnx: Path, tmp_path: Path) -> None:
    description = described(onnx)
    for head in ("instance-seg", "detection"):
        description["model"]["heads"][head] |= {"embed_dim": 8192, "ffn_dim": 65536, "num_layers": 12}
    with pytest.raises(UserError, match=r"asks for heads of [\d,]{14,} numbers, and the file has"):
        load(with_description(onnx, tmp_path, json.dumps(description)))


def test_weights_outside_the_folder_are_not_read(onnx: Path, tmp_path: Path) -> None:
    import onnx as library

    (tmp_path / "secret").write_bytes(bytes(4 * 10**6))
    (tmp_path / "in").mkdir()
    for location in ("../secret", str(tmp_path / "secret"), "in/../../secret"):
        model = library.load(onnx)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) == 4)
        tensor.ClearField("raw_data")
        tensor.data_location = library.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (tmp_path / "in" / "x.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match="x.onnx: ONNX Runtime cannot read it"):
            load(tmp_path / "in" / "x.onnx")


def test_operators_of_other_libraries_are_not_looked_for(tmp_path: Path) -> None:
    import onnx as library

    sides = [library.helper.make_tensor_value_info(name, library.TensorProto.FLOAT, [1]) for name in ("images", "y")]
    node = library.helper.make_node("Evil", ["images"], ["y"], domain="com.example", library="/tmp/evil.so")
    opsets = [library.helper.make_opsetid("", 17), library.helper.make_opsetid("com.example", 1)]
    graph = library.helper.make_graph([node], "g", sides[:1], sides[1:])
    library.save(library.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"x.onnx: ONNX Runtime cannot read it .*Evil"):
        load(tmp_path / "x.onnx")


@pytest.mark.parametrize("written", [18, 25])
def test_an_opset_that_torch_does_not_write_is_refused(written: int) -> None:
    model = SimpleNamespace(opset_imports={"": written}, graph=None)
    with pytest.raises(UserError, match=rf"--opset 26: torch .* and onnxscript .* write opset {written} instead"):
        set_opset(model, 26)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x.onnx: ONNX Runtime cannot read it"):
        ExportedModel(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="no such file"):
        ExportedModel(tmp_path / "y.onnx")
    program = torch.onnx.export(torch.nn.ReLU().eval(), (torch.zeros(1),), dynamo=True, verbose=False)
    program.save(str(tmp_path / "z.onnx"))
    for name, message in (("folder.onnx", "neither an ONNX file nor a folder"), ("empty.onnx", "this file is empty")):
        (tmp_path / name).mkdir() if name == "folder.onnx" else (tmp_path / name).touch()
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(UserError, match="pipe.onnx: neither an ONNX file nor a folder"):
        load(tmp_path / "pipe.onnx")
    with pytest.raises(UserError, match="exported OpenVINO models are called model.xml"):
        load(tmp_path / "annotations.xml")
    with pytest.raises(UserError, match=r"z.onnx: not exported by mvision"):
        ExportedModel(tmp_path / "z.onnx")

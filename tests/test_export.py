"""Exported models give what PyTorch gives, and can be used wherever weights can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvision import UserError, load
from mvision.commands.export import export
from mvision.commands.predict import predict_job
from mvision.commands.val import validate
from mvision.deploy import compare
from mvision.deploy.compare import difference
from mvision.deploy.exported import ExportedModel, is_exported
from mvision.inference.predict import predict_images
from mvision.weights import save_weights
from tests.test_joint import TASKS, make_model

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model whose norms have statistics."""
    model = make_model([*TASKS, "semantic-seg"], **{"semantic-seg": {"pyramid_dim": 16, "embed_dim": 32}})
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_weights(model.eval(), path)
    return path


@pytest.fixture(scope="module")
def onnx(weights: Path) -> Path:
    messages: list[str] = []
    export(str(weights), dynamic_size=True, log=messages.append)
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


@pytest.mark.parametrize("task", [*TASKS, "semantic-seg"])
def test_openvino_of_every_task(weights: Path, tmp_path: Path, task: str) -> None:
    pytest.importorskip("openvino")
    messages: list[str] = []
    export(str(weights), format="openvino", tasks=[task], output=tmp_path / "made", log=messages.append)
    assert messages[-1] == f"openvino: {tmp_path / 'made'}"
    model = ExportedModel(tmp_path / "made")
    assert model.tasks == [task]
    assert is_exported(tmp_path / "made")
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert difference(load(weights, tasks=[task])(images), model(images))[0] < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_exports_find_what_the_weights_find(onnx: Path, weights: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    (found,) = predict_images(ExportedModel(onnx), [picture], 0.0)
    (expected,) = load(weights).predict([picture], 0.0)
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


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x.onnx: ONNX Runtime cannot read it"):
        ExportedModel(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="no such file"):
        ExportedModel(tmp_path / "y.onnx")
    program = torch.onnx.export(torch.nn.ReLU().eval(), (torch.zeros(1),), dynamo=True, verbose=False)
    program.save(str(tmp_path / "z.onnx"))
    with pytest.raises(UserError, match=r"z.onnx: not exported by mvision"):
        ExportedModel(tmp_path / "z.onnx")

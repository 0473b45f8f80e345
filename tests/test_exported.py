"""An exported model is used like a ``Model``, whatever runs its graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mvision import Model, UserError
from mvision.deploy import exported
from mvision.deploy.exported import ExportedModel, export_path, is_exported
from mvision.deploy.sessions import Description, Session, open_session
from mvision.inference.predict import predict_images
from mvision.weights import init_from, save_weights
from tests.test_joint import TASKS, make_model

ALL = [*TASKS, "semantic-seg"]


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(ALL).eval()


@pytest.fixture(autouse=True)
def opened(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path is an export of the model, whose graph PyTorch runs."""
    outputs = model(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    names = [(task, name) for task in outputs for name in outputs[task]]

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            values = model(torch.from_numpy(images))
        return [values[task][name].numpy() for task, name in names]

    shapes = {f"{task}.{name}": (None, *outputs[task][name].shape[1:]) for task, name in names}
    session = Session(Description(model.config.model_copy(deep=True)), shapes, (None, 3, 64, 96), run, "PyTorch")
    monkeypatch.setattr(exported, "_open", lambda *_: session)
    monkeypatch.setattr(exported, "export_files", lambda path: [])


@pytest.mark.parametrize("tasks", [None, ["keypoints"], ["semantic-seg", "detection"]])
def test_an_exported_model_runs_the_tasks_that_are_asked_for(tasks: list[str] | None, model: Model) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    found = ExportedModel("x.onnx", tasks)
    assert found.tasks == (tasks or ALL)
    with torch.no_grad():
        expected, outputs = model(images), found(images)
    assert set(outputs) == set(tasks or ALL)
    assert ExportedModel("x.onnx", "keypoints").tasks == ["keypoints"]
    for task, values in outputs.items():
        for name, value in values.items():
            torch.testing.assert_close(value, expected[task][name])
    assert [found.evaluators(task) for task in found.tasks if task in ("keypoints", "semantic-seg")] == [
        model.evaluators(task) for task in found.tasks if task in ("keypoints", "semantic-seg")
    ]


def test_results_are_those_of_the_model(model: Model) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    (found,) = predict_images(ExportedModel("x.onnx"), [picture], 0.0)
    (expected,) = model.predict([picture], 0.0, precision="fp32")
    assert len(found) == len(expected) > 0
    for name in ("boxes", "scores", "labels", "keypoints"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_wrong_tasks_and_images() -> None:
    with pytest.raises(UserError, match="x.onnx: there is no head 'depth', only detection, instance-seg"):
        ExportedModel("x.onnx", ["depth"])
    with pytest.raises(UserError, match="takes uint8 images, not torch.float32"):
        ExportedModel("x.onnx")(torch.zeros(1, 3, 64, 96))


def test_paths_of_exports(tmp_path: Path) -> None:
    weights = tmp_path / "best.safetensors"
    assert export_path(weights, "onnx") == tmp_path / "best.onnx"
    assert export_path(weights, "openvino_int8") == tmp_path / "best_openvino_int8"
    assert is_exported("a/b.ONNX")
    assert is_exported(tmp_path / "model.xml")
    assert not is_exported(tmp_path)
    (tmp_path / "model.xml").touch()
    assert is_exported(tmp_path)
    assert not is_exported(weights)


@pytest.mark.parametrize(
    "xml", ["", "<?xml?>", "<net", "<net/>", "<html/>", '<?xml version="1.0" encoding="no"?><net/>']
)
def test_a_damaged_description_of_openvino_is_one_line(
    xml: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """OpenVINO would try its readers of other formats, which print on stderr."""
    (tmp_path / "model.xml").write_text(xml, encoding="utf-8")
    with pytest.raises(UserError, match=f"weights {tmp_path}: model.xml is "):
        open_session(tmp_path, "fp32")
    assert capfd.readouterr().err == ""


def test_what_an_exported_model_cannot_do_is_said(model: Model, tmp_path: Path) -> None:
    found = ExportedModel("x.onnx")
    for attempt in (
        found.fuse,
        found.train,
        lambda: found.loss({}, []),
        lambda: found(torch.zeros(1, 3, 64, 96), []),
        lambda: found.features(torch.zeros(1, 3, 64, 96)),
        lambda: found.half(),
        lambda: found.to("meta"),
        lambda: save_weights(found, tmp_path / "a.safetensors"),
        lambda: init_from(found, tmp_path),
    ):
        with pytest.raises(UserError, match="x.onnx: an exported model only predicts|weights .*"):
            attempt()
    assert found.eval() is found
    assert found.to("cpu") is found.float() is found
    assert not list(tmp_path.iterdir())


def test_predictions_have_all_options_of_a_model(model: Model) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    options = {"multi_label": True, "nms": 0.5, "threshold": {"dog": 0.0, "*": 0.01}}
    (found,) = ExportedModel("x.onnx").predict(picture, **options)
    (expected,) = model.predict(picture, **options, precision="fp32")
    assert len(found) == len(expected) > 0
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_a_forked_process_is_told_to_open_the_export_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ExportedModel("x.onnx")
    monkeypatch.setattr(exported.os, "getpid", lambda: -1)
    with pytest.raises(UserError, match="x.onnx: was opened in another process"):
        found(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))

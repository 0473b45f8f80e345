"""Which runtime a model is opened in, and in which precision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mvision import UserError, load
from mvision.config import ModelConfig
from mvision.deploy import exported, runtimes
from mvision.deploy.runtimes import open_fastest
from mvision.deploy.sessions import Description
from mvision.fast.prepare import prepare
from mvision.model import Model
from mvision.weights import save_weights
from mvision.weights.stored import digest
from tests.test_joint import TASKS, make_model

CPU = torch.device("cpu")


class Opened:
    """Takes the place of ``ExportedModel`` and keeps its arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.config = ModelConfig(image_size=(64, 96))


@pytest.fixture(scope="module")
def model() -> Model:
    """Detection and instance segmentation, with norms that have statistics."""
    made = make_model(TASKS[:2])
    with torch.no_grad():
        made.train()(torch.rand(4, 3, 64, 96))
    return made.eval()


@pytest.fixture
def run(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with weights of two tasks and an OpenVINO export of the first, which is not opened really."""
    save_weights(model, tmp_path / "best.safetensors")
    (tmp_path / "best_openvino").mkdir()
    (tmp_path / "best_openvino" / "model.xml").touch()
    monkeypatch.setattr(runtimes, "ExportedModel", Opened)
    describe(monkeypatch, tmp_path)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: name)
    has_bf16(monkeypatch, False)
    return tmp_path


def describe(monkeypatch: pytest.MonkeyPatch, run: Path, size: tuple[int, int] = (64, 96), **changes: str) -> None:
    """What the export in the run says of itself: by default that it was made from the run's weights, for one task."""
    config = make_model(TASKS[:1]).config
    config.image_size = size
    description = Description(config, **{"weights": digest(run / "best.safetensors"), **changes})
    monkeypatch.setattr(runtimes, "exported_description", lambda path: description)


def has_bf16(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    """A processor that computes in bf16, or not. What needs its instructions, packed weights, is left out."""
    monkeypatch.setattr("mvision.machine.cpu_has_bf16", lambda: value)
    monkeypatch.setattr("mvision.machine.bf16_is_faster", lambda: True)
    if value:
        monkeypatch.setattr("mvision.fast.prepare.has_packed_convolutions", lambda: False)


def test_an_export_of_the_weights_with_the_tasks_is_taken(run: Path) -> None:
    path = run / "best_openvino"
    opened, line = open_fastest(str(run), [TASKS[0]], CPU, "fp32")
    assert isinstance(opened, Opened)
    assert opened.arguments == (path, [TASKS[0]], "fp32")
    assert line == f"OpenVINO on cpu in fp32, image size 64x96: {path}"


@pytest.mark.parametrize(
    ("file", "tasks"), [("", []), ("", [TASKS[1]]), ("best.safetensors", [TASKS[0]])], ids=["all", "other", "file"]
)
def test_an_export_without_the_tasks_or_beside_a_named_file_is_not_taken(run: Path, file: str, tasks: list) -> None:
    opened, line = open_fastest(str(run / file), tasks, CPU, "fp32")
    assert isinstance(opened, Model)
    assert opened.tasks == (tasks or TASKS[:2])
    assert line.startswith("PyTorch on cpu in fp32")
    assert ("faster after mvision export" in line) == (not file)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "0" * 64}, "it was made from other weights than the run has now"),
        ({"weights": ""}, "an older version wrote it, which did not store from which weights"),
        ({"size": (32, 96)}, "it was made for images of 32x96, and the run is for 64x96"),
        ({"precision": "int8"}, "its weights are in int8"),
    ],
)
def test_an_export_of_something_else_is_not_taken_and_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, reason: str
) -> None:
    describe(monkeypatch, run, **changes)
    opened, line = open_fastest(str(run), [TASKS[0]], CPU, "fp32")
    assert isinstance(opened, Model)
    assert line == (
        f"PyTorch on cpu in fp32, image size 64x96; best_openvino is not used: {reason}; "
        f"faster after mvision export --weights {run} --format openvino"
    )


def test_newer_weights_are_noticed_whatever_the_clock_says(run: Path) -> None:
    assert isinstance(open_fastest(str(run), [TASKS[0]], CPU, "fp32")[0], Opened)
    age = (run / "best_openvino").stat().st_mtime - 100
    save_weights(make_model(TASKS[:2]), run / "best.safetensors")  # other statistics of norms
    os.utime(run / "best.safetensors", (age, age))
    assert isinstance(open_fastest(str(run), [TASKS[0]], CPU, "fp32")[0], Model)


def test_a_damaged_export_does_not_keep_the_weights_from_being_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "exported_description", exported.exported_description)
    opened, line = open_fastest(str(run), [TASKS[0]], CPU, "fp32")
    assert isinstance(opened, Model)
    assert "best_openvino is not used: weights" in line
    assert "model.xml is damaged" in line


def test_without_openvino_the_export_is_not_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert isinstance(open_fastest(str(run), [TASKS[0]], CPU, "fp32")[0], Model)


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_is_bf16_where_the_cpu_has_it(bf16: bool, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_bf16(monkeypatch, bf16)
    opened, line = open_fastest(str(run / "best.safetensors"), [], CPU)
    assert isinstance(opened, Model)
    assert next(opened.parameters()).dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert line == f"PyTorch on cpu in {'bf16' if bf16 else 'fp32'}, image size 64x96"
    exported, line = open_fastest(str(run / "best_openvino"), [], CPU)
    assert isinstance(exported, Opened)
    assert exported.arguments[2] == ("bf16" if bf16 else "fp32")
    onnx, line = open_fastest("model.onnx", [], CPU)
    assert isinstance(onnx, Opened)
    assert onnx.arguments == (Path("model.onnx"), None)  # fp32, its default
    assert line == "ONNX Runtime on cpu in fp32, image size 64x96: model.onnx"


def test_precisions_that_a_runtime_lacks(run: Path) -> None:
    for source in ("best.safetensors", "best_openvino"):
        with pytest.raises(UserError, match="--precision bf16: this CPU does not compute in bf16"):
            open_fastest(str(run / source), [], CPU, "bf16")
        with pytest.raises(UserError, match="--precision fp16: CPUs do not compute in fp16"):
            open_fastest(str(run / source), [], CPU, "fp16")
    for precision in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"--precision {precision}: ONNX Runtime has fp32 only"):
            open_fastest("model.onnx", [], CPU, precision)


def test_weights_in_bf16_leave_coordinates_in_float32(run: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    weights = str(run / "best.safetensors")
    with torch.no_grad():
        expected, found = load(weights)(images)[TASKS[0]], prepare(load(weights), "bf16")(images)[TASKS[0]]
    assert found["boxes"].dtype == torch.float32
    # With random weights many queries have nearly equal scores, and rounding reorders them; the best score stays.
    first, second = (outputs["logits"].float().sigmoid().amax((1, 2)) for outputs in (expected, found))
    assert 0 < (first - second).abs().max() < 0.02

"""``mvision export``: what it checks, where it writes, and what is left after a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mvision import Model, UserError
from mvision.commands import export as command
from mvision.commands.export import export
from mvision.deploy import export as deploy
from mvision.deploy.export import compare_with_pytorch
from mvision.weights import save_weights
from tests.test_joint import make_model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(["detection", "semantic-seg"]).eval()


@pytest.fixture
def weights(model: Model, tmp_path: Path) -> Path:
    save_weights(model, tmp_path / "best.safetensors")
    return tmp_path / "best.safetensors"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Nothing is really exported: a text stands for the file, and the arguments of each call are kept."""
    calls: list[dict] = []

    def write_export(model: Model, path: Path, format: str, dynamic_size: bool) -> None:
        calls.append({"size": model.config.image_size, "tasks": model.tasks, "format": format, "dynamic": dynamic_size})
        if format == "openvino":
            path.mkdir()
            (path / "model.xml").write_text("new")
        else:
            path.write_text("new")
            path.with_name(f"{path.name}.data").write_text("weights")

    monkeypatch.setattr(command, "write_export", write_export)
    monkeypatch.setattr(command, "compare_with_pytorch", lambda *_: ["a line"])
    monkeypatch.setattr(command, "require", lambda *_: None)
    return calls


def test_onnx_lies_beside_the_weights_with_its_second_file(weights: Path, fake: list[dict]) -> None:
    messages: list[str] = []
    export(str(weights), image_size=(96, 128), tasks=["semantic-seg"], dynamic_size=True, log=messages.append)
    assert fake == [{"size": (96, 128), "tasks": ["semantic-seg"], "format": "onnx", "dynamic": True}]
    assert messages == ["a line", f"onnx: {weights.with_name('best.onnx')}"]
    assert {path.name for path in weights.parent.iterdir()} == {"best.safetensors", "best.onnx", "best.onnx.data"}


def test_an_openvino_export_replaces_an_older_one(weights: Path, fake: list[dict]) -> None:
    target = weights.with_name("best_openvino")
    target.mkdir()
    (target / "model.xml").write_text("old")
    (target / "stale").write_text("old")
    export(str(weights.parent), format="openvino", log=lambda line: None)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("model.xml", "new")]


def test_folders_of_something_else_are_not_replaced(weights: Path, fake: list[dict]) -> None:
    photos = weights.with_name("photos")
    photos.mkdir()
    (photos / "1.jpg").write_text("precious")
    with pytest.raises(UserError, match="--output .*photos: a folder that holds something else; choose another"):
        export(str(weights), format="openvino", output=photos)
    assert (photos / "1.jpg").read_text() == "precious"


def test_an_export_that_differs_leaves_nothing(
    weights: Path, fake: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the export differs")

    monkeypatch.setattr(command, "compare_with_pytorch", refuse)
    weights.with_name("best.onnx").write_text("old")
    for format in ("onnx", "openvino"):
        with pytest.raises(UserError, match="the export differs"):
            export(str(weights), format=format)
    assert {path.name for path in weights.parent.iterdir()} == {"best.safetensors", "best.onnx"}
    assert weights.with_name("best.onnx").read_text() == "old"


def test_int8_is_logged_and_named_in_the_path(weights: Path, fake: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    result = command.Quantised("backbone", {"detection": 0.5}, {"detection": 0.4})

    def quantise(path: Path, data: str | None, log: Callable[[str], None]) -> command.Quantised:
        assert data == "my_data"
        (path / "model.xml").write_text("int8")
        return result

    monkeypatch.setattr(command, "quantise", quantise)
    messages: list[str] = []
    found = export(str(weights), format="openvino", int8=True, data="my_data", log=messages.append)
    assert found is result
    assert messages[1:] == ["kept: backbone", f"openvino: {weights.with_name('best_openvino_int8')}"]
    assert (weights.with_name("best_openvino_int8") / "model.xml").read_text() == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": True}, "--int8 with --format onnx: INT8 is available for openvino only"),
        ({"format": "onx"}, "--format onx: did you mean 'onnx'"),
        ({"tasks": ["keypoint"]}, "there is no head 'keypoint'"),
        ({"image_size": (100, 100)}, "image_size.*multiples of 32"),
        ({"output": Path("/dev/null/x.onnx")}, "--output /dev/null/x.onnx: cannot be written"),
    ],
)
def test_bad_options(weights: Path, fake: list[dict], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(str(weights), **options)
    assert len(list(weights.parent.iterdir())) == 1


class _Shifted(nn.Module):
    """The outputs of a model, except for one that differs for batches of four."""

    def __init__(self, model: Model, shift: float) -> None:
        super().__init__()
        self.model, self.shift, self.shapes = model, shift, []

    def forward(self, images: torch.Tensor) -> dict:
        self.shapes.append(tuple(images.shape))
        outputs = {task: dict(values) for task, values in self.model(images).items()}
        if len(images) == 4:
            outputs["detection"]["boxes"] = outputs["detection"]["boxes"] + self.shift
        return outputs


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (0.005, False), (0.02, True), (float("nan"), True)])
def test_an_export_is_compared_on_every_shape(
    shift: float, refused: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = _Shifted(model, shift)
    monkeypatch.setattr(deploy, "ExportedModel", lambda path: exported)
    if refused:
        with pytest.raises(UserError, match="the export differs: batch 4, 96 x 64: .*nothing was written"):
            compare_with_pytorch(model, Path("x.onnx"))
        return
    lines = compare_with_pytorch(model, Path("x.onnx"), dynamic_size=True)
    assert exported.shapes == [(1, 3, 64, 96), (1, 3, 96, 64), (4, 3, 64, 96), (4, 3, 96, 64)]
    assert [line.partition(":")[0] for line in lines] == [
        "batch 1, 96 x 64",
        "batch 1, 64 x 96",
        "batch 4, 96 x 64",
        "batch 4, 64 x 96",
    ]

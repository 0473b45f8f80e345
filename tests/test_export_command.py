"""``mvision export``: what it checks, where it writes, and what is left after a failure."""

from __future__ import annotations

import hashlib
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
from mvision.deploy.output import data_name
from mvision.weights import save_weights
from tests.test_joint import make_model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(["detection", "semantic-seg"]).eval()


@pytest.fixture
def weights(model: Model, tmp_path: Path) -> Path:
    save_weights(model, tmp_path / "best.safetensors")
    return tmp_path / "best.safetensors"


def write_onnx(path: Path, text: str, ours: bool = True, data: str | None = None) -> None:
    """An ONNX file that says so, with nothing in it; ``data`` is the file in which it has its weights."""
    import onnx

    weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    if data is not None:
        weights = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        weights.external_data.add(key="location", value=data)
        path.with_name(data).write_text(f"weights of {text}")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    model = onnx.helper.make_model(graph, producer_name=text)
    if ours:
        model.metadata_props.add(key="mvision", value="{}")
    path.write_bytes(model.SerializeToString())


def text_of(path: Path) -> str:
    import onnx

    return onnx.load(path, load_external_data=False).producer_name


def write_folder(path: Path, text: str, ours: bool = True) -> None:
    """The two files of an OpenVINO export."""
    path.mkdir()
    described = '<rt_info><mvision value="{}" /></rt_info>' if ours else ""
    (path / "model.xml").write_text(f"<net>{described}<text>{text}</text></net>")
    (path / "model.bin").write_text(text)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Nothing is really exported: almost empty files stand for it, and the arguments of each call are kept."""
    calls: list[dict] = []

    def write_export(
        model: Model, path: Path, format: str, dynamic_size: bool, weights: str, opset: int | None
    ) -> None:
        calls.append({"size": model.config.image_size, "tasks": model.tasks, "format": format, "dynamic": dynamic_size})
        calls[-1] |= {"weights": weights, "opset": opset}
        if format == "openvino":
            write_folder(path, "new")
        else:
            write_onnx(path, "new", data=data_name(path))

    monkeypatch.setattr(command, "write_export", write_export)
    monkeypatch.setattr(command, "compare_with_pytorch", lambda *_: ["a line"])
    monkeypatch.setattr(command, "require", lambda *_: None)
    return calls


def test_onnx_lies_beside_the_weights_with_its_second_file(weights: Path, fake: list[dict]) -> None:
    messages: list[str] = []
    options = {"image_size": (96, 128), "tasks": ["semantic-seg"], "dynamic_size": True, "opset": 17}
    export(str(weights), **options, log=messages.append)
    assert fake == [
        {
            "size": (96, 128),
            "tasks": ["semantic-seg"],
            "format": "onnx",
            "dynamic": True,
            "opset": 17,
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
    ]
    second, first, _ = sorted(weights.parent.iterdir(), key=lambda path: path.suffix)
    assert (first.name, second.name[:10], second.suffix) == ("best.onnx", "best.onnx.", ".data")
    assert messages == ["a line", f"onnx: {first}, {second}"]


@pytest.mark.parametrize("old_data", ["best.onnx.data", "best.onnx.0123abcd.data"])
def test_an_onnx_export_replaces_an_older_one_with_its_second_file(
    weights: Path, fake: list[dict], old_data: str
) -> None:
    target = weights.with_name("best.onnx")
    write_onnx(target, "old", data=old_data)
    weights.with_name("best.onnx.csv.data").write_text("of the user")
    export(str(weights), log=lambda line: None)
    assert text_of(target) == "new"
    data = {path.name for path in weights.parent.glob("*.data")}
    assert len(data) == 2
    assert "best.onnx.csv.data" in data
    assert old_data not in data


def test_a_second_file_of_something_else_stays(weights: Path, fake: list[dict]) -> None:
    weights.with_name("best.onnx.data").write_text("of the user")
    export(str(weights), log=lambda line: None)
    assert weights.with_name("best.onnx.data").read_text() == "of the user"


def test_a_missing_ending_is_added(weights: Path, fake: list[dict], tmp_path: Path) -> None:
    for output, expected in (("model", "model.onnx"), ("v1.2", "v1.2.onnx"), ("Big.ONNX", "Big.ONNX")):
        export(str(weights), output=tmp_path / "out" / output, log=lambda line: None)
        assert (tmp_path / "out" / expected).is_file()


@pytest.mark.parametrize("earlier", [None, "ours", "empty"])
def test_an_openvino_export_replaces_an_older_one(weights: Path, fake: list[dict], earlier: str | None) -> None:
    target = weights.with_name("best_openvino")
    if earlier == "ours":
        write_folder(target, "old")
    elif earlier == "empty":
        target.mkdir()
    export(str(weights.parent), format="openvino", log=lambda line: None)
    assert sorted(path.name for path in target.iterdir()) == ["model.bin", "model.xml"]
    assert (target / "model.bin").read_text() == "new"
    assert sorted(path.name for path in weights.parent.iterdir()) == ["best.safetensors", "best_openvino"]


def _with_another_file(folder: Path) -> None:
    write_folder(folder, "old")
    (folder / "notes.txt").write_text("mine")


def _of_another_program(folder: Path) -> None:
    write_folder(folder, "old", ours=False)


def _damaged(folder: Path) -> None:
    write_folder(folder, "old")
    (folder / "model.xml").write_text("<net><rt_info>mvision")


def _a_run(folder: Path) -> None:
    write_folder(folder, "old")
    (folder / "last").mkdir()
    (folder / "last" / "model.safetensors").write_text("weights")


def _photos(folder: Path) -> None:
    folder.mkdir()
    (folder / "1.jpg").write_text("precious")


def _a_file(folder: Path) -> None:
    folder.write_text("mine")


@pytest.mark.parametrize("make", [_with_another_file, _of_another_program, _damaged, _a_run, _photos, _a_file])
def test_a_folder_that_is_not_exactly_an_export_is_never_replaced(
    weights: Path, fake: list[dict], make: Callable[[Path], None]
) -> None:
    target = weights.with_name("target")
    make(target)
    before = content(weights.parent)
    with pytest.raises(UserError, match=r"--output .*target: .*choose another"):
        export(str(weights), format="openvino", output=target)
    assert content(weights.parent) == before
    assert fake == []  # refused before the work, not after it


def test_the_folder_of_the_weights_is_not_replaced(
    weights: Path, fake: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(weights.parent)
    monkeypatch.chdir(weights.parent)
    for output in (weights.parent, Path(), Path(".."), weights.parent / ".." / weights.parent.name):
        for format in ("openvino", "onnx"):
            with pytest.raises(UserError, match="--output "):
                export(str(weights), format=format, output=output)
    assert content(weights.parent) == before


@pytest.mark.parametrize("kind", ["text", "other", "folder", "nowhere", "weights"])
def test_a_file_that_is_no_export_is_never_replaced(weights: Path, fake: list[dict], kind: str) -> None:
    target = weights.with_name("x.onnx")
    if kind == "text":
        target.write_text("mine")
    elif kind == "other":
        write_onnx(target, "of another program", ours=False)
    elif kind == "folder":
        target.mkdir()
    elif kind == "nowhere":
        target.symlink_to(weights.with_name("nothing"))
    before = content(weights.parent)
    with pytest.raises(UserError, match="--output "):
        export(str(weights), output=weights if kind == "weights" else target)
    assert content(weights.parent) == before
    assert fake == []


def test_what_appears_at_the_target_meanwhile_stays(
    weights: Path, fake: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = weights.with_name("target")

    def compare(*_: object) -> list[str]:
        _photos(target)
        return []

    monkeypatch.setattr(command, "compare_with_pytorch", compare)
    with pytest.raises(UserError, match="target: this folder holds something else"):
        export(str(weights), format="openvino", output=target)
    assert (target / "1.jpg").read_text() == "precious"


def test_an_export_that_differs_leaves_nothing(
    weights: Path, fake: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the export differs")

    monkeypatch.setattr(command, "compare_with_pytorch", refuse)
    write_onnx(weights.with_name("best.onnx"), "old")
    for format in ("onnx", "openvino"):
        with pytest.raises(UserError, match="the export differs"):
            export(str(weights), format=format)
    assert {path.name for path in weights.parent.iterdir()} == {"best.safetensors", "best.onnx"}
    assert text_of(weights.with_name("best.onnx")) == "old"


def test_int8_is_logged_and_named_in_the_path(weights: Path, fake: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    result = command.Quantised("backbone", {"detection": 0.5}, {"detection": 0.4})

    def quantise(path: Path, data: str | None, log: Callable[[str], None], output: Path) -> command.Quantised:
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
        ({"output": Path("x.pt")}, "--output x.pt: an ONNX file ends in .onnx"),
        ({"output": Path("x.onnx"), "format": "openvino"}, "--output x.onnx: an OpenVINO export is a folder"),
        ({"opset": 16}, "--opset 16: 17 is the lowest"),
        ({"opset": 18, "format": "openvino"}, "--opset 18 with --format openvino: opsets are versions of ONNX"),
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

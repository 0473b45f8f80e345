"""Files for phones: what they tell about themselves, what they refuse, and that they give what PyTorch gives."""

from __future__ import annotations

import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvision import UserError, load
from mvision.cli.main import cli
from mvision.commands.export import export
from mvision.commands.info import info_text
from mvision.commands.predict import predict_job
from mvision.deploy import mobile, mobile_export, sessions
from mvision.deploy.compare import difference
from mvision.deploy.exported import ExportedModel, export_path, is_exported
from mvision.deploy.formats import ENDINGS, FORMATS, MOBILE, NAMES, PACKAGES
from mvision.deploy.mobile import MEMBER, Graph, append_description, read_description
from mvision.deploy.runtimes import open_fastest
from mvision.deploy.tracing import SimpleOutputs
from mvision.weights import save_weights
from tests.decoder_inputs import DFINE
from tests.test_joint import TASKS, make_model

ALL = [*TASKS, "semantic-seg"]
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
TOLERANCE = 1e-4  # of probabilities and coordinates in 0..1


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model of all tasks, with D-FINE's decoder for masks, whose norms have statistics."""
    model = make_model(ALL, **{"semantic-seg": {"pyramid_dim": 16, "embed_dim": 32}, "instance-seg": DFINE})
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_weights(model.eval(), path)
    return path


@pytest.fixture(params=MOBILE)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stood_in(weights: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """No converter, no runtime: the file's graph is a word, and PyTorch computes for one image what it stands for."""
    from mvision.commands import export as command

    traced: list[SimpleOutputs] = []

    def convert(model: SimpleOutputs, images: torch.Tensor) -> bytes:
        assert images.shape == (1, 3, 64, 96)
        traced.append(model)
        return b"the graph"

    def open_graph(path: Path) -> Graph:
        def run(image: np.ndarray) -> list[np.ndarray]:
            assert image.shape == (1, 3, 64, 96)
            with torch.no_grad():
                return [value.numpy() for value in traced[0](torch.from_numpy(image))]

        shapes = [value.shape for value in run(np.zeros((1, 3, 64, 96), np.uint8))]
        return Graph(shapes, (1, 3, 64, 96), run)

    monkeypatch.setattr(mobile_export, f"_{form}", convert)
    monkeypatch.setattr(sessions, "open_graph", open_graph)
    monkeypatch.setattr(sessions, "require", lambda *_: None)
    monkeypatch.setattr(command, "require", lambda *_: None)
    return form


def made(weights: Path, form: str, folder: Path, **options: Any) -> Path:
    path = folder / f"made{ENDINGS[form]}"
    export(str(weights), format=form, output=path, log=lambda line: None, **options)
    return path


def same(path: Path, weights: Path, batch: int = 3) -> float:
    images = torch.randint(0, 256, (batch, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = load(weights)(images), ExportedModel(path)(images)
    assert {task: sorted(of) for task, of in found.items()} == {task: sorted(of) for task, of in expected.items()}
    return difference(expected, found)[0]


def test_every_format_has_its_words() -> None:
    assert set(PACKAGES) == set(NAMES) == set(FORMATS)
    assert set(ENDINGS) == set(FORMATS) - {"openvino"}
    for form in MOBILE:
        assert is_exported(f"a/b{ENDINGS[form].upper()}")
        assert export_path(Path("a/best.safetensors"), form) == Path(f"a/best{ENDINGS[form]}")


def test_a_file_has_all_that_prediction_needs(weights: Path, stood_in: str, tmp_path: Path) -> None:
    lines: list[str] = []
    export(str(weights), format=stood_in, output=tmp_path / "made", log=lines.append)
    path = tmp_path / f"made{ENDINGS[stood_in]}"
    assert lines[-1] == f"{stood_in}: {path}"
    assert [line.partition(":")[0] for line in lines[:-1]] == ["batch 1, 96 x 64", "batch 4, 96 x 64"]
    assert path.read_bytes().startswith(b"the graph")
    assert same(path, weights) < 1e-6
    model, line = open_fastest(str(path), ["detection"], torch.device("cpu"))
    assert line == f"{NAMES[stood_in]} on cpu in fp32, image size 64x96: {path}"
    assert model.tasks == ["detection"]
    assert model.categories == load(weights).categories
    assert NAMES[stood_in] in info_text(weights=str(path))
    with pytest.raises(UserError, match=rf"--precision bf16: {NAMES[stood_in]} has fp32 only on a CPU"):
        open_fastest(str(path), [], torch.device("cpu"), "bf16")
    before = path.read_bytes()
    export(str(weights), format=stood_in, output=path, log=lines.append)  # an earlier export is replaced
    assert path.read_bytes() == before, "the same weights give the same file"
    assert list(tmp_path.iterdir()) == [path]


def test_one_image_size_alone(weights: Path, stood_in: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--dynamic-size with --format {stood_in}: .* files have one size; --image"):
        made(weights, stood_in, tmp_path, dynamic_size=True)
    path = made(weights, stood_in, tmp_path)
    with pytest.raises(UserError, match="takes images of shape 3x64x96 alone, not 3x96x64"):
        ExportedModel(path)(torch.zeros(1, 3, 96, 64, dtype=torch.uint8))
    assert ExportedModel(path)(torch.zeros(0, 3, 64, 96, dtype=torch.uint8))["detection"]["boxes"].shape == (0, 10, 4)


@pytest.mark.parametrize("form", ["executorch"], indirect=True)
@pytest.mark.parametrize("what", ["a byte of the graph", "no archive", "compressed", "other outputs", "no checksum"])
def test_damaged_and_foreign_files(weights: Path, stood_in: str, tmp_path: Path, what: str) -> None:
    path = made(weights, stood_in, tmp_path)
    described = json.loads(read_description(path) or "")
    path.write_bytes(b"thE graph" if what == "a byte of the graph" else b"the graph")
    message = "not exported by mvision"
    if what == "a byte of the graph":
        message = "this file is damaged .its graph has another checksum.; export it again"
    if what == "other outputs":
        described["outputs"].pop()
        message = "its graph is another one than in its description"
    if what == "no checksum":
        del described["bytes"]
        message = "this file is damaged"
    if what == "other outputs":
        append_description(path, described)
    elif what != "no archive":
        with zipfile.ZipFile(
            path, "a", zipfile.ZIP_DEFLATED if what == "compressed" else zipfile.ZIP_STORED
        ) as archive:
            archive.writestr(MEMBER, json.dumps(described))
    with pytest.raises(UserError, match=rf"weights .*made.*: {message}"):
        load(path)


def test_what_is_no_export_is_not_replaced(weights: Path, stood_in: str, tmp_path: Path) -> None:
    path = tmp_path / f"made{ENDINGS[stood_in]}"
    path.write_bytes(b"of another program")
    for output, message in (
        (path, "is there already and no export of mvision"),
        (tmp_path / "x.onnx", rf"an? {NAMES[stood_in]} file ends in {ENDINGS[stood_in]}"),
        (tmp_path, "is a folder; give a file, such as"),
    ):
        with pytest.raises(UserError, match=message):
            export(str(weights), format=stood_in, output=output, log=lambda line: None)
    assert path.read_bytes() == b"of another program"


def test_a_model_that_the_format_cannot_carry(
    weights: Path, stood_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: nn.Module, images: torch.Tensor) -> bytes:
        raise RuntimeError("no operator roll\nand more lines")

    monkeypatch.setattr(mobile_export, f"_{stood_in}", refuse)
    with pytest.raises(UserError) as raised:
        made(weights, stood_in, tmp_path, tasks=["keypoints"])
    assert str(raised.value) == (
        f"--format {stood_in}: {NAMES[stood_in]} cannot carry keypoints of this model (no operator roll); nothing was "
        "written, --format onnx carries every task"
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(
    weights: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None)
    package = PACKAGES[form][0].replace("_", "-")
    with pytest.raises(UserError, match=rf"the package {package} is missing: pip install {package} .mvision's extra"):
        made(weights, form, tmp_path)
    assert not list(tmp_path.iterdir())


class _Kinds(nn.Module):
    """What files for phones write in other operators."""

    def forward(self, images: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        one = images[..., :1]
        values, index = images.max(-1)
        kept, again = torch.max(images, dim=1, keepdim=True)
        outputs = (values, index, kept, again, images.max(), images.max(images), one.argmax(-1), one.max(3, True)[1])
        outputs = (*outputs, images.square(), images.topk(2, -1).values, *torch.topk(images, 2, dim=2))
        return {"t": dict(zip("abcdefghijkl", outputs))}


def test_operators_that_converters_lack_are_written_in_others() -> None:
    """With the same results: maxima with their indices, squares, and the values of ``topk``."""
    names = [("t", name) for name in "abcdefghijkl"]
    images = torch.rand(1, 3, 4, 5)
    program = torch.export.export(SimpleOutputs(_Kinds(), names), (images,), strict=False)  # type: ignore[arg-type]
    operators = [str(node.target) for node in program.graph.nodes]
    assert not any("max.dim" in operator or "pow" in operator or "square" in operator for operator in operators)
    assert sum("argmax" in operator for operator in operators) == 2, "none for a single value"
    assert sum("gather" in operator for operator in operators) == 2, "values by their indices"
    for found, expected in zip(program.module()(images), _Kinds()(images)["t"].values()):
        assert torch.equal(found, expected)


def test_the_page_on_deployment(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands parse, and its code reads the description of a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pte").write_bytes(b"graph")
    append_description(tmp_path / "best.pte", {"outputs": ["a"], "model": {"categories": []}})
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["described"]["outputs"] == ["a"]
    lines = re.findall(r"^mvision (.*)$", PAGE, flags=re.M)
    assert len(lines) == 4
    for line in lines:
        name, *arguments = shlex.split(line)
        command = cli.commands[name]
        command.make_context("mvision", arguments)
    for form in FORMATS:
        assert f"| `{form}` | `best{ENDINGS.get(form, '_openvino/')}` |" in PAGE


def convertible(form: str) -> None:
    for package in PACKAGES[form]:
        pytest.importorskip(package)


@pytest.fixture(scope="module", params=[pytest.param(form, marks=pytest.mark.timeout(1200)) for form in MOBILE])
def real(request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the converter makes it, with all four tasks."""
    convertible(request.param)
    return made(weights, request.param, tmp_path_factory.mktemp("real"))


def test_all_tasks_are_those_of_pytorch(real: Path, weights: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = load(weights)(images), ExportedModel(real)(images)
    assert sorted(found) == sorted(ALL)
    for task in ALL:
        assert difference({task: expected[task]}, {task: found[task]})[0] < TOLERANCE, task


def test_predictions_are_those_of_the_weights(real: Path, weights: Path, squares: Path, tmp_path: Path) -> None:
    picture = str(squares / "images" / "val_0.jpg")
    results = []
    for source, precision in ((real, "auto"), (weights, "fp32")):
        predict_job(
            [picture], weights=str(source), tasks=["detection"], output=tmp_path / source.suffix, threshold=1e-3,
            precision=precision, device="cpu", pictures=False,
        )  # fmt: skip
        results.append(json.loads((tmp_path / source.suffix / "predictions.json").read_text()))
    found, expected = results
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose([x["score"] for x in found], [x["score"] for x in expected], atol=1e-3)


def test_a_graph_that_is_none_is_one_line(real: Path, tmp_path: Path) -> None:
    described = json.loads(read_description(real) or "")
    path = tmp_path / f"broken{real.suffix}"
    path.write_bytes(b"nothing at all, and certainly no graph of any kind" * 10)
    append_description(path, described)
    with pytest.raises(UserError, match=rf"broken{real.suffix}: (ExecuTorch|LiteRT) cannot read it"):
        load(path)
    assert mobile.read_description(path) is not None

"""INT8: candidates are tried in turn, and the best is kept if none is good enough."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mvision import Model, UserError
from mvision.commands.export import export
from mvision.config import parse_model_config
from mvision.deploy import quantise as module
from mvision.deploy.exported import ExportedModel
from mvision.deploy.quantise import CANDIDATES, Quantised, quantise
from mvision.weights import save_weights
from tests.decoder_inputs import DFINE
from tests.test_joint import make_model

NAMES = list(CANDIDATES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model. Quantising writes the candidate's patterns; a model is measured by reading them."""
    made = tmp_path / "openvino"
    made.mkdir()
    (made / "model.xml").write_text("float")

    def write_int8(source: Path, target: Path, images: list, floating: list[str], output: Path) -> None:
        assert (source / "model.xml").read_text() == "float"  # every candidate is made of the original
        target.mkdir()
        (target / "model.xml").write_text(" ".join(floating))

    monkeypatch.setattr(module, "require", lambda *packages: None)
    monkeypatch.setattr(module, "ExportedModel", lambda path, **options: (path / "model.xml").read_text())
    monkeypatch.setattr(module, "_validation", lambda data, model: [])
    monkeypatch.setattr(module, "_calibration_images", lambda data, model: iter([object()]))
    monkeypatch.setattr(module, "_write_int8", write_int8)
    return made


def give(monkeypatch: pytest.MonkeyPatch, before: dict[str, float], *after: dict[str, float]) -> None:
    metrics = {" ".join(floating): values for floating, values in zip(CANDIDATES.values(), after)}
    monkeypatch.setattr(module, "_primary_metrics", lambda model, _: {"float": before, **metrics}[model])


def test_the_first_candidate_that_loses_little_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {"a": 0.5}, {"a": 0.4}, {"a": 0.496}, {"a": 0.6})
    messages: list[str] = []
    result = quantise(folder, None, messages.append, Path("out"))
    assert (result.candidate, result.after) == (NAMES[1], {"a": 0.496})
    assert result.loss == pytest.approx(0.008)
    assert (folder / "model.xml").read_text() == " ".join(CANDIDATES[NAMES[1]])
    assert [line.partition(":")[0] for line in messages] == [f"INT8, {name}" for name in NAMES[:2]]
    assert "a 0.5000 -> 0.4000 (largest loss +20.00%)" in messages[0]


def test_the_least_loss_is_kept_if_all_lose_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {"a": 0.5, "b": 0.8}, {"a": 0.2, "b": 0.8}, {"a": 0.4, "b": 0.7}, {"a": 0.5, "b": 0.5})
    result = quantise(folder, None, lambda line: None, Path("out"))
    assert result.candidate == NAMES[1]  # 20 % of a; the others lose 60 % of a and 37.5 % of b
    assert result.loss == pytest.approx(0.2)
    assert (folder / "model.xml").read_text() == " ".join(CANDIDATES[NAMES[1]])
    assert result.warning == "INT8 lost 20.0% of AP, more than 1%"


def test_no_images_to_calibrate_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {"a": 0.5})
    monkeypatch.setattr(module, "_calibration_images", lambda data, model: iter(()))
    with pytest.raises(UserError, match="--data nothing: no image to calibrate with"):
        quantise(folder, "nothing", lambda line: None, Path("out"))
    assert (folder / "model.xml").read_text() == "float"


@pytest.mark.parametrize(("count", "used"), [(0, 0), (7, 7), (300, 300), (500, 300), (1000, 300)])
def test_the_images_to_calibrate_with_are_from_all_over_the_data(
    count: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = SimpleNamespace(records=list(range(count)))
    model = SimpleNamespace(tasks=["detection"], config=SimpleNamespace(image_size=(64, 64), pixel_range=None))
    monkeypatch.setattr(module, "read_validation", lambda *_: (None, [("", [], split)]))
    monkeypatch.setattr(module, "build_eval_loader", lambda *_, **__: [])
    assert list(module._calibration_images(None, model)) == []  # type: ignore[arg-type]
    assert len(set(split.records)) == len(split.records) == used
    if used:
        assert (split.records[0], split.records[-1]) == (0, count - 1)
        assert np.diff(split.records, prepend=-1).max() <= count // used + 1


def test_a_loss_is_relative_and_the_worst_task_counts() -> None:
    result = Quantised("backbone", {"a": 0.1, "b": 0.8}, {"a": 0.09, "b": 0.8})
    assert result.loss == pytest.approx(0.1)
    assert Quantised("backbone", {"a": 0.5}, {"a": 0.6}).loss == pytest.approx(-0.2)
    assert Quantised("backbone", {"a": 0.5}, {"a": 0.4951}).warning is None


def test_a_model_that_finds_nothing_has_nothing_to_lose() -> None:
    """Untrained weights, or validation images without such objects: a loss of 0 % would say that INT8 is fine."""
    assert "not known" in str(Quantised("backbone", {"a": 0.0, "b": -1.0}, {"a": 0.0, "b": -1.0}).warning)
    assert Quantised("backbone", {"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.5}).warning is None


def test_heads_and_coordinates_stay_in_floating_point(squares: Path, tmp_path: Path) -> None:
    """The real thing: a small model with D-FINE's neck and decoder, calibrated on eight images."""
    for package in ("onnxscript", "openvino", "nncf"):
        pytest.importorskip(package)
    for file in (squares / "annotations").iterdir():  # the classes of the model
        file.write_text(file.read_text().replace('"blue"', '"dog"'))
    described = make_model(["detection"]).config.model_dump(mode="json")
    described["neck"] |= {"fusion_block": "elan", "downsample": "separable", "lateral_act": False}
    described["heads"]["detection"] |= DFINE
    model = Model(parse_model_config(described))
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))
    save_weights(model.eval(), tmp_path / "best.safetensors")
    messages: list[str] = []
    options = {"data": str(squares), "output": tmp_path / "int8", "log": messages.append}
    result = export(str(tmp_path / "best.safetensors"), format="openvino", int8=True, **options)
    assert result is not None
    assert f"kept: {result.candidate}" in messages
    graph = (tmp_path / "int8" / "model.xml").read_text()
    assert graph.count('type="FakeQuantize"') > 20
    assert graph.count('name="precise"') > 10  # coordinates
    exported = ExportedModel(tmp_path / "int8")
    with torch.no_grad():
        outputs = exported(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert outputs["detection"]["boxes"].isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.safetensors", "int8", "squares"]

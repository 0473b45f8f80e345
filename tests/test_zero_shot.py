"""Before its first step, a run from other weights says how well these do already, and trains as it would without."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mvision.engine.train as training
from mvision.config import DataConfig, load_config
from mvision.data import CocoSplit, build_eval_loader, find_layout
from mvision.engine import zero_shot
from mvision.engine.train import train
from mvision.model import Model
from mvision.storage.run_folder import RunFolder
from mvision.weights import load, read_weights, save_weights
from tests.conftest import write_squares
from tests.small_runs import fast_config, run_in_process


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of squares, and a short run on it."""
    folder = tmp_path_factory.mktemp("source")
    data = write_squares(folder / "data", images=5)
    return data, run_in_process(data, folder / "run", train__epochs=2)


def begun(source: tuple[Path, Path], output: Path, init: Path | None = None, **more: Any) -> Path:
    data, run = source
    config = fast_config(data, **{"train__epochs": 1, **more})
    return train(config, output=output, init=str(init or run), device="cpu")


def losses(run: Path) -> list[Any]:
    return [(record["loss"], record.get("metrics")) for record in RunFolder(run).records()]


def lines(capsys: pytest.CaptureFixture[str], word: str = "before training") -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if word in line]


def test_the_figure_is_that_of_the_weights(source, tmp_path, capsys, monkeypatch) -> None:
    found: list[float] = []
    real = zero_shot.evaluate

    def evaluate(*args: Any, **more: Any) -> dict[str, dict[str, float]]:
        figures = real(*args, **more)
        found.append(figures["detection"]["AP"])
        return figures

    monkeypatch.setattr(zero_shot, "evaluate", evaluate)
    begun(source, tmp_path / "run")
    best = max(metrics["detection"]["AP"] for _, metrics in losses(source[1]))
    assert found == [pytest.approx(best)]
    (line,) = lines(capsys)
    text = f"{best:.3f}"
    expected = f"before training: detection AP {text} on 5 validation images (2 of 2 classes from these weights)"
    assert line == expected


def test_the_training_is_the_same_without_it(source, tmp_path, monkeypatch) -> None:
    real = Model.forward

    def forward(self: Model, *args: Any, **more: Any) -> Any:
        if not self.training:  # whatever an evaluation draws
            torch.rand(3), np.random.rand(3), random.random()
        return real(self, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Model, "forward", forward)
        with_it = begun(source, tmp_path / "with")
    monkeypatch.setattr(training, "tell_zero_shot", lambda *_: None)
    without = begun(source, tmp_path / "without")
    assert losses(with_it) == losses(without)
    tensors = read_weights(without).tensors
    for name, value in read_weights(with_it).tensors.items():
        assert torch.equal(value, tensors[name]), name


def test_it_is_not_said_again_by_a_run_that_goes_on(source, tmp_path, capsys) -> None:
    run = begun(source, tmp_path / "run")
    assert len(lines(capsys)) == 1
    train(load_config(file=run / "config.yaml", overrides={"train.epochs": 2}), resume=run, device="cpu")
    assert lines(capsys) == []
    assert [record["epoch"] for record in RunFolder(run).records()] == [0, 1]
    run_in_process(source[0], tmp_path / "random", train__epochs=1)
    assert lines(capsys) == []


def test_a_large_validation_split_is_looked_at_in_part(source, tmp_path, capsys, monkeypatch) -> None:
    seen: list[int] = []
    real = zero_shot.evaluate

    def evaluate(model: Any, loader: Any, metrics: Any, **more: Any) -> Any:
        figures = real(model, loader, metrics, **more)
        seen.extend(sorted(metrics["detection"][0].measured))
        return figures

    monkeypatch.setattr(zero_shot, "evaluate", evaluate)
    monkeypatch.setattr(zero_shot, "MOST_IMAGES", 3)
    afterwards: list[int] = []
    real_all = training.evaluate_all

    def evaluate_all(model: Any, validation: Any, **more: Any) -> Any:
        figures = real_all(model, validation, **more)
        afterwards.append(len(validation[0].metrics["detection"][0].measured))
        return figures

    monkeypatch.setattr(training, "evaluate_all", evaluate_all)
    begun(source, tmp_path / "run")
    assert seen == [1, 3, 5]  # evenly, not the first ones
    assert "on 3 of 5 validation images" in lines(capsys)[0]
    assert afterwards == [5, 5]  # after the epoch, and at the end


def test_a_head_that_starts_new_is_named(source, tmp_path, capsys) -> None:
    data, run = source
    config = fast_config(data, train__epochs=1)
    train(config, output=tmp_path / "run", init=str(run), init_parts=["backbone", "neck"], device="cpu")
    assert lines(capsys) == ["before training: detection not measured: its head starts new"]


def renamed(run: Path, file: Path, names: list[str]) -> Path:
    """The weights of a run whose classes have other names."""
    model = load(run)
    model.config.categories = [
        category.model_copy(update={"name": name}) for category, name in zip(model.categories, names, strict=True)
    ]
    save_weights(model, file)
    return file


def test_weights_of_other_classes_are_not_measured(source, tmp_path, capsys) -> None:
    begun(source, tmp_path / "run", renamed(source[1], tmp_path / "a.safetensors", ["cat", "dog"]))
    assert lines(capsys) == [
        "before training: detection not measured: no class of the data is taken over from these weights"
    ]


def test_weights_that_know_the_classes_and_find_nothing_are_a_warning(source, tmp_path, capsys, monkeypatch) -> None:
    real = zero_shot.evaluate
    value = 0.004

    def evaluate(*args: Any, **more: Any) -> dict[str, dict[str, float]]:
        return {"detection": {**real(*args, **more)["detection"], "AP": value}}

    monkeypatch.setattr(zero_shot, "evaluate", evaluate)
    begun(source, tmp_path / "low")
    output = capsys.readouterr().out
    assert "AP 0.004 on 5" in output
    assert "warning: detection: nothing is found, though these weights know 2 of 2 classes" in output
    value = 0.006
    begun(source, tmp_path / "half", renamed(source[1], tmp_path / "a.safetensors", ["blue", "dog"]))
    output = capsys.readouterr().out
    assert "1 of 2 classes" in output
    assert "warning: detection" not in output  # the other class has nothing to give
    value = 0.004
    run = begun(source, tmp_path / "deeper", model__heads__detection__num_layers=3)
    output = capsys.readouterr().out
    assert "layers of the head from these weights" in output
    assert "warning: detection" not in output  # the head is another one, in part
    assert run.is_dir()


def test_several_processes_share_the_images(source, monkeypatch) -> None:
    monkeypatch.setattr(zero_shot, "MOST_IMAGES", 4)
    split = CocoSplit(find_layout(source[0]).split("val"))
    seen = []
    for rank in range(2):
        loader = build_eval_loader(
            split, DataConfig(workers=0), batch_size=2, image_size=(64, 64), rank=rank, world_size=2
        )
        accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        part: Any = SimpleNamespace(loader=loader)
        trainer: Any = SimpleNamespace(accelerator=accelerator)
        before = [key.index for key in loader.batches.keys]
        with zero_shot._some_images(trainer, part):
            seen.append([key.index for batch in loader.batches for key in batch])
        assert [key.index for key in loader.batches.keys] == before
    assert seen == [[0, 3], [1, 4]]

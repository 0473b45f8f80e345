"""A run that goes on with other settings than it had: what is kept, what is said, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvision.commands.train import run_config
from mvision.engine import epoch as epoch_module
from mvision.engine import train as train_module
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.storage.run_folder import RunFolder
from tests.conftest import write_squares
from tests.small_runs import run_in_process
from tests.test_train_checks import files_of


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Without the pictures, and the figures of the end: no test here is about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvision.engine.checkpoint.plot_run", lambda records, path: None)
        patch.setattr(train_module, "_finish_run", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 8 training images, and a run of one epoch of four steps."""
    folder = tmp_path_factory.mktemp("changes")
    write_squares(folder / "data", images=8)
    run_in_process(folder / "data", folder / "run", train__epochs=1)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate at every step of the runs of a test, as a fraction of its peak."""
    set_learning_rate, seen = epoch_module.set_learning_rate, []

    def recorded(*args: Any) -> float:
        seen.append(set_learning_rate(*args))
        return seen[-1]

    monkeypatch.setattr(epoch_module, "set_learning_rate", recorded)
    return seen


def go_on(run: Path, **options: Any) -> Path:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return train(run_config(resume=run, options=named), resume=run, device="cpu")


@pytest.mark.parametrize(("change", "steps"), [({"train__batch_size": 4}, 2), ({"train__batch_size": 1}, 8), ({}, 4)])
def test_the_learning_rate_follows_the_epochs_and_not_the_steps(
    change: dict[str, Any], steps: int, run: Path, factors: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"train__warmup_steps": 0, "train__schedule": "linear", "train__final_lr": 0.0}
    go_on(run, train__epochs=2, **settings, **change)
    assert factors == pytest.approx([1 - (steps + step) / (2 * steps) for step in range(steps)])
    note = f"note: an epoch has {steps} optimiser steps now, and had 4: the learning rate goes on from the same share"
    assert (note in capsys.readouterr().out) == (steps != 4)


def test_accumulated_batches_are_fewer_steps(
    run: Path, factors: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"train__warmup_steps": 0, "train__schedule": "linear", "train__final_lr": 0.0}
    go_on(run, train__epochs=2, train__accumulate=3, **settings)
    assert factors == pytest.approx([1 - 2 / 4, 1 - 3 / 4])
    assert "note: an epoch has 2 optimiser steps now, and had 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__image_size": (32, 64)}, r"has pictures of 64 x 64, not 64 x 32: .* leave --image-size out, or"),
        (
            {"data__fraction": 0.99},
            r"drawn with no share of the images, and would be with data.fraction 0.99, trai",
        ),
    ],
)
def test_what_a_run_cannot_go_on_with_leaves_it_as_it_is(run: Path, options: dict[str, Any], message: str) -> None:
    before = files_of(run)
    with pytest.raises(UserError, match=rf"--resume .*run: .*{message}"):
        go_on(run, train__epochs=2, **options)
    assert files_of(run) == before


def test_another_seed_would_validate_on_what_was_trained_on(made: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(made / "data", tmp_path / "data"))
    (data / "annotations" / "val.json").unlink()
    run = run_in_process(data, tmp_path / "run", train__epochs=1, data__val_fraction=0.25)
    with pytest.raises(UserError, match=r"data.val_fraction \[0.25\], train.seed 0, and would be .*seed 7: "):
        go_on(run, train__epochs=2, train__seed=7)
    assert go_on(run, train__epochs=2) == run


def test_an_end_without_an_evaluation_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first of two epochs, of which the last is evaluated."""
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "has_ended", lambda config, progress: progress.epoch == 1)
        run = run_in_process(made / "data", tmp_path / "run", train__epochs=2, train__val_interval=2)
    before = files_of(run)
    with pytest.raises(UserError, match=r"--epochs 1: .*run has trained 1 and was not .*; choose --epochs 2 or more"):
        go_on(run, train__epochs=1)
    assert files_of(run) == before
    go_on(run, train__epochs=2)
    assert ["metrics" in record for record in RunFolder(run).records()] == [False, True]


def test_figures_go_with_the_weights_that_they_are_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is trained on, and stopped once it has better weights: the figures of the old ones are gone."""
    end = {"metrics.json", "predictions.jpg", "curves.json", "curves.png", "calibration.png", "confusion_matrix.png"}
    for name in end:
        (run / name).touch()
    (run / "results.png").touch()
    RunFolder(run).mark_finished(1)
    monkeypatch.setattr(train_module, "evaluate_all", lambda *_, **__: {"detection": {"AP": 0.5}})
    before = (run / "best.safetensors").read_bytes()
    go_on(run, train__epochs=2)
    assert (run / "best.safetensors").read_bytes() != before
    assert not end & {path.name for path in run.iterdir()}
    assert not RunFolder(run).is_finished(1)
    assert (run / "results.png").is_file()


@pytest.mark.parametrize("init", [False, True])
def test_a_frozen_part_without_trained_weights_is_said(
    init: bool, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"train__epochs": 1, "train__freeze": ["backbone", "neck"]}
    if init:  # its neck fits in part
        config = run_config(init=str(made / "run"), options={"model.neck.ffn_dim": 64})
        config.data.root, config.data.workers = str(made / "data"), 0
        config.train = config.train.model_copy(update={"epochs": 1, "freeze": ["backbone", "neck"]})
        train(config, output=tmp_path / "run", init=str(made / "run"), device="cpu")
    else:
        run_in_process(made / "data", tmp_path / "run", **more)
    text = capsys.readouterr().out
    assert ("the backbone is frozen (train.freeze) and all of its weights are random" in text) is not init
    assert ("the neck is frozen (train.freeze) and all of its weights are random" in text) is not init
    assert ("the neck is frozen (train.freeze) and some of its weights are random" in text) is init
    go_on(tmp_path / "run", train__epochs=2)
    assert "frozen (train.freeze)" not in capsys.readouterr().out


def test_trackers_write_into_the_folder_of_their_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        run_in_process(made / "data", Path(name), train__epochs=1, train__trackers=["tensorboard"])
        assert len(list(Path(name).rglob("events.out.tfevents*"))) >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

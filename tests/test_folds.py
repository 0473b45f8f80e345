"""``mvision train --folds K``: a run for each fold, the table of their figures, and going on where it was stopped."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

import mvision.commands.folds as command
from mvision.cli.main import run as mvision
from mvision.commands.folds import summarised, table
from mvision.commands.val import validate
from mvision.errors import Stopped
from mvision.storage.run_folder import RunFolder
from tests.conftest import write_squares
from tests.small_runs import FAST

TINY = [part for key, value in FAST.items() for part in ("-o", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data") / "squares", images=3)


def train(data: Path, output: Path, *more: str) -> int:
    return mvision(
        ["train", "--data", str(data), "--epochs", "1", "--output", str(output), "--device", "cpu", *TINY, *more]
    )


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "folds.json").read_text())
    return content


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds, trained without a stop."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(data, output, "--folds", "2", "--seed", "3") == 0
    return output


def test_it_leaves_a_run_for_each_fold_and_their_figures(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {".lock", "config.yaml", "fold1", "fold2", "folds.json"}
    state = read(whole)
    assert (state["folds"], state["init"]) == (2, None)
    for task, figures in state["figures"].items():
        for number in (1, 2):
            run = whole / f"fold{number}"
            own = json.loads((run / "metrics.json").read_text())[task]
            assert yaml.safe_load((run / "config.yaml").read_text())["data"]["fold"] == [number, 2]
            assert [figure["folds"][number - 1] or 0 for figure in figures.values()] == [
                max(0, own[n]) for n in figures
            ]
    average = state["figures"]["detection"]["AR100"]
    assert average["mean"] == pytest.approx(statistics.fmean(average["folds"]))
    assert average["std"] == pytest.approx(statistics.stdev(average["folds"]))


def test_a_fold_is_a_normal_run(whole: Path, data: Path, tmp_path: Path) -> None:
    """Its weights are evaluated on its own images, and it equals the same run by itself."""
    own: dict[str, Any] = {}
    for named in ({}, {"data": str(data)}, {"split": "val"}):  # what is meant without them
        text = validate(str(whole / "fold2"), output=tmp_path, device="cpu", workers=0, **named)
        assert "fold 2 of 2: validation on one part of the images of train and val" in text or "split" in named
        again = json.loads((tmp_path / "metrics.json").read_text())["detection"]
        assert again == pytest.approx(json.loads((whole / "fold2" / "metrics.json").read_text())["detection"])
        found = (tmp_path / "predictions.json").read_text()
        assert found == own.setdefault("found", found)  # results on the same pictures
    assert train(data, tmp_path / "alone", "-o", "data.fold=[2, 2]", "--seed", "3") == 0
    same, other = (RunFolder(run).records() for run in (whole / "fold2", tmp_path / "alone"))
    assert [record["loss"] for record in same] == [record["loss"] for record in other]


def test_it_goes_on_where_it_was_stopped(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, begun = command.train, []

    def stopping(*arguments: Any, **more: Any) -> Path:
        path: Path = more.get("output") or more["resume"]
        begun.append(path.name)
        if path.name == "fold2":
            path.mkdir()
            (path / "config.yaml").write_text("half")  # what a run leaves that had no time to save its state
            raise Stopped(15, "go on with fold2")
        return real(*arguments, **more)

    output = tmp_path / "run"
    monkeypatch.setattr(command, "train", stopping)
    assert train(data, output, "--folds", "2", "--seed", "3") == 143
    assert f"go on with: mvision train --resume {output}" in capsys.readouterr().err
    assert "figures" not in read(output)
    trained = (output / "fold1" / "best.safetensors").stat()
    monkeypatch.setattr(command, "train", real)
    assert mvision(["train", "--resume", str(output), "--device", "cpu"]) == 0
    assert "nothing to do, it is trained to its end" in capsys.readouterr().out
    assert (output / "fold1" / "best.safetensors").stat().st_mtime_ns == trained.st_mtime_ns
    assert read(output)["figures"] == read(whole)["figures"]


def test_every_fold_starts_from_the_same_weights(whole: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    starts: list[Any] = []

    def pretended(config: Any, **more: Any) -> None:
        starts.append((config.data.fold, more["init"], more["init_family"]))
        more["output"].mkdir(parents=True, exist_ok=True)
        (more["output"] / "metrics.json").write_text('{"detection": {"AP": 0.5}}')

    monkeypatch.setattr(command, "train", pretended)
    weights = str(whole / "fold1")
    assert train(data, tmp_path / "run", "--folds", "3", "--init", weights) == 0
    assert starts == [((number, 3), weights, None) for number in (1, 2, 3)]
    starts.clear()
    assert mvision(["train", "--resume", str(tmp_path / "run")]) == 0
    assert starts == [((number, 3), weights, None) for number in (1, 2, 3)]  # none of them had saved a state


def test_mistakes_are_one_line_and_leave_nothing(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(code: int, message: str) -> None:
        line = capsys.readouterr().err
        assert code == 2
        assert message in line
        assert line.count("\n") == 1
        assert not (tmp_path / "run").exists()

    fails(train(data, tmp_path / "run", "--folds", "7"), "there are 6 pictures, too few for 7 folds")
    fails(train(data, tmp_path / "run", "--folds", "1"), "two or more are needed")
    fails(train(data, tmp_path / "run", "--folds", "2", "-o", "data.fold=[1, 2]"), "leave one of them out")
    fails(train(data, tmp_path / "run", "--folds", "2", "-o", "data.fraction=0.5"), "leave data.fraction out")
    fails(mvision(["train", "--folds", "2", "--resume", str(whole / "fold1")]), "is not a folder of folds")
    fails(mvision(["train", "--folds", "3", "--resume", str(whole)]), "there are 2 in")
    fails(mvision(["train", "--seed", "7", "--resume", str(whole)]), "drawn with seed 3; leave --seed out")
    fails(mvision(["train", "--resume", str(whole), "--output", str(tmp_path / "run")]), "leave --output out")
    fails(mvision(["train", "--resume", str(whole), "--task", "detection"]), "leave --task out")
    monkeypatch.setenv("LOCAL_RANK", "0")
    fails(train(data, tmp_path / "run", "--folds", "2"), "without torchrun")
    monkeypatch.delenv("LOCAL_RANK")
    (tmp_path / "mine").mkdir()
    assert train(data, tmp_path / "mine", "--folds", "7") == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_figure_that_a_fold_cannot_measure_is_left_out() -> None:
    figures = [{"detection": {"AP": value, "AP/rare": rare}} for value, rare in ((0.2, -1.0), (0.4, 0.3), (0.6, -1.0))]
    summary = summarised(figures)
    assert summary["detection"]["AP"] == {
        "folds": [0.2, 0.4, 0.6],
        "mean": pytest.approx(0.4),
        "std": pytest.approx(0.2),
    }
    assert summary["detection"]["AP/rare"] == {"folds": [None, 0.3, None], "mean": 0.3, "std": None}
    lines = table(summary, 3).splitlines()
    assert lines[1].split() == ["detection", "AP", "0.200", "0.400", "0.600", "0.400", "0.200"]
    assert lines[2].split() == ["detection", "AP/rare", "-", "0.300", "-", "0.300", "-"]

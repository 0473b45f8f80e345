"""The best thresholds: in the weights after a training, on their way through the commands, and in prediction."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mvision
from mvision.cli.main import run
from mvision.errors import UserError
from mvision.heads.linking import thresholds_of_results
from mvision.inference.selection import resolve_threshold, wants_best, without_best
from mvision.weights import load, save_weights
from mvision.weights.stored import read_header
from mvision.weights.thresholds import thresholds_file, write_thresholds
from tests.conftest import write_squares
from tests.small_runs import run_in_process

BEST = {"red": 0.3, "blue": 0.6}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, 0.5),
        (0.2, 0.2),
        ({"red": 0.1}, {"red": 0.1}),
        ("best", {"*": 0.5, "red": 0.3, "blue": 0.6}),
        ({"*": "best", "red": 0.9}, {"*": 0.5, "red": 0.9, "blue": 0.6}),
    ],
)
def test_best_stands_for_the_numbers_in_the_weights(asked: Any, expected: Any) -> None:
    assert resolve_threshold(asked, SimpleNamespace(best_thresholds=BEST)) == expected


def test_what_is_no_threshold_is_refused() -> None:
    for wrong in ("bets", {"red": "best"}, {"*": "all"}):
        with pytest.raises(UserError, match="give a number from 0 to 1, one for each class, or 'best' for all"):
            without_best(wrong)
    with pytest.raises(UserError, match="these weights have none; .* mvision val --write-thresholds"):
        resolve_threshold("best", SimpleNamespace(best_thresholds={}))
    assert not wants_best({"best": 0.5})


def test_thresholds_of_objects_come_before_those_of_poses() -> None:
    of_tasks = {"poses": {"person": 0.1, "dog": 0.2}, "boxes": {"person": 0.7}, "not in the model": {"cat": 0.3}}
    kinds = {"poses": "poses", "boxes": "objects"}
    assert thresholds_of_results(of_tasks, kinds) == {"person": 0.7, "dog": 0.2}


def test_writing_them_changes_nothing_else(tmp_path: Path) -> None:
    model = mvision.create_model("tiny", num_classes=2, image_size=64)
    file = tmp_path / "weights.safetensors"
    save_weights(model, file, extra={"epoch": 3})
    write_thresholds(thresholds_file(file), {"detection": {"0": 0.25}})
    write_thresholds(thresholds_file(file), {"keypoints": {"1": 0.5}})
    loaded = load(file)
    assert loaded.config.thresholds == {"detection": {"0": 0.25}, "keypoints": {"1": 0.5}}
    assert loaded.best_thresholds == {"0": 0.25}
    assert json.loads(read_header(file).metadata["mvision"])["epoch"] == 3
    before, after = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_files_get_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="thresholds can be written into a run's folder or a .safetensors file"):
        thresholds_file(tmp_path / "other.safetensors")


class TestRun:
    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder with a data set and a run that has learned something."""
        place = tmp_path_factory.mktemp("place")
        data = write_squares(place / "data", images=12)
        run_in_process(data, place / "run", train__epochs=8, train__val_interval=8)
        return place

    def command(self, place: Path, *arguments: str) -> int:
        return run([*arguments, "--weights", str(place / "run"), "--device", "cpu"])

    def test_the_weights_have_those_of_the_figures(self, place: Path) -> None:
        figures = json.loads((place / "run" / "metrics.json").read_text())["detection"]
        known = {name: figures[f"threshold/{name}"] for name in ("red", "blue") if figures[f"threshold/{name}"] >= 0}
        assert known
        assert load(place / "run").config.thresholds == {"detection": known}

    def test_predict_uses_them(self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pictures = str(place / "data" / "images")
        options = ["predict", pictures, "--no-pictures", "--precision", "fp32"]
        assert self.command(place, *options, "--threshold", "0", "--output", str(tmp_path / "all")) == 0
        every = json.loads((tmp_path / "all" / "predictions.json").read_text())
        scores = sorted(entry["score"] for entry in every)
        # Others than those of the training, and between two scores: in other batches these differ by rounding.
        low, high = (statistics.mean(scores[k : k + 2]) for k in (len(scores) // 3, 2 * len(scores) // 3))
        write_thresholds(thresholds_file(place / "run"), {"detection": {"red": low, "blue": high}})
        wanted = Counter(
            entry["category_name"]
            for entry in every
            if entry["score"] >= {"red": low, "blue": high}[entry["category_name"]]
        )
        capsys.readouterr()
        assert self.command(place, *options, "--threshold", "best", "--output", str(tmp_path / "best")) == 0
        assert f"thresholds: blue {high:g}, red {low:g}" in capsys.readouterr().out
        found = json.loads((tmp_path / "best" / "predictions.json").read_text())
        assert Counter(entry["category_name"] for entry in found) == wanted
        results = load(place / "run").predict(
            sorted(str(path) for path in (place / "data" / "images").iterdir()), "best", precision="fp32"
        )
        assert Counter(name for result in results for name in result.class_names) == wanted

    def test_val_writes_them_when_asked(self, place: Path, tmp_path: Path) -> None:
        write_thresholds(thresholds_file(place / "run"), {"detection": {}})
        assert self.command(place, "predict", "--threshold", "best", "--output", str(tmp_path / "none")) == 2
        assert not (tmp_path / "none").exists()
        assert self.command(place, "val", "--workers", "0", "--output", str(tmp_path / "val")) == 0
        assert load(place / "run").best_thresholds == {}
        assert self.command(place, "val", "--workers", "0", "--write-thresholds") == 0
        figures = json.loads((tmp_path / "val" / "metrics.json").read_text())["detection"]
        for name, value in load(place / "run").best_thresholds.items():
            assert value == figures[f"threshold/{name}"]
        assert load(place / "run").best_thresholds
        names = {path.name for path in (tmp_path / "val").iterdir()}
        assert {"curves.png", "confusion_matrix.png", "calibration.png", "curves.json", "metrics.json"} <= names

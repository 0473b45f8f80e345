"""A task from another package: ``tests/outside_head`` has a head and a metric, and announces them by an entry point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvision import load
from mvision.cli.main import run
from mvision.heads import HEADS, head_class
from mvision.storage.run_folder import RunFolder
from tests.conftest import write_squares

PACKAGE = Path(__file__).resolve().parent / "outside_head"
SMALL = (
    *("--epochs", "2", "--batch-size", "2", "--image-size", "64", "--workers", "0"),
    *("--device", "cpu", "--precision", "fp32", "-o", "train.warmup_steps=2", "-o", "train.val_interval=1"),
    *("-o", "model.neck.embed_dim=32"),
)
DETECTION = {"embed_dim": 32, "num_queries": 10, "num_layers": 1, "num_heads": 4, "ffn_dim": 32, "num_denoising": 4}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the package and the metadata that pip would install with it, on the path of this process."""
    site = tmp_path_factory.mktemp("site") / "packages"
    shutil.copytree(PACKAGE, site, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = "from setuptools.build_meta import prepare_metadata_for_build_wheel as make; make('.')"
    subprocess.run([sys.executable, "-c", metadata], cwd=site, capture_output=True, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield site


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def trained(installed: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("centers") / "run"
    assert run(["train", "--task", "centers", "--data", str(data), "--output", str(output), *SMALL]) == 0
    return output


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_training_reports_the_heads_own_metric(trained: Path) -> None:
    records = RunFolder(trained).records()
    assert [sorted(record["metrics"]) for record in records] == [["centers"]] * 2
    assert [list(record["loss"]) for record in records] == [["centers/decoder_heatmap"]] * 2
    assert sum(records[1]["loss"].values()) < sum(records[0]["loss"].values())
    figures = read(trained / "metrics.json")["centers"]
    assert figures == max((record["metrics"]["centers"] for record in records), key=lambda found: found["hit_rate"])
    assert {"results.png", "predictions.jpg", "best.safetensors"} <= {path.name for path in trained.iterdir()}
    assert load(trained).config.heads["centers"].num_centers == 20


def test_val_measures_the_same(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["val", "--weights", str(trained), "--output", str(tmp_path), "--workers", "0", "--device", "cpu"]) == 0
    assert read(tmp_path / "metrics.json") == read(trained / "metrics.json")
    assert "centres with a prediction nearby: " in capsys.readouterr().out


def test_predict_writes_the_heads_results(trained: Path, data: Path, tmp_path: Path) -> None:
    image, output = str(data / "images" / "val_0.jpg"), tmp_path / "predicted"
    options = ["--weights", str(trained), "--output", str(output), "--device", "cpu", "--threshold", "0"]
    assert run(["predict", "--task", "centers", *options, image]) == 0
    entries = read(output / "predictions.json")
    assert len(entries) == 20
    assert {entry["category_id"] for entry in entries} == {2, 5}
    assert {tuple(entry["bbox"][2:]) for entry in entries} == {(8.0, 8.0)}
    assert (output / "val_0.jpg").is_file()


def test_a_joint_model_is_judged_by_both_metrics(
    installed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hit rates decide here: a detector is far from finding anything after two epochs."""
    hit_rates = iter([0.9, 0.4, 0.9])
    metric = head_class("centers").evaluator
    monkeypatch.setattr(metric, "compute", lambda self: {"hit_rate": next(hit_rates)})
    monkeypatch.setattr(metric, "table", lambda self: "a table")
    settings = [f"model.heads.detection.{name}={value}" for name, value in DETECTION.items()]
    options = [word for setting in (*settings, "model.heads.centers.hidden_dim=8") for word in ("-o", setting)]
    tasks = ["--task", "detection", "--task", "centers"]
    output = tmp_path / "run"
    assert run(["train", *tasks, "--data", str(data), "--output", str(output), *SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert "best weights (epoch 1)" in printed
    assert "centers hit_rate 0.400" in printed
    assert "centers, centers\na table" in printed
    figures = read(output / "metrics.json")
    assert list(figures) == ["detection", "centers"]
    assert figures["centers"] == {"hit_rate": 0.9}
    assert "AP" in figures["detection"]
    assert {name.partition("/")[0] for name in RunFolder(output).records()[0]["loss"]} == {"detection", "centers"}


def test_help_and_data_check_name_the_task(installed: Path, data: Path) -> None:
    """In a process of its own, where nothing but the installed metadata makes the head known."""
    script = (
        "from mvision.cli.main import run\n"
        f"assert run(['data', 'check', {str(data)!r}]) == 0\n"
        "assert run(['train', '--help']) == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(PACKAGE.parent.parent)])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    verdict = next(line for line in done.stdout.splitlines() if "every split can serve" in line)
    assert verdict.endswith("centers")
    assert "or centers; several make one model" in " ".join(done.stdout.split())


def test_the_heads_of_mvision_need_no_look_at_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the metadata of all installed packages takes milliseconds, which each forward pass would pay."""

    def refuse() -> None:
        raise AssertionError("the metadata of other packages was read")

    monkeypatch.setattr("mvision.heads._outside", refuse)
    assert {head_class(task).__module__.partition(".")[0] for task in HEADS} == {"mvision"}

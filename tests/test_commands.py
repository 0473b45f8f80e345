"""``val``, ``predict`` and ``data``: what follows from the run where the user names nothing."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
import torch
from click.testing import CliRunner

from mvision import Model, UserError, __version__
from mvision.cli.main import cli
from mvision.commands import data, info, predict, val
from mvision.commands.predict import newest_run, predict_job, sample_images
from mvision.commands.val import validate
from mvision.inference.sources import Source
from mvision.structures import Category
from mvision.weights import save_weights
from mvision.weights.zoo import FAMILIES
from tests.conftest import write_squares
from tests.small_runs import fast_config

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_the_command_line_calls_the_commands_and_nobody_else_does() -> None:
    allowed = {"mvision", "mvision.errors", "mvision.heads", "mvision.machine"}  # names, which cost no import of torch
    for path in (ROOT / "cli").glob("*.py"):
        used = {name for name in imports(path) if name.startswith("mvision")} - allowed
        assert all(name.startswith(("mvision.cli.", "mvision.commands.")) for name in used), path
    others = [*(ROOT / "mvision").rglob("*.py"), *(ROOT / "heads").rglob("*.py")]
    users = [path for path in others if any(name.startswith("mvision.commands") for name in imports(path))]
    assert {path.parent for path in users} == {ROOT / "mvision" / "commands"}


def test_info_names_the_package_and_its_version() -> None:
    lines = dict(line.split(maxsplit=1) for line in info.machine_text().splitlines())
    assert lines["mvision"] == f"{__version__} in {ROOT / 'mvision'}"
    assert lines["torch"] == torch.__version__.partition("+")[0]


def make_run(folder: Path, root: Path, **settings: Any) -> Path:
    """A run folder with random weights of a detector and the config that they were trained with."""
    config = fast_config(root, **settings)
    config.model.categories = [Category(id=2, name="blue"), Category(id=5, name="red")]
    save_weights(Model(config.model), folder / "best.safetensors")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``validate`` evaluates on, and how it computes; the figures are made up."""
    seen: dict[str, Any] = {}
    build_eval_loader = val.build_eval_loader

    def build(split: Any, config: Any, **options: Any) -> Any:
        seen["annotations"] = Path(split.split.annotations)
        seen["loader"] = {"workers": config.workers, **options}
        return build_eval_loader(split, config, **options)

    def evaluate_all(model: Any, validation: Any, keep: Any) -> dict:
        seen["model"] = model
        seen["dtype"] = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        return {"detection": {"AP": 0.25}}

    monkeypatch.setattr(val, "build_eval_loader", build)
    monkeypatch.setattr(val, "evaluate_all", evaluate_all)
    monkeypatch.setattr(val, "analyse_all", lambda validation: [])
    monkeypatch.setattr(val, "tables", lambda validation: [f"table of {part.name}" for part in validation])
    return seen


def test_val_uses_the_data_and_the_split_of_the_run(squares: Path, tmp_path: Path, seen: dict) -> None:
    run = make_run(tmp_path / "run", squares, data__val="train")
    text = validate(str(run), device="cpu", output=tmp_path / "made" / "here")
    assert seen["annotations"] == squares / "annotations" / "train.json"
    assert text.splitlines()[-1] == "table of squares"
    assert json.loads((tmp_path / "made" / "here" / "metrics.json").read_text()) == {"detection": {"AP": 0.25}}
    assert seen["loader"] == {
        "workers": None,
        "batch_size": 16,
        "image_size": (64, 64),
        "pixel_range": None,
        "device": CPU,
    }
    validate(str(run), split="val", device="cpu", batch_size=3, workers=0)
    assert seen["annotations"] == squares / "annotations" / "val.json"
    assert (seen["loader"]["batch_size"], seen["loader"]["workers"]) == (3, 0)


def test_val_uses_other_data_where_it_is_named(squares: Path, tmp_path: Path, seen: dict) -> None:
    run = make_run(tmp_path / "run", squares, data__val="train")
    other = write_squares(tmp_path / "other")
    validate(str(run), data=str(other), device="cpu")
    assert seen["annotations"] == other / "annotations" / "val.json"  # "train" was a split of the run's data


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_val_computes_in_the_precision_of_the_run(precision: str, squares: Path, tmp_path: Path, seen: dict) -> None:
    run = make_run(tmp_path / "run", squares, train__precision=precision)
    validate(str(run), device="cpu")
    assert seen["dtype"] == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert next(seen["model"].parameters()).dtype == torch.float32


def test_val_with_a_precision_opens_the_model_as_predict_does(
    squares: Path, tmp_path: Path, seen: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", squares, train__precision="bf16")
    opened = []

    def open_fastest(
        source: str, tasks: Any, device: torch.device, precision: str, family: str | None
    ) -> tuple[Any, str]:
        opened.append((source, tuple(tasks), device, precision, family))
        return val.load(str(run)), "the runtime"

    monkeypatch.setattr(val, "open_fastest", open_fastest)
    text = validate(str(run), tasks=["detection"], family="deim", data=str(squares), precision="fp32", device="cpu")
    assert "the runtime" in text.splitlines()
    assert seen["dtype"] == torch.float32  # no autocast around a model that was prepared
    validate("model.onnx", data=str(squares), device="cpu")
    assert opened == [(str(run), ("detection",), CPU, "fp32", "deim"), ("model.onnx", (), CPU, "auto", None)]


def test_val_refuses_a_folder_that_cannot_be_written_before_it_evaluates(
    squares: Path, tmp_path: Path, seen: dict
) -> None:
    run = make_run(tmp_path / "run", squares)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*file/x: cannot be written"):
        validate(str(run), output=tmp_path / "file" / "x", device="cpu")
    assert not seen


def test_the_newest_run_that_has_the_tasks(tmp_path: Path) -> None:
    runs = {"detection/1": 100, "detection/2": 300, "instance-seg/1": 200, "detection+keypoints/1": 250}
    for name, age in runs.items():
        weights = tmp_path / name / "best.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        os.utime(weights, (age, age))
    (tmp_path / "keypoints" / "7").mkdir(parents=True)  # a run without weights
    found = {
        tasks: newest_run(tasks, tmp_path).relative_to(tmp_path).as_posix()
        for tasks in ((), ("detection",), ("keypoints",), ("keypoints", "detection"), ("instance-seg",))
    }
    assert list(found.values()) == [
        *("detection/2", "detection/2", "detection+keypoints/1", "detection+keypoints/1", "instance-seg/1")
    ]
    with pytest.raises(UserError, match=r"no run to predict with .*'mvision train --task semantic-seg', or give"):
        newest_run(["semantic-seg"], tmp_path)
    with pytest.raises(UserError, match="mvision train --task detection.*published model dfine-s"):
        newest_run([], tmp_path / "nothing")


def test_the_newest_run_of_a_task_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    """Whatever the clock says: copies and other machines change the times of files."""

    def newest(runs: dict[str, int]) -> str:
        for name, age in runs.items():
            weights = tmp_path / name / "best.safetensors"
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.touch()
            os.utime(weights, (age, age))
        return newest_run([], tmp_path).relative_to(tmp_path).as_posix()

    assert newest({"detection/9": 900, "detection/10": 100}) == "detection/10"
    assert newest({"keypoints/1": 500}) == "keypoints/1"  # of another task: numbers tell nothing
    assert newest({"detection/10": 600}) == "detection/10"
    assert newest({"detection/with-a-name": 700}) == "detection/with-a-name"
    assert newest({"detection/10": 800, "detection/11": 50, "keypoints/1": 100}) == "detection/with-a-name"


def test_sample_images_are_of_the_validation_split_of_the_run(squares: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", squares)
    assert [Path(file).name for file in sample_images(str(run), 3)] == ["val_0.jpg", "val_1.jpg", "val_2.jpg"]
    run = make_run(tmp_path / "other", squares, data__val="train")
    assert Path(sample_images(str(run / "best.safetensors"))[-1]).name == "train_3.jpg"


def test_predict_takes_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = SimpleNamespace(tasks=["detection"]), []
    monkeypatch.setattr(predict, "open_fastest", lambda *arguments: (calls.append(arguments), (model, "runtime"))[1])
    monkeypatch.setattr(predict, "predict_sources", lambda *arguments, **options: (arguments, options))
    monkeypatch.setattr(predict, "newest_run", lambda tasks: Path("runs/newest"))
    monkeypatch.setattr(predict, "sample_images", lambda weights: [f"sample of {weights}"])
    messages: list[str] = []
    options: Any = {"tasks": ["detection"], "device": "cpu", "log": messages.append}
    photo, output = str(tmp_path / "a.jpg"), tmp_path / "found"
    Path(photo).touch()
    choices: dict[str, Any] = {"multi_label": False, "nms": None, "for_metrics": None, "pictures": True}
    choices |= {"tiling": None, "track": None}
    assert predict_job(
        [photo], weights="w", family="deim", threshold=0.3, output=output, precision="fp32", **options
    ) == (
        (model, [Source("image", photo, "a.jpg")], output, 0.3, None),
        choices,
    )
    # Of the samples, one that is damaged costs itself alone.
    samples = [Source("image", "sample of runs/newest", "sample of runs/newest".rpartition("/")[2], required=False)]
    assert predict_job(multi_label=True, nms=0.4, pictures=False, **options) == (
        (model, samples, Path("predictions"), 0.5, None),
        {**choices, "multi_label": True, "nms": 0.4, "pictures": False},
    )
    assert calls == [("w", ["detection"], CPU, "fp32", "deim"), ("runs/newest", ["detection"], CPU, "auto", None)]
    with pytest.raises(UserError, match=r"missing\.jpg: no such file"):
        predict_job([str(tmp_path / "missing.jpg")], weights="w", **options)
    assert messages == ["runtime", "runtime"]  # a missing file is reported before any model is opened
    with pytest.raises(UserError, match="detectoin"):
        predict_job(["a.jpg"], tasks=["detectoin"])


def test_heads_whose_results_are_not_shown_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert predict.left_out_of_pictures(["detection", "instance-seg", "keypoints", "semantic-seg"]) == []
    monkeypatch.setattr(predict, "head_class", lambda _: SimpleNamespace(kind="objects"))
    monkeypatch.setattr(predict, "serving_task", lambda task, _: task)
    (line,) = predict.left_out_of_pictures(["detection", "centers"])
    assert line == "results are those of detection; not those of centers, which finds objects too (choose with --task)"


def test_data_is_checked_shown_and_converted(squares: Path, tmp_path: Path) -> None:
    report = data.check(str(squares), ["val"])
    assert report.usable
    assert list(report.splits) == ["val"]
    assert (report.splits["val"].images, report.splits["val"].decoded) == (4, True)
    assert not data.check(str(squares), quick=True).splits["train"].decoded
    sheet = tmp_path / "sheet.png"
    text = data.show(str(squares), str(sheet), split="val", count=3)
    assert text.splitlines()[-1] == f"sheet: {sheet}"
    assert text.startswith("COCO annotations")
    plain = cv2.imread(str(sheet))
    data.show(str(squares), str(sheet), split="val", count=3, augmented=True)
    assert (cv2.imread(str(sheet)) != plain).any()
    first, second = data.convert(str(squares), tmp_path / "converted", ["train"]).splitlines()
    assert str(squares) in first
    assert str(tmp_path / "converted") in second
    assert [path.name for path in (tmp_path / "converted" / "annotations").iterdir()] == ["train.json"]


def test_the_help_names_every_family_of_weights() -> None:
    text = " ".join(CliRunner().invoke(cli, ["predict", "--help"]).output.split())
    named = text.split("does not tell it: ")[1].split(".")[0].split(", ")
    assert sorted(named) == sorted(FAMILIES)

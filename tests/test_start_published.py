"""Commands that start from published parts: what they say, and that mistakes are told before any work is done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from mvision.cli.main import run
from mvision.engine import train as training
from tests.edgecrafter_files import write_folder


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a cache with nothing in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path / "cache"))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run; check that it ends with code 2, one line and nothing written, and return that line."""
    before = set(Path().rglob("*"))
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert not printed.out
    assert set(Path().rglob("*")) == before
    return printed.err


class TestMistakesInTraining:
    """Settings and weights are looked at before the data is read or generated."""

    @pytest.fixture(autouse=True)
    def no_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(*_: object, **__: object) -> None:
            raise AssertionError("the data was read")

        monkeypatch.setattr(training, "read_data_sources", read)

    def test_weights_of_the_backbone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for content in (None, {"conv1.weight": torch.zeros(1)}):
            file = tmp_path / "a.pth"
            if content is not None:
                torch.save(content, file)
            line = refused(capsys, "train", "-o", f"model.backbone.weights={file}")
            assert f"model.backbone.weights {file}" in line

    def test_shared_queries_without_a_partner(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = [f"-omodel.heads.keypoints.{key}" for key in ("kind=query", "queries=shared", "sigmas=[0.1,0.1]")]
        line = refused(capsys, "train", "--task", "keypoints", *options)
        assert "queries: shared needs another head with queries" in line

    @pytest.mark.parametrize("model", [[], ["--model", "tiny"]], ids=["alone", "with a model"])
    def test_initial_weights(self, model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "weights nothing: no such file" in refused(capsys, "train", "--init", "nothing", *model)
        torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
        line = refused(capsys, "train", "--init", str(tmp_path / "a.pth"), *model)
        assert "a.pth: not a model of RT-DETR" in line


def test_weights_of_a_backbone_are_checked_once_more_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """They are not lost by the check, which leaves the config as it is, and which says nothing."""
    from mvision.config import load_config
    from mvision.engine.checks import check_model
    from mvision.model import Model

    net = timm.create_model("test_resnet")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    config = load_config(
        "tiny", overrides={"model.backbone": {"name": "test_resnet", "weights": str(tmp_path / "net.pth")}}
    )
    before = config.model_copy(deep=True)
    seen: list[Model] = []
    check_model(config.model, lambda model: seen.append(model) or "", is_new=True)
    assert config == before
    assert all(parameter.is_meta for parameter in seen[0].parameters())
    assert not recwarn.list
    config.model.categories = seen[0].categories
    loaded = Model(config.model).backbone.net.state_dict()["layer1.0.conv1.weight"]
    assert torch.equal(loaded, net.state_dict()["layer1.0.conv1.weight"])


def test_weights_are_told_before_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["predict", "missing.jpg"], ["val", "--output", "out"], ["export", "--output", "out/a.onnx"]):
        assert "weights nothing: no such file" in refused(capsys, *command, "--weights", "nothing")


def test_shared_queries_have_the_width_of_the_other_head() -> None:
    """ECDet-S and ECSeg-S are narrower than poses usually are; a width that is given stays, for the error to name."""
    from mvision.config import load_config

    shared = ["model.heads.keypoints.kind=query", "model.heads.keypoints.queries=shared"]
    for tasks in (["keypoints", "instance-seg"], ["detection", "instance-seg", "keypoints"]):
        heads = load_config("ecseg_s", tasks=tasks, assignments=shared).model.heads
        assert heads["keypoints"].model_dump()["embed_dim"] == heads["instance-seg"].model_dump()["embed_dim"] == 192
        given = load_config("ecseg_s", tasks=tasks, assignments=[*shared, "model.heads.keypoints.embed_dim=64"])
        assert given.model.heads["keypoints"].model_dump()["embed_dim"] == 64


def test_classes_without_points_are_no_part_of_the_report_of_poses(tmp_path: Path) -> None:
    from mvision.config import load_config
    from mvision.model import Model
    from mvision.structures import Category
    from mvision.weights import init_from, save_weights

    config = load_config("tiny", tasks=["keypoints"]).model
    person = Category(id=1, name="person", keypoints=["nose", "tail"])
    config.categories = [person]
    save_weights(Model(config), tmp_path / "a.safetensors")
    config.categories = [Category(id=2, name="car"), person]
    line = init_from(Model(config), tmp_path / "a.safetensors")
    assert "head keypoints loaded in part" in line
    assert line.endswith("; 1 of 1 classes matched by name")


def test_three_tasks_start_from_a_published_detector(tmp_path: Path) -> None:
    """By its short name, from the cache: what starts from it, layers by count, and what it does not have."""
    from mvision.commands.train import run_config
    from mvision.model import Model
    from mvision.structures import Category
    from mvision.weights import init_from

    write_folder(tmp_path / "cache" / "weights" / "ecdet-s", "ecdet")
    shared = ["model.heads.keypoints.kind=query", "model.heads.keypoints.queries=shared"]
    tasks = ["detection", "instance-seg", "keypoints"]
    config = run_config(tasks=tasks, init="ecdet-s", assignments=shared).model
    config.categories = [Category(id=1, name="blue", keypoints=["centre"]), Category(id=2, name="red")]
    line = init_from(Model(config), "ecdet-s")
    assert "Apache-2.0): read as ecdet" in line
    assert "backbone loaded; neck loaded; head instance-seg loaded in part (" in line
    assert re.search(r"\(\d+ of \d+ layers, not refine\); head keypoints loaded in part \(\d+ of \d+ layers\)", line)
    assert "0 of 2 classes matched by name (not in these weights: blue, red); 2 start from the mean of" in line


@pytest.mark.parametrize(("name", "task"), [("ecseg", "instance-seg"), ("ecpose", "keypoints")])
def test_prediction_with_published_masks_and_poses(
    name: str, task: str, tmp_path: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "--task", task, "--weights", f"{name}-s", str(squares / "images" / "val_0.jpg")]
    line = refused(capsys, *arguments)
    assert f"put its config.json, preprocessor_config.json and model.safetensors into {tmp_path / 'cache'}" in line
    write_folder(tmp_path / "cache" / "weights" / f"{name}-s", name)
    assert run([*arguments, "--threshold", "0", "--device", "cpu", "--no-pictures"]) == 0
    assert Path("predictions/predictions.json").is_file()

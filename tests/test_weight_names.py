"""Weights by the short name of a published model: what a name stands for, and the line when it cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import mvision
from mvision.cli.main import run
from mvision.engine.checkpoint import BEST
from mvision.errors import UserError
from mvision.storage import hub
from mvision.structures.coco_names import coco_with_keypoints
from mvision.weights import resolve_weights, sources, zoo
from mvision.weights.stored import read_header
from tests.reference import build_reference, save_reference
from tests.test_cli import SMALL
from tests.test_zoo import script

NAME = "rtdetr-r18-obj2coco"  # without a checksum, so that random weights can stand for it


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RT-DETR-R18 as transformers stores it, for small pictures."""
    names = [category.name for category in coco_with_keypoints()]
    folder = save_reference(build_reference("r18"), tmp_path_factory.mktemp("published"), names)
    processor = {"size": {"height": 64, "width": 64}, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty working folder, and no network."""
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_reachable", lambda url: False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture
def own_copy(published: Path, cache: Path) -> Path:
    return shutil.copytree(published, cache / "weights" / NAME)


def _refusal(source: str) -> str:
    with pytest.raises(UserError) as error:
        resolve_weights(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_network_the_line_says_which_files_go_where(cache: Path) -> None:
    message = _refusal("dfine-s")
    assert "no download of ustc-community/dfine-small-coco (not in the cache, and the Hub cannot be reached)" in message
    assert "/tree/f79e65b5fbb33ceb9d3ebba042955d7410c608f8" in message
    assert "config.json, preprocessor_config.json and model.safetensors into" in message
    assert message.endswith(f"{cache / 'weights' / 'dfine-s'}/")
    assert "download https://drive.google.com/file/d/1tB8" in _refusal("deim-s")
    assert not cache.exists()


def test_a_name_that_is_nearly_right() -> None:
    assert "no published model has this name; did you mean 'dfine-s'? Else give a run's folder" in _refusal("dfine_s")
    assert "no published model has this name; give a run's folder" in _refusal("yolo11")
    assert "published model" not in _refusal("best.safetensors")
    assert "published model" not in _refusal("runs/nothing/here")


def test_the_name_asks_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def repository(
        name: str, files: object, is_complete: object, revision: str | None, say: object, access: object = None
    ) -> Path:
        asked.append((name, revision))
        raise RuntimeError("enough")

    monkeypatch.setattr(sources, "download_repository", repository)
    for name in ("dfine-s", "dfine-x"):
        assert "(enough)" in _refusal(name)
    _refusal("https://huggingface.co/me/mine")
    _refusal("https://huggingface.co/me/mine/tree/v2")
    model = zoo.MODELS["dfine-s"]
    newest = [("ustc-community/dfine-xlarge-coco", None), ("me/mine", None)]
    assert asked == [(model.hub, model.revision), *newest, ("me/mine", "v2")]


def test_a_file_on_the_web_is_kept_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(url: str, target: Path, say: object) -> Path:
        target.parent.mkdir(parents=True)
        target.write_bytes(b"not safetensors")
        return target

    monkeypatch.setattr(sources, "download_file", file)
    one, other = (resolve_weights(f"https://host/{place}/best.safetensors") for place in "ab")
    assert one.name == other.name == "best.safetensors"
    assert one != other
    assert one.is_relative_to(cache / "weights" / "downloads")
    assert resolve_weights("https://host/../..%2fevil.safetensors").is_relative_to(cache)
    assert "does not end with the name of a file" in _refusal("https://host/")


def test_an_own_copy_is_found_by_its_name(own_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_weights(NAME) == own_copy
    model = mvision.load(NAME)
    assert len(model.config.categories) == 80
    (result,) = model.predict([np.zeros((64, 64, 3), np.uint8)])
    assert len(result.boxes) == len(result.scores)
    assert run(["info", "--weights", NAME]) == 0
    assert f"{NAME}: detection; 80 classes" in capsys.readouterr().out


def test_the_published_checksum_is_compared(own_copy: Path) -> None:
    """Under a name with a known checksum, other weights are refused."""
    moved = own_copy.rename(own_copy.with_name("rtdetr-r18"))
    message = _refusal("rtdetr-r18")
    assert f"{moved / 'model.safetensors'} is not the published file (SHA-256 " in message
    assert "fe87a5a30f5daf29" in message


def test_what_lies_here_wins_and_that_is_said(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(published, NAME)
    with caplog.at_level("INFO", logger="mvision"):
        assert resolve_weights(NAME) == Path(NAME)
    assert caplog.messages == [f"weights {NAME}: the file or folder of this name here, not the published model"]
    caplog.clear()
    with caplog.at_level("INFO", logger="mvision"):
        resolve_weights(f"./{NAME}")
    assert caplog.messages == []


def test_the_run_records_what_it_started_from(
    own_copy: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    data = ["--data", str(squares), "--output", "run", "--init", NAME]
    assert run(["train", *SMALL, *data, "--model", "tiny"]) == 2
    assert "nothing in them fits" in capsys.readouterr().err
    small = ["--image-size=64", "--batch-size=4", "--epochs=1", "--workers=0", "--device=cpu", "--precision=fp32"]
    assert run(["train", *small, *data, "-o", "data.augment.multi_scale=0"]) == 0
    text = f"{NAME} ({own_copy}, Apache-2.0)"
    assert f"weights {text}: backbone loaded; neck loaded;" in capsys.readouterr().out
    header = json.loads(read_header(Path("run") / BEST).metadata["mvision"])
    assert header["started_from"] == text


def test_sources_are_described_for_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = zoo.MODELS["dfine-s"].revision
    assert sources.origin("dfine-s") == f"dfine-s (ustc-community/dfine-small-coco, commit {commit}, Apache-2.0)"
    assert sources.origin(None) is sources.origin(str(tmp_path)) is None
    assert sources.described("me/mine") == "me/mine"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **options: f"/hub/snapshots/{'c' * 40}")
    assert sources.described("me/mine") == f"me/mine (commit {'c' * 40})"


def test_the_release_check(own_copy: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = script("zoo_check")
    table = tmp_path / "table.md"
    annotations = squares / "annotations" / "val.json"
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": 2, "name": "bicycle"}, {"id": 5, "name": "airplane"}]
    annotations.write_text(json.dumps(content))
    assert check.main([NAME, "deim-s", "dfine-x", "--coco", str(squares), "--output", str(table)]) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == [NAME, "deim-s", "dfine-x"]
    assert rows[0][2] == hub.sha256_of(own_copy / "model.safetensors")
    assert rows[0][3] == "49.0"
    assert 0 <= float(rows[0][4]) < 20
    assert rows[0][-1] == "another AP than published"
    assert "Google Drive" in rows[1][-1]
    assert "the Hub cannot be reached" in rows[2][-1]
    assert check.main([NAME]) == 0  # without COCO it has to predict
    out = capsys.readouterr().out
    assert "0 of 3 models are good; not rtdetr-r18-obj2coco, deim-s, dfine-x" in out
    assert "1 of 1 models are good" in out

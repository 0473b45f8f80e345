"""``mvision push`` and loading from the Hub, against a server that speaks the Hub's HTTP API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

import mvision
from mvision.cli.main import run as run_cli
from mvision.storage import hub
from mvision.storage.hub_upload import Upload
from mvision.weights.files import read_weights
from mvision.weights.run_facts import facts_of
from tests.conftest import write_squares
from tests.fake_hub import FakeHub, running_hub
from tests.small_runs import run_in_process

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "README.md",
    "config.json",
    "config.yaml",
    "metrics.json",
    "model.safetensors",
    "predictions.jpg",
    "results.png",
}
THEIRS = {"config.json": b'{"model_type": "rt_detr"}', "model.safetensors": b"of another library"}


@pytest.fixture(name="trained", scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secret-place")
    return run_in_process(write_squares(root / "squares"), root / "run", train__epochs=1, data__augment__mosaic=0.0)


@pytest.fixture(name="server")
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub of this test; what ``HF_ENDPOINT``, ``HF_HOME`` and others set before the client is imported."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.chdir(tmp_path)
        yield server


def push(trained: Path, name: str = "me/squares", *options: str) -> None:
    assert run_cli(["push", str(trained), name, *options]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run_cli(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def assert_same_weights(model: mvision.Model, trained: Path) -> None:
    expected, found = read_weights(trained).tensors, model.state_dict()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert expected.keys() <= found.keys()


def test_a_run_is_pushed_and_loads_bit_equal(
    trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(trained)
    printed = capsys.readouterr().out
    repo = server.repos["me/squares"]
    assert f"pushed: {server.url}/me/squares/commit/{repo.branches['main']}\n" in printed
    assert 'load it with mvision.load("me/squares")\n' in printed
    assert set(repo.files) == FILES | {".gitattributes"}
    assert repo.files["model.safetensors"] == (trained / "best.safetensors").read_bytes()
    model = mvision.load("me/squares")
    assert_same_weights(model, trained)
    assert [category.name for category in model.categories] == ["blue", "red"]
    picture = str(trained.parent / "squares" / "images" / "val_0.jpg")
    for weights in (str(trained), "me/squares"):
        predict = ["predict", picture, "--weights", weights, "--precision=fp32", "--device=cpu", "--no-pictures"]
        assert run_cli([*predict, "--threshold=0.01", "--output", weights.replace("/", "_")]) == 0
    first, second = (Path(name.replace("/", "_"), "predictions.json") for name in (str(trained), "me/squares"))
    assert json.loads(first.read_text()) == json.loads(second.read_text()) != []


def test_nothing_of_this_machine_is_in_the_repository(trained: Path, server: FakeHub) -> None:
    push(trained)
    assert trained.parent.name == trained.parts[-2]
    for name, content in server.repos["me/squares"].files.items():
        assert trained.parent.name.encode() not in content, name
    assert b"root: squares\n" in server.repos["me/squares"].files["config.yaml"]


def test_pushed_again_the_same_is_no_commit(trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    push(trained, "me/squares", "--message", "first")
    repo = server.repos["me/squares"]
    assert repo.messages[repo.branches["main"]] == "first"
    push(trained)
    assert len(repo.commits) == 2
    assert "nothing has changed since" in capsys.readouterr().out
    push(trained, "me/squares", "--no-pictures")
    assert set(repo.files) == FILES - {"predictions.jpg"} | {".gitattributes"}
    assert b"predictions.jpg" not in repo.files["README.md"]
    assert repo.messages[repo.branches["main"]] == f"Push model with mvision {mvision.__version__}"


METRICS = {
    "detection": {"AP": 0.4126, "AP_large": -1.0, "AP/red": 0.25, "threshold": 0.31, "threshold/red": 0.4, "D-ECE": 0.1}
}


def test_the_card_has_metadata_and_figures(trained: Path, server: FakeHub) -> None:
    (trained / "metrics.json").write_text(json.dumps(METRICS))
    push(trained, "me/squares", "--license=apache-2.0", "--dataset=me/data")
    card = ModelCard(server.repos["me/squares"].files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "mvision",
        "object-detection",
        "apache-2.0",
    )
    assert data["datasets"] == ["me/data"]
    assert {"mvision", "detection"} <= set(data["tags"])
    [entry] = data["model-index"]
    [result] = entry["results"]
    assert (entry["name"], result["dataset"]["type"], result["dataset"]["split"]) == ("squares", "me/data", "val")
    assert [(m["name"], m["value"]) for m in result["metrics"]] == [("AP", 0.4126), ("D-ECE", 0.1)]
    for row in (
        "| AP | 0.413 |",
        "| AP\\_large | - |",
        "| threshold | 0.310 |",
        "| red | 0.250 | 0.400 |",
        "squares (4 images, 4 for validation)",
    ):
        assert row in card.text
    for part in (
        "| 0 | blue |",
        "](predictions.jpg)",
        "](results.png)",
        "These weights: apache-2.0.",
        "| epochs | 1 |",
    ):
        assert part in card.text


def test_the_code_of_the_card_runs_as_it_is(trained: Path, server: FakeHub, tmp_path: Path) -> None:
    """In a process of its own that knows the Hub by HF_ENDPOINT, as a reader of the card would paste it."""
    picture = trained.parent / "squares" / "images" / "val_0.jpg"
    push(trained, "me/squares", "--example", str(picture), "--revision", "v1")
    files = server.repos["me/squares"].at("v1")[1]
    text = files["README.md"].decode()
    assert {"example.jpg", "example-result.jpg"} <= set(files)
    assert "](example-result.jpg)" in text
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert 'mvision.load("me/squares@v1")' in code
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "new"), "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    code += "\nassert picture.endswith('example.jpg')\nprint(len(found), model.tasks)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("['detection']")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "them/squares",
            [],
            r"push them/squares: it cannot be created: the token in HF_TOKEN has no right .*that may write$",
        ),
        ("them/open", [], r"the token in HF_TOKEN has no right to write there \(.*no write access.*--create-pr"),
        ("me/rtdetr", [], r"the name is taken: .* another kind of model \(config.json, model.safetensors\)"),
        ("me/open", ["--private"], "--private is for new repositories, and this one exists and is public"),
        ("me/open", ["--license", "gpl"], r'nothing was pushed: .*"license" must be one of apache-2.0, mit'),
        ("me/a/b", [], "push 'me/a/b': not the name of a repository .*; give user/name"),
        ("me/sq uares", [], "not the name of a repository"),
        ("me/open", ["--create-pr", "--revision=v1"], "leave out either the branch v1 or it"),
        ("me/none", ["--create-pr"], "there is no such repository to propose a pull request to"),
    ],
)
def test_what_the_hub_or_the_name_forbids(
    name: str, options: list[str], message: str, trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner in ("me", "them"):
        server.add(f"{owner}/open", {"README.md": b"---\nlicense: mit\n---\n"})
    server.add("me/rtdetr", THEIRS)
    before = {name: dict(repo.branches) for name, repo in server.repos.items()}
    assert re.search(message, refused(capsys, "push", str(trained), name, *options))
    assert {name: repo.branches for name, repo in server.repos.items()} == before


def test_tokens_and_the_network(
    trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("push", str(trained), "me/squares")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token in HF_TOKEN is not valid there; log in with 'hf auth login'" in refused(capsys, *command)
    monkeypatch.delenv("HF_TOKEN")
    assert f"there is no token for {server.url}; log in with" in refused(capsys, *command)
    Path(constants.HF_TOKEN_PATH).write_text("hf_mine")
    push(trained, "squares")  # of the login, whose user it is too
    assert list(server.repos) == ["me/squares"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached; nothing was pushed" in refused(capsys, *command)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in refused(capsys, *command)


def test_what_is_no_run(trained: Path, server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert "this run has no best.safetensors yet" in refused(capsys, "push", str(begun), "me/squares")
    assert "no such file or folder" in refused(capsys, "push", "runs/detection/99", "me/squares")
    assert "an exported model" in refused(capsys, "push", "best.onnx", "me/squares")
    (begun / "best.safetensors").write_bytes((trained / "best.safetensors").read_bytes())
    (begun / "metrics.json").write_text("[1]")
    assert "metrics.json: no figures by task" in refused(capsys, "push", str(begun), "me/squares")
    assert "example.png" in refused(capsys, "push", str(trained), "me/squares", "--example", "example.png")
    assert server.asked == []


def test_an_upload_that_fails_says_what_it_left(
    trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.broken = "/api/models/me/squares/commit"
    line = refused(capsys, "push", str(trained), "me/squares")
    assert "nothing was pushed: " in line
    assert "the disk of the Hub is full" in line
    assert line.endswith("; the repository me/squares was created and is empty, so push again")
    assert len(server.repos["me/squares"].commits) == 1
    server.broken = None
    push(trained)


def test_private_repositories(
    trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(trained, "me/hidden", "--private")
    assert server.repos["me/hidden"].private
    monkeypatch.setenv("HF_TOKEN", "hf_theirs")
    assert "no such repository on the Hub, or it is not public" in refused(capsys, "info", "--weights", "me/hidden")
    assert_same_weights(mvision.Model.from_pretrained("me/hidden", token="hf_mine"), trained)
    assert_same_weights(
        mvision.load("me/hidden"), trained
    )  # from the cache, where the Hub does not let it be looked up


def test_branches_and_pull_requests(trained: Path, server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("them/open", {"README.md": b"---\nlicense: mit\n---\n"})
    push(trained, "them/open", "--create-pr")
    assert f"pushed: {server.url}/them/open/discussions/1\n" in capsys.readouterr().out
    theirs = server.repos["them/open"]
    assert "model.safetensors" not in theirs.files
    assert "model.safetensors" in theirs.at("refs/pr/1")[1]
    push(trained, "me/squares", "--revision", "small")
    repo = server.repos["me/squares"]
    assert "model.safetensors" not in repo.files
    assert_same_weights(mvision.load("me/squares@small"), trained)
    facts = facts_of(mvision.Model.from_pretrained("me/squares", revision="small"))[0]
    assert facts.started_from == f"me/squares@small (commit {repo.branches['small']})"
    assert facts.base_model == "me/squares"
    other = mvision.create_model("tiny", num_classes=2, image_size=64)
    other.push_to_hub("me/squares", branch="small")  # a branch moves, so the copy in the cache is not what it is now
    assert mvision.Model.from_pretrained("me/squares", revision="small").config == other.config
    assert "the Hub no longer has this revision" in refused(capsys, "info", "--weights", "me/squares@gone")


def test_what_was_loaded_once_needs_no_network(
    trained: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push(trained)
    mvision.load("me/squares")
    monkeypatch.setattr(hub, "_reachable", lambda url: False)
    assert_same_weights(mvision.load("me/squares"), trained)
    assert_same_weights(mvision.Model.from_pretrained("me/squares", local_files_only=True), trained)
    with pytest.raises(mvision.UserError, match="not in the cache"):
        mvision.Model.from_pretrained("me/squares", cache_dir="another")
    monkeypatch.setattr(Upload, "connect", lambda self: pytest.fail("asked the Hub"))
    assert "not a repository of the Hub" in refused_load(str(trained))


def refused_load(source: str) -> str:
    with pytest.raises(mvision.UserError) as caught:
        mvision.Model.from_pretrained(source, revision="main")
    return str(caught.value)

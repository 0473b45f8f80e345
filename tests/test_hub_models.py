"""Model cards, and what a model itself does on the Hub: ``save_pretrained``, ``push_to_hub``, ``from_pretrained``."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin

import mvision
from mvision.cli.main import run as run_cli
from mvision.deploy import loading
from mvision.storage.run_folder import BEST
from mvision.structures import Category
from mvision.weights import push, save_weights
from mvision.weights.card import is_own_text, merged, read_card
from mvision.weights.run_facts import _public
from mvision.weights.stored import read_header
from tests.fake_hub import FakeHub
from tests.test_push import local_hub as local_hub  # the fixture ``server``

PEOPLE = ["left_eye", "right_eye"]
SMALL = {"image_size": 64, "neck__embed_dim": 32, "neck__num_heads": 4, "neck__ffn_dim": 32}


@pytest.fixture(name="folder")
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*tasks: str) -> mvision.Model:
    torch.manual_seed(0)
    categories = [Category(id=0, name="cat|dog"), Category(id=1, name="person", keypoints=PEOPLE)]
    return mvision.create_model("tiny", tasks=list(tasks or ["detection"]), categories=categories, **SMALL).eval()


def code_of(text: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    return code


@pytest.mark.parametrize(
    ("tasks", "tag"),
    [
        (["detection"], "object-detection"),
        (["instance-seg"], "image-segmentation"),
        (["keypoints"], "keypoint-detection"),
        (["semantic-seg"], "image-segmentation"),
        (["detection", "keypoints", "semantic-seg"], "object-detection"),
    ],
)
def test_a_saved_model_of_every_task(tasks: list[str], tag: str, folder: Path) -> None:
    model = make(*tasks)
    model.save_pretrained(folder, model_card_kwargs={"license": "mit", "tags": ["cats"]})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == tag
    assert {"cats", *tasks} <= set(card.data.tags)
    assert "| 0 | cat\\|dog | - |" in card.text
    assert "## Results" not in card.text
    loaded = mvision.Model.from_pretrained(folder)
    assert loaded.tasks == tasks
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    names: dict = {}
    exec(code_of(card.text), names)
    assert names["found"].size == (480, 640)


def test_it_is_a_model_of_the_mixin(folder: Path) -> None:
    model = make()
    assert isinstance(model, ModelHubMixin)
    assert copy.deepcopy(model).config == model.config
    with pytest.raises(mvision.UserError, match=r"there is no 'licence'; did you mean 'license'\?"):
        model.save_pretrained(folder, model_card_kwargs={"licence": "mit"})
    with pytest.raises(TypeError, match="branch without push_to_hub"):
        model.save_pretrained(folder, branch="v1")
    (folder / "file").write_text("in the way")
    with pytest.raises(mvision.UserError, match="cannot be written"):
        model.save_pretrained(folder / "file" / "model")


def test_every_public_way_to_a_model_brings_its_way_to_the_hub() -> None:
    """Models lie below what reads and writes them, so that one of the modules above has to introduce them."""
    assert {mvision._LAZY[name] for name in ("Model", "create_model")} == {push.__name__}
    assert loading.push is push
    assert mvision.Model.hub is not None


def test_a_model_with_a_part_of_the_tasks(folder: Path) -> None:
    model = make("detection", "keypoints")
    figures = {"detection": {"AP": 0.5}, "keypoints": {"AP": 0.25}}
    save_weights(model, folder / BEST, {"epoch": 7, "metrics": figures})
    mvision.load(folder / BEST, tasks=["keypoints"]).save_pretrained("saved")
    header = json.loads(read_header(Path("saved/model.safetensors")).metadata["mvision"])
    assert header["metrics"] == {"keypoints": {"AP": 0.25}}
    assert mvision.load("saved").tasks == ["keypoints"]


def save_run(folder: Path) -> mvision.Model:
    """The weights of a run, with figures in their header and a file of the backbone's on this machine."""
    model = make()
    model.config.backbone.weights = "/home/somebody/backbone.safetensors"
    started_from = "dfine-s (/home/somebody/dfine_s.pth, Apache-2.0)"
    extra = {"epoch": 7, "metrics": {"detection": {"AP": 0.5}}, "started_from": started_from}
    save_weights(model, folder / "run" / BEST, extra)
    return mvision.load(folder / "run")


def test_the_card_of_weights_without_the_rest_of_their_run(folder: Path) -> None:
    save_run(folder).save_pretrained("saved")
    card = ModelCard.load("saved/README.md")
    assert "| AP | 0.500 |" in card.text
    assert "| Epoch | 7 |" in card.text
    assert card.data.base_model == "ustc-community/dfine-small-coco"
    assert "They come from dfine-s (ustc-community/dfine-small-coco, " in card.text
    header = json.loads(read_header(Path("saved/model.safetensors")).metadata["mvision"])
    assert (header["epoch"], header["metrics"]) == (7, {"detection": {"AP": 0.5}})
    assert header["started_from"].startswith("dfine-s (ustc-community/dfine-small-coco, ")
    assert all(b"somebody" not in path.read_bytes() for path in Path("saved").iterdir())


def test_figures_are_those_of_these_weights_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_run(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with caplog.at_level("INFO", "mvision"):
        model.save_pretrained("saved")
    assert "run/best.safetensors any more, so that the card has no figures" in caplog.text
    assert "0.500" not in Path("saved/README.md").read_text()
    header = json.loads(read_header(Path("saved/model.safetensors")).metadata["mvision"])
    assert header["metrics"] == {}
    assert mvision.load("saved").config.backbone.weights is None


def test_records_name_no_file_of_this_machine() -> None:
    assert _public("me/mine (commit abc)") == ("me/mine (commit abc)", "me/mine")
    assert _public("deim-s (/home/somebody/deim.pth, Apache-2.0)")[0].startswith("deim-s (DEIM-D-FINE, ")
    assert _public(None) == (None, None)


def test_what_people_wrote_into_a_card_stays(server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    make().push_to_hub("me/cats", model_card_kwargs={"license": "mit", "datasets": ["me/data"]})
    repo = server.repos["me/cats"]
    first = repo.files["README.md"].decode()
    make("keypoints").push_to_hub("me/cats", commit_message="poses")
    second = ModelCard(repo.files["README.md"].decode())
    assert (second.data.license, second.data.datasets, second.data.pipeline_tag) == (
        "mit",
        ["me/data"],
        "keypoint-detection",
    )
    assert "These weights: mit." in second.text
    assert repo.messages[repo.branches["main"]] == "poses"
    by_hand = first.replace("## Classes", "Only for indoor cats.\n\n## Classes").replace(
        "license: mit", "license: mit\nco2: 3"
    )
    repo.commit("main", {**repo.files, "README.md": by_hand.encode()}, "by hand")
    save_weights(make(), Path("run") / BEST)
    assert run_cli(["push", "run", "me/cats", "--license=apache-2.0"]) == 0
    assert "note: README.md of me/cats was written by people: its text stays" in capsys.readouterr().out
    third = ModelCard(repo.files["README.md"].decode())
    assert third.text == ModelCard(by_hand).text
    assert (third.data.license, third.data["co2"], third.data.pipeline_tag) == ("apache-2.0", 3, "object-detection")


def test_whose_text_a_card_is() -> None:
    card = make().generate_model_card(repo_id="me/cats")
    assert is_own_text(card.text)
    assert is_own_text(card.text.replace("\n", "\r\n"))
    assert not is_own_text(card.text.replace("cat", "Cat"))
    assert not is_own_text("---\nlicense: mit\n---\n")
    assert merged(card, ModelCard("---\nlicense: mit\n---\n"))[1] is False  # as the Hub's page for new models makes it
    assert card.data.license == "mit"
    with pytest.raises(mvision.UserError, match=r"push me/cats: the metadata in its README.md cannot be read"):
        read_card("---\na: [\n---\n", "push me/cats")


def test_a_fused_model_is_not_said_to_be_trainable() -> None:
    assert "--init me/cats" in make().generate_model_card(repo_id="me/cats").text
    assert "--init" not in make().fuse().generate_model_card(repo_id="me/cats").text

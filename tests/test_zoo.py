"""The table of published models, what is printed of it, and that its figures are those of the shipped configs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mvision.cli.main import run
from mvision.commands import train
from mvision.commands.info import count_parts
from mvision.commands.models import models_json, models_text
from mvision.config import load_config, shipped_configs
from mvision.errors import UserError
from mvision.model import Model
from mvision.structures.coco_names import coco_with_keypoints
from mvision.weights import zoo
from mvision.weights.start import published_start
from mvision.weights.stored import without_data
from mvision.weights.zoo import MODELS

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    """A script of docs/scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _built(name: str, with_data: bool = False) -> Model:
    config = load_config(name).model
    config.categories = coco_with_keypoints()
    if list(config.heads) == ["keypoints"]:
        config.categories = [category for category in config.categories if category.keypoints]
    return (Model(config) if with_data else without_data(lambda: Model(config))).eval()


def test_every_model_can_be_found_and_says_where_it_is() -> None:
    for name, model in MODELS.items():
        assert name == model.name
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)
        assert zoo.could_be_name(name)
        assert (
            model.hub or model.is_download or (model.url and model.url.startswith("https://drive.google.com/file/d/"))
        )
        assert model.task in ("detection", "instance-seg", "keypoints")
        assert model.config in shipped_configs() or not model.size.counted
        assert model.revision is None or re.fullmatch("[0-9a-f]{40}", model.revision)
        assert model.sha256 is None or (re.fullmatch("[0-9a-f]{64}", model.sha256) and model.revision)
        assert 30 < model.ap < (80 if model.task == "keypoints" else 60)
    hubs = [model.hub for model in MODELS.values() if model.hub]
    assert len(set(hubs)) == len(hubs)
    for field in ("revision", "sha256", "file", "url"):
        values = [getattr(model, field) for model in MODELS.values() if getattr(model, field)]
        assert len(set(values)) == len(values), field


def test_silu_is_said_where_the_authors_have_it() -> None:
    """No tensor tells it, so the reader goes by this table."""
    relu = {"rtdetr", "rtdetrv2", "dfine", "ecpose", "detrpose", "mask-rtdetr"}
    odd = {name for name, model in MODELS.items() if (model.act == "relu") != (model.family in relu)}
    assert odd == {"deim-x-obj2coco"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("dfine_n", 3.783), ("dfine_s", 10.322), ("dfine_m", 19.590), ("dfine_l", 31.290), ("dfine_x", 62.715)],
)
def test_dfine_configs_have_the_published_size(name: str, parameters: float) -> None:
    """With what only training needs, as transformers counts them; the table has what is left for prediction."""
    counted = sum(parameter.numel() for parameter in _built(name).parameters()) / 1e6
    assert counted == pytest.approx(parameters, abs=6e-4)
    assert 0.97 * counted < zoo.SIZES[name].parameters < counted + 0.05


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ecdet_s", 9.88), ("ecdet_m", 19.43), ("ecdet_l", 32.97), ("ecdet_x", 49.94), ("ecseg_s", 9.88 + 0.53)],
)
def test_edgecrafter_configs_have_the_size_of_the_original_code(name: str, parameters: float) -> None:
    counted = sum(parameter.numel() for parameter in _built(name).parameters()) / 1e6
    assert counted == pytest.approx(parameters, abs=6e-3)


@pytest.mark.parametrize("name", ["rtdetr_r18", "dfine_l", "ecdet_s", "ecseg_m", "ecpose_s", "detrpose_n"])
def test_sizes_are_those_that_are_counted(name: str) -> None:
    affine = load_config(name).model.backbone.name == "hgnetv2_b0"  # its scales decide on what can be folded
    total = count_parts(_built(name, with_data=affine).fuse())[-1]
    assert zoo.SIZES[name].parameters == round(total.parameters / 1e6, 1)
    assert zoo.SIZES[name].gflops == round(total.flops / 1e9, 1)


def test_the_page_is_that_of_the_table() -> None:
    page = script("zoo_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python docs/scripts/zoo_page.py"


def test_the_list_fits_a_terminal_and_has_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    names = [line.split()[0] for line in lines if line.split() and line.split()[0] in MODELS]
    assert names == sorted(MODELS, key=lambda name: ["detection", "instance-seg", "keypoints"].index(MODELS[name].task))
    assert [line for line in lines if line in ("detection", "instance-seg", "keypoints")] == [
        *("detection", "instance-seg", "keypoints")
    ]
    row = next(line for line in lines if line.startswith("dfine-s-obj2coco "))
    assert row.split() == [
        *("dfine-s-obj2coco", "O365,", "COCO", "50.7", "10.3", "25.5", "Apache-2.0"),
        "ustc-community/dfine-small-obj2coco",
    ]
    assert re.search(r"^deim-rtdetrv2-r18 +COCO +49\.0 +~20 +~60 .*Google Drive", "\n".join(lines), re.MULTILINE)


def test_one_model_in_detail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path))
    text = models_text("dfine-s")
    for part in ("48.5 on COCO val2017", MODELS["dfine-s"].revision, MODELS["dfine-s"].sha256, "--init dfine-s"):
        assert str(part) in text
    assert "your copy" not in text
    drive = models_text("deim-s")
    assert f"save it as {tmp_path / 'weights' / 'deim-s.pth'}" in drive
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "deim-s.pth").touch()
    own = next(line for line in models_text("deim-s").splitlines() if line.startswith("your copy"))
    assert own.split() == ["your", "copy", str(tmp_path / "weights" / "deim-s.pth")]


def test_as_json() -> None:
    listed = json.loads(models_json(task="detection"))
    assert [entry["name"] for entry in listed] == [name for name in MODELS if MODELS[name].task == "detection"]
    poses = json.loads(models_json(task="keypoints"))
    assert next(entry["name"] for entry in poses if entry["data"] == "CrowdPose") == "detrpose-n-crowdpose"
    (one,) = json.loads(models_json("dfine-x"))
    assert (one["ap"], one["weights_licence"], one["size"]["counted"], one["act"]) == (55.8, "Apache-2.0", True, "relu")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["dfine_s"], "model dfine_s: no published model has this name; did you mean 'dfine-s'?"),
        (["zzz"], "model zzz: no published model has this name; 'mvision models' lists their names"),
        (["--task", "detect"], "--task detect: there is no published model of this task; did you mean 'detection'?"),
    ],
)
def test_unknown_names_suggest_the_nearest(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert run(["models", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_nothing_heavy_is_imported_for_the_list() -> None:
    code = (
        "import sys\nfrom mvision.cli.main import run\nrun(['models'])\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'huggingface_hub', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_files_are_known_by_name() -> None:
    assert zoo.of_file("dfine_l_obj2coco_e25.pth") is MODELS["dfine-l-obj2coco"]
    assert zoo.of_file("RTv4-S-hgnet (1).pth") is MODELS["rtdetrv4-s"]
    assert zoo.of_file("deim-x.pth") is MODELS["deim-x"]
    assert zoo.of_file("best_stg2.pth") is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *[("dfine_s", "dfine-s"), ("rtdetr_r50", "rtdetr-r50"), ("rtmaskformer_r50", "rtdetr-r50")],
        *[("ecseg_s", "ecseg-s"), ("ecdet_m", "ecdet-m"), ("ecpose_l", "ecpose-l"), ("detrpose_n", "detrpose-n")],
        *[("small", "dfine-s"), ("base", "dfine-m"), ("large", "dfine-l"), ("resnet50d", "rtdetr-r50")],
    ],
)
def test_a_training_says_what_it_could_start_from(model: str, name: str) -> None:
    line = published_start(load_config(model).model)
    assert line is not None
    assert f"--init {name} " in line
    assert ("have this architecture" in line) is (model != "resnet50d")
    assert ("have this backbone" in line) is (model == "resnet50d")


@pytest.mark.parametrize("model", ["tiny", "rtkeypoint_192", "resnet18d", "convnext_tiny"])
def test_nothing_is_said_where_nothing_fits(model: str) -> None:
    """resnet18d alone lacks the projection on the first shortcut that the published ResNet-18 has."""
    assert published_start(load_config(model).model) is None


def test_what_is_said_depends_on_neck_decoder_and_pretrained_weights() -> None:
    config = load_config("dfine_s").model
    config.neck.depth = 2
    assert "have this backbone" in str(published_start(config))
    config.backbone.pretrained = True
    assert published_start(config) is None
    config = load_config("dfine_s", assignments=["model.heads.detection.num_queries=100"]).model
    assert "have this architecture" in str(published_start(config))
    config = load_config("dfine_s", assignments=["model.heads.detection.act=silu"]).model
    assert "have this backbone" in str(published_start(config))


@pytest.mark.parametrize("name", ["dfine_s", "dfine_n", "rtdetr_r18", "rtdetr_r50"])
def test_weights_bring_the_training_settings_of_their_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """small has the backbone of dfine_s, and rtmaskformer_r50 that of rtdetr_r50."""
    published = load_config(name)
    monkeypatch.setattr(train, "read_weights", lambda *source: SimpleNamespace(config=published.model))
    assert train.run_config(init=name.replace("_", "-")) == published


def test_get_names_the_unknown() -> None:
    with pytest.raises(UserError, match="no published model has this name"):
        zoo.get("x" * 1000)

"""D-FINE as transformers writes it: the same numbers, what the tensors decide, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")

from mvision import UserError, load
from mvision.structures.coco_names import COCO
from mvision.structures.objects365_names import OBJECTS365, UNUSED, objects365_categories
from mvision.weights import read_weights
from mvision.weights.structure import Structure
from tests.dfine_reference import SIZES, build, differences, narrow, open_ours, settings
from tests.reference import random_images, save_reference

# Name -> settings of the library's model, and the value of its tensor reg_scale where the description has another.
MODELS: dict[str, tuple[dict[str, Any], float | None]] = {
    "N": (settings("n"), None),
    "S": (settings("s"), None),
    "M, narrow": (narrow(64, 64, **{k: settings("m")[k] for k in ("backbone_config", "encoder_in_channels")}), None),
    "X, narrow": (narrow(96, 64, hidden_expansion=1.0, depth_mult=1.0), 8.0),
    "odd": (
        narrow(40, 48, max_num_bins=16, decoder_n_points=[2, 1, 5], decoder_attention_heads=4, hidden_expansion=0.7),
        3.3,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_transformers(name: str, tmp_path: Path) -> None:
    given, scale = MODELS[name]
    theirs = build(given, scale, num_labels=7)
    ours = open_ours(theirs, tmp_path)
    for size in SIZES:
        assert max(differences(theirs, ours, size)) <= 1e-9


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return build(narrow(32, 32, num_queries=10), 6.0, num_labels=3)


@pytest.fixture
def folder(reference: nn.Module, tmp_path: Path) -> Path:
    return save_reference(reference, tmp_path, ["cat", "dog", "bird"])


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    described = json.loads(path.read_text())
    for key, value in changes.items():
        section = described["backbone_config"] if key.startswith("backbone__") else described
        section[key.removeprefix("backbone__")] = value
    path.write_text(json.dumps(described))


def test_tensors_win_over_the_description(folder: Path) -> None:
    read = read_weights(folder)
    assert read.config.heads["detection"].bin_scale == 6.0
    assert read.notes == ["bin_scale is 6 as the tensors say, not 4.0 as config.json does"]
    describe(folder, reg_scale=6.0)
    assert read_weights(folder).notes == []


def test_old_and_new_names_of_tensors(reference: nn.Module, folder: Path) -> None:
    """Files keep the names from before version 5; models have other ones, and old ones had heads outside."""
    images = random_images(1, 160, 96)
    with torch.no_grad():
        expected = load(folder)(images)["detection"]
    for prefix in ("model.decoder.", ""):
        tensors = {}
        for name, value in reference.state_dict().items():
            inner = name.removeprefix("model.decoder.")
            tensors[prefix + inner if inner.startswith(("class_embed", "bbox_embed")) else name] = value.clone()
        assert any(".mlp.layers.0." in name for name in tensors)
        save_file(tensors, folder / "model.safetensors")
        with torch.no_grad():
            found = load(folder)(images)["detection"]
        assert torch.equal(found["logits"], expected["logits"])
        assert torch.equal(found["boxes"], expected["boxes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_activation_function": "silu"}, "decoder_activation_function is 'silu', and only 'relu'"),
        ({"learn_initial_query": True}, "learn_initial_query is True"),
        ({"decoder_layers": 6}, "decoder_layers is 6, but by the tensors it is 2"),
        ({"encoder_hidden_dim": 256}, "encoder_hidden_dim is 256, but by the tensors it is 32"),
        ({"feat_strides": [4, 8, 16]}, r"feat_strides is \[4, 8, 16\], but by the tensors it is \[8, 16, 32\]"),
        ({"eval_idx": 0}, "eval_idx is 0, and only the last layer can predict"),
        ({"backbone__model_type": "swin"}, "backbone_config.model_type is 'swin'"),
        ({"backbone_config": 3}, "backbone_config is 3, and has to be a JSON object"),
        ({"encoder_activation_function": "tanh"}, "attention_act: input should be"),
        ({"model_type": "deimv2"}, "model_type is 'deimv2'; rt_detr, rt_detr_v2, d_fine, and EdgeCrafter's models"),
        ({"num_queries": -1}, "num_queries"),
    ],
)
def test_descriptions_of_other_models(folder: Path, changes: dict[str, Any], message: str) -> None:
    describe(folder, **changes)
    with pytest.raises(UserError, match=message) as failure:
        load(folder)
    assert "\n" not in str(failure.value)
    assert str(folder) in str(failure.value)


def test_points_of_files_without_the_buffer_that_tells_them(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_points_scale")}
    assert len(without) < len(tensors)
    save_file(without, folder / "model.safetensors")
    assert read_weights(folder).config.heads["detection"].num_points == [3, 6, 3]
    describe(folder, decoder_n_points="many")
    with pytest.raises(UserError, match="decoder_n_points is 'many'"):
        load(folder)


def test_classes(folder: Path) -> None:
    assert [category.name for category in load(folder).categories] == ["cat", "dog", "bird"]
    official = [UNUSED, *OBJECTS365]
    assert len({category.name for category in official}) == 366
    assert (OBJECTS365[0].name, OBJECTS365[-1].id, OBJECTS365[265].name) == ("person", 365, "sandwich")
    names = [category.name.title() for category in official]
    for given in (names, [f"LABEL_{index}" for index in range(366)], [*names[1:], "LABEL_365"]):
        assert objects365_categories(given) == official
    assert objects365_categories(names[:365]) is None
    assert objects365_categories([f"thing {index}" for index in range(366)]) is None
    assert len(COCO) == 80


@pytest.mark.parametrize("name", [f"hgnetv2_b{number}" for number in range(7)])
def test_every_backbone_is_told_by_its_tensors(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, features_only=True, out_indices=(1, 2, 3))
    tensors = {f"backbone.net.{key}": value for key, value in net.state_dict().items()}
    tensors |= {f"neck.projections.{level}.conv.weight": torch.zeros(1) for level in range(3)}
    assert Structure(tensors, Path("a")).backbone()["name"] == name

"""Folders in Hugging Face's format: which are read, how their tensors and classes are called, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")

from mvision import UserError, load
from mvision.config import load_config
from mvision.structures.coco_names import COCO, coco_categories
from mvision.weights.rtdetr import mvision_name, read_published
from tests.reference import MODELS, build_reference, random_images, save_reference

# As in the published files: Pascal VOC's words where COCO has others.
VOC = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor"}
VOC |= {"potted plant": "pottedplant", "dining table": "diningtable"}


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return build_reference("r18", num_labels=3, decoder_layers=1, num_queries=20)


@pytest.fixture
def folder(reference: nn.Module, tmp_path: Path) -> Path:
    return save_reference(reference, tmp_path, ["cat", "dog", "bird"])


def change(folder: Path, **settings: Any) -> None:
    """Other values in ``config.json``; ``backbone__x`` is one of the backbone's."""
    described = json.loads((folder / "config.json").read_text())
    for key, value in settings.items():
        if key.startswith("backbone__"):
            described["backbone_config"][key.removeprefix("backbone__")] = value
        else:
            described[key] = value
    (folder / "config.json").write_text(json.dumps(described))


def test_coco_has_80_classes_with_gaps() -> None:
    ids = {category.name: category.id for category in COCO}
    assert len(COCO) == 80
    assert (ids["person"], ids["stop sign"], ids["backpack"], ids["couch"], ids["tv"]) == (1, 13, 27, 63, 72)
    assert (ids["toilet"], ids["book"], ids["toothbrush"]) == (70, 84, 90)


def test_coco_classes_get_coco_ids_in_any_spelling() -> None:
    names = [VOC.get(category.name, category.name) for category in COCO]
    assert coco_categories(names) == COCO
    backwards = coco_categories(names[::-1])
    assert backwards == COCO[::-1]
    assert coco_categories(names[:79]) is None
    assert coco_categories([*names[:79], "unicorn"]) is None


def test_names_and_ids_of_a_published_model(reference: nn.Module, folder: Path) -> None:
    config = read_published(folder).config
    assert [(category.id, category.name) for category in config.categories] == [(0, "cat"), (1, "dog"), (2, "bird")]
    change(folder, id2label={"0": "cat"})
    config = read_published(folder).config
    assert [category.name for category in config.categories] == ["cat", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_shipped_configs_describe_the_published_models(name: str, tmp_path: Path) -> None:
    """Loading weights, and training the shipped config, are about the same architecture."""
    with torch.device("meta"):
        from transformers import RTDetrConfig, RTDetrResNetConfig

        backbone, rest = MODELS[name]
        described = RTDetrConfig(backbone_config=RTDetrResNetConfig(out_indices=[2, 3, 4], **backbone), **rest)
    described.id2label = {index: VOC.get(category.name, category.name) for index, category in enumerate(COCO)}
    described.save_pretrained(tmp_path)
    save_file({"model.decoder.class_embed.0.bias": torch.zeros(80)}, tmp_path / "model.safetensors")
    published = read_published(tmp_path).config
    shipped = load_config(f"rtdetr_{name}", tasks=["detection"]).model
    shipped.categories = COCO
    assert published == shipped


def test_every_tensor_has_a_name_in_the_model(reference: nn.Module, folder: Path) -> None:
    ours = set(load(folder).state_dict())
    for name in load_file(folder / "model.safetensors"):
        assert mvision_name(name) in ours, name


def test_old_and_new_names_of_tensors(reference: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Files keep the names from before version 5; models have other ones, and old ones had heads outside."""
    expected = load(folder)
    images = random_images(1, 96, 96)
    for prefix in ("model.decoder.", ""):
        tensors = {}
        for name, value in reference.state_dict().items():
            inner = name.removeprefix("model.decoder.")
            tensors[prefix + inner if inner.startswith(("class_embed", "bbox_embed")) else name] = value
        assert any(".o_proj." in name for name in tensors)
        tensors["model.anchors"] = torch.zeros(1)  # computed here
        save_file(tensors, folder / "model.safetensors")
        with torch.no_grad():
            found, wanted = (model(images)["detection"] for model in (load(folder), expected))
        assert torch.equal(found["logits"], wanted["logits"])
        assert torch.equal(found["boxes"], wanted["boxes"])


def test_image_size_and_normalisation_of_the_processor(folder: Path) -> None:
    assert load(folder).config.image_size == (640, 640)
    processor: dict[str, Any] = {"size": {"height": 320, "width": 480}, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load(folder).config.image_size == (320, 480)
    assert load(folder).backbone.mean is None
    processor |= {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model = load(folder)
    assert model.config.backbone.normalize == "auto"
    assert torch.allclose(model.backbone.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.allclose(model.backbone.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "detr"}, "model_type is 'detr'; rt_detr, rt_detr_v2, d_fine, and EdgeCrafter's models"),
        ({"normalize_before": True}, "normalize_before is True, and only False can be read"),
        ({"learn_initial_query": True}, "learn_initial_query is True"),
        ({"feat_strides": [4, 8, 16]}, r"feat_strides is \[4, 8, 16\], and only \[8, 16, 32\]"),
        ({"backbone_config": None}, "has no backbone_config"),
        ({"backbone__model_type": "swin"}, "backbone_config.model_type is 'swin'"),
        ({"backbone__depths": [1, 1, 1, 1]}, r"a basic ResNet of depths \(1, 1, 1, 1\) is not one of"),
        ({"backbone__hidden_sizes": [8, 16, 32, 64]}, "hidden_sizes"),
        ({"num_queries": 0}, "num_queries"),
        ({"decoder_layers": 2}, "a tensor is missing: heads.detection.decoder.layers.1"),
        ({"encoder_hidden_dim": 128}, "do not fit the model that they describe: size mismatch"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, settings: dict[str, Any], message: str) -> None:
    change(folder, **settings)
    with pytest.raises(UserError, match=message) as failure:
        load(folder)
    assert str(folder) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_damaged_folders(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json: is not a JSON object"):
        load(folder)


def test_the_file_stands_for_its_folder(folder: Path) -> None:
    assert load(folder / "model.safetensors").config == load(folder).config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_layers": 1_000_000}, "num_layers: input should be less than or equal to 100"),
        ({"decoder_layers": 90}, "do not fit the model that they describe: a tensor is missing"),
        ({"d_model": 2**20}, "embed_dim: input should be less than or equal to 8192"),
        ({"d_model": "wide"}, "embed_dim: input should be a valid integer"),
        ({"encoder_hidden_dim": 8192}, "do not fit the model that they describe|cannot be built"),
        ({"backbone_config": 3}, "backbone_config is 3, and has to be a JSON object"),
        ({"backbone__depths": 7}, "depths is 7, and has to be a list"),
        ({"backbone__depths": [[2], 2, 2, 2]}, "is not one of"),
        ({"backbone__hidden_sizes": 64}, "hidden_sizes is 64"),
        ({"encode_proj_layers": 2}, "encode_proj_layers is 2, and has to be a list"),
        ({"feat_strides": None}, "feat_strides is None"),
        ({"id2label": [1, 2]}, "id2label is .1, 2., and has to be a JSON object"),
        ({"id2label": {"0": {}}}, "0 is {}, and has to be a text"),
    ],
)
def test_values_of_the_wrong_size_or_type(folder: Path, settings: dict, message: str) -> None:
    change(folder, **settings)
    with pytest.raises(UserError, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deeply"), ("[]", "is not a JSON object"), ("{", "cannot be read"), (None, "larger")],
)
def test_descriptions_that_are_no_json(folder: Path, text: str | None, message: str) -> None:
    if text is None:
        os.truncate(folder / "config.json", 2**25)
    else:
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize("mean", ["grey", [1], [1, 2, "x"], None])
def test_means_that_are_no_three_numbers(folder: Path, mean: object) -> None:
    processor = {"do_normalize": True, "image_mean": mean, "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match="preprocessor_config.json: image_mean is"):
        load(folder)


def test_published_weights_with_nan_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("convolution.weight"))
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"not finite: backbone.net.*contains NaN or infinity"):
        load(folder)

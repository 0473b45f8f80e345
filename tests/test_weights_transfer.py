"""A model starts from other weights with what fits, class by class, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvision import Model, UserError
from mvision.config import parse_model_config
from mvision.weights import init_from, read_weights, save_weights
from tests.test_weights import make_model

CLASS_HEAD = "heads.detection.decoder.class_heads.0"
LABELS = "heads.detection.decoder.label_embed.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(["cat", "dog", "tv"])
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.normal_()
    model.backbone.mean.fill_(0.4)
    path = tmp_path_factory.mktemp("source") / "a.safetensors"
    save_weights(model, path)
    return path


def test_the_same_model_takes_everything(source: Path) -> None:
    model = make_model()
    line = init_from(model, source)
    assert line.endswith("backbone loaded; neck loaded; head detection loaded; 3 of 3 classes matched by name")
    assert "\n" not in line
    for name, value in read_weights(source).tensors.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_classes_are_matched_by_name(source: Path) -> None:
    """Other order, other number, another spelling, and new ones, whose rows are the mean of all."""
    model = make_model(["TV monitor".replace(" ", ""), "cow", "bird", "Cat"])
    line = init_from(model, source)
    assert "head detection loaded; 2 of 4 classes matched by name (not in these weights: cow, bird); 2 start" in line
    after, there = model.state_dict(), read_weights(source).tensors
    for name in (f"{CLASS_HEAD}.weight", f"{CLASS_HEAD}.bias", LABELS, "heads.detection.decoder.memory_class.bias"):
        assert torch.equal(after[name][[0, 3]], there[name][[2, 0]])
        torch.testing.assert_close(
            after[name][[1, 2]], there[name][:3].mean(0, keepdim=True).expand_as(after[name][:2])
        )
    assert torch.equal(after[LABELS][4], there[LABELS][3])  # padding
    assert torch.equal(
        after["heads.detection.decoder.memory_box.layers.0.weight"],
        there["heads.detection.decoder.memory_box.layers.0.weight"],
    )


def test_equally_many_other_classes_are_not_mixed_up(source: Path) -> None:
    model = make_model(["dog", "cat", "cow"])
    init_from(model, source)
    there = read_weights(source).tensors[f"{CLASS_HEAD}.bias"]
    assert torch.equal(model.state_dict()[f"{CLASS_HEAD}.bias"][:2], there[[1, 0]])


def test_as_many_classes_as_channels(source: Path) -> None:
    """Rows per class are recognised by what they are, not by their number: here it is that of the channels."""
    names = [f"class {index}" for index in range(31)] + ["tv"]
    model = make_model(names)
    init_from(model, source)
    after, there = model.state_dict(), read_weights(source).tensors
    name = "heads.detection.decoder.layers.0.cross_attention.value_proj.weight"
    assert torch.equal(after[name], there[name])
    assert torch.equal(after[f"{CLASS_HEAD}.weight"][31], there[f"{CLASS_HEAD}.weight"][2])


def test_another_backbone_takes_the_rest(source: Path) -> None:
    model = make_model(backbone="test_convnext")
    before = model.state_dict()["backbone.net.stem_0.weight"].clone()
    line = init_from(model, source)
    assert "backbone not loaded; neck loaded in part (51 of 54 layers); head detection loaded" in line
    assert torch.equal(model.state_dict()["backbone.net.stem_0.weight"], before)
    assert torch.allclose(model.backbone.mean, torch.tensor(0.5))


def test_normalisation_goes_with_the_backbone(source: Path, tmp_path: Path) -> None:
    model = make_model()
    init_from(model, source)
    assert torch.allclose(model.backbone.mean, torch.tensor(0.4))
    plain = make_model()
    plain.backbone.set_normalization(None, None)
    save_weights(plain, tmp_path / "plain.safetensors")
    init_from(model, tmp_path / "plain.safetensors")
    assert model.backbone.mean is None
    assert model.config.backbone.normalize == "none"


def test_layers_are_taken_whole_or_not_at_all(source: Path) -> None:
    """With other widths some biases have the right shape by chance."""
    model = make_model(["cow"], dim=64)
    line = init_from(model, source)
    assert "backbone loaded; neck not loaded; head detection not loaded" in line
    with pytest.raises(UserError, match="nothing in them fits: they have backbone test_resnet and embed_dim 32, this"):
        init_from(make_model(["cow"], backbone="test_convnext", dim=64), source)


def test_a_head_of_another_task_lends_its_layers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mvision.heads

    monkeypatch.setitem(mvision.heads.HEADS, "other", mvision.heads.HEADS["detection"])
    config = make_model().config
    model = Model(config.model_copy(update={"heads": {"other": config.heads["detection"]}}))
    line = init_from(model, source)
    assert "head other loaded" in line
    there = read_weights(source).tensors
    assert torch.equal(
        model.state_dict()["heads.other.decoder.memory_class.bias"], there["heads.detection.decoder.memory_class.bias"]
    )


def keypoint_model(names: list[str], settings: dict[str, Any] | None = None) -> Model:
    """Classes with two keypoints each; those in capitals have none."""
    config = make_model().config.model_dump()
    config["heads"] = {"keypoints": settings or {"embed_dim": 16}}
    config["categories"] = [
        {"id": index, "name": name.lower(), "keypoints": [] if name.isupper() else ["nose", "tail"]}
        for index, name in enumerate(names)
    ]
    return Model(parse_model_config(config))


def test_a_keypoint_head_takes_rows_of_classes_with_keypoints(tmp_path: Path) -> None:
    """Classes without keypoints have no row, wherever they stand in the list of classes."""
    there = keypoint_model(["TV", "cat", "dog"])
    save_weights(there, tmp_path / "a.safetensors")
    model = keypoint_model(["cow", "HEN", "dog"])
    weight = model.state_dict()["heads.keypoints.one.score.weight"]
    assert "head keypoints loaded" in init_from(model, tmp_path / "a.safetensors")
    assert torch.equal(weight[1], there.state_dict()["heads.keypoints.one.score.weight"][1])
    torch.testing.assert_close(weight[0], there.state_dict()["heads.keypoints.one.score.weight"].mean(0))
    fewer = keypoint_model(["dog"])
    init_from(fewer, tmp_path / "a.safetensors")
    assert torch.equal(fewer.state_dict()["heads.keypoints.one.score.weight"][0], weight[1])


def test_keypoints_start_from_detection_with_backbone_and_neck(source: Path) -> None:
    for settings in ({"embed_dim": 16}, {"embed_dim": 16, "predict": "points", "levels": "finest"}):
        model = keypoint_model(["cat"], settings)
        line = init_from(model, source)
        assert line.endswith("backbone loaded; neck loaded; head keypoints not loaded")
        there = read_weights(source).tensors
        for name, value in model.state_dict().items():
            if name.startswith("neck."):
                assert torch.equal(value, there[name]), name


def test_only_the_parts_that_are_asked_for_are_loaded(source: Path) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    line = init_from(model, source, parts=["backbone"])
    assert line.endswith("backbone loaded; neck not loaded; head detection not loaded")
    there = read_weights(source).tensors
    for name, value in model.state_dict().items():
        expected = there if name.startswith("backbone.") else before
        assert torch.equal(value, expected[name]), name


def test_what_a_head_does_not_get_is_named(source: Path) -> None:
    config = make_model().config.model_dump()
    config["heads"] = {"instance-seg": {**config["heads"]["detection"], "pixel_dim": 16, "mask_dim": 8}}
    line = init_from(Model(parse_model_config(config)), source)
    part = next(part for part in line.split("; ") if part.startswith("head instance-seg"))
    assert part.startswith("head instance-seg loaded in part (")
    assert ", not " in part
    assert "decoder" not in part.partition(", not ")[2]
    assert line.endswith("3 of 3 classes matched by name")

"""A model with other classes than the weights that it starts from: rows go by name, new classes get the mean row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvision import Model
from mvision.structures import Category
from mvision.structures.coco_names import COCO
from mvision.structures.objects365_names import OBJECTS365, UNUSED
from mvision.weights import init_from, save_weights
from mvision.weights.transfer import _match_classes
from tests.test_weights import make_model

LAYERS = ("memory_class", "class_heads.0", "class_heads.1", "label_embed")


@pytest.fixture
def source(tmp_path: Path) -> Model:
    model = make_model(["cat", "dog", "tv"])
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(layer in name for layer in LAYERS):
                tensor.normal_()
    save_weights(model, tmp_path / "a.safetensors")
    return model


@pytest.mark.parametrize(("names", "matched"), [(["cow", "tv", "pig", "cat"], {1: 2, 3: 0}), (["cow", "pig"], {})])
def test_new_classes_start_from_the_mean(
    source: Model, tmp_path: Path, names: list[str], matched: dict[int, int]
) -> None:
    model = make_model(names)
    line = init_from(model, tmp_path / "a.safetensors")
    new = len(names) - len(matched)
    assert f"head detection loaded; {len(matched)} of {len(names)} classes matched by name" in line
    assert line.endswith(f"; {new} start from the mean of the classes of these weights")
    own, other = model.heads["detection"].decoder.state_dict(), source.heads["detection"].decoder.state_dict()
    for layer in LAYERS:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in own:
                assert layer == "label_embed"
                continue
            for row in range(len(names)):
                expected = other[name][matched[row]] if row in matched else other[name][:3].mean(0)
                torch.testing.assert_close(own[name][row], expected)
    assert torch.equal(own["label_embed.weight"][len(names)], other["label_embed.weight"][3])  # padding


def test_nothing_is_said_of_means_where_there_are_no_new_classes(source: Model, tmp_path: Path) -> None:
    assert "from the mean" not in init_from(make_model(["tv", "cat"]), tmp_path / "a.safetensors")
    line = init_from(make_model(["cow", "cat"]), tmp_path / "a.safetensors", parts=["backbone"])
    assert "from the mean" not in line


def test_a_classifier_of_another_width_gives_no_mean(source: Model, tmp_path: Path) -> None:
    wider = make_model(["cow"], dim=48)
    before = wider.heads["detection"].decoder.memory_class.weight.clone()
    assert "from the mean" not in init_from(wider, tmp_path / "a.safetensors")
    assert torch.equal(wider.heads["detection"].decoder.memory_class.weight, before)


def test_classes_with_several_names() -> None:
    objects365 = [UNUSED, *OBJECTS365]
    matches = _match_classes(COCO, objects365)
    found = {COCO[own].name: objects365[other].name for own, other in matches.items()}
    assert found["tv"] == "monitor/tv"
    assert found["orange"] == "orange/tangerine"
    assert found["bird"] == "wild bird"
    assert found["person"] == "person"
    assert {category.name for category in COCO} - set(found) == {"skis", "sports ball"}
    named = [Category(id=0, name="cup/mug"), Category(id=1, name="cup")]
    assert _match_classes([Category(id=5, name="cup"), Category(id=6, name="mug")], named) == {0: 1, 1: 0}

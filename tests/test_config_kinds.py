"""Settings of a head's other kinds in a file, and what chooses one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mvision import create_model
from mvision.commands.train import run_config
from mvision.config import load_config, shipped_configs
from mvision.errors import UserError
from mvision.storage.yaml_files import read_yaml
from mvision.structures import Category
from mvision.weights import save_weights

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WITH_KEYPOINTS = [
    name
    for name in shipped_configs()
    if "kinds" in (read_yaml(CONFIGS / f"{name}.yaml", "")["model"].get("heads", {}).get("keypoints") or {})
]


def head_of(*assignments: str, model: str | None = "tiny", file: Path | None = None):
    """The settings of the keypoint head."""
    return load_config(model, file, tasks=["keypoints"], assignments=list(assignments)).model.heads["keypoints"]


def write(folder: Path, keypoints: dict, **sections) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**sections, "model": {"heads": {"keypoints": keypoints}}}))
    return path


def test_small_and_large_models_have_settings_of_query_poses():
    assert {"tiny", "small", "base", "large"} <= set(WITH_KEYPOINTS)


@pytest.mark.parametrize("kind", ["dense", "minimal", "query"])
@pytest.mark.parametrize("name", WITH_KEYPOINTS)
def test_every_kind_can_be_chosen(name, kind):
    assert head_of(f"model.heads.keypoints.kind={kind}", model=name).kind == kind


def test_a_kind_starts_from_its_own_settings():
    dense, query = head_of(), head_of("model.heads.keypoints.kind=query")
    assert (dense.kind, dense.embed_dim) == ("dense", 64)
    assert (query.kind, query.embed_dim, query.num_heads) == ("query", 128, 4)


def test_a_kind_without_settings_keeps_those_of_the_section():
    assert head_of("model.heads.keypoints.kind=minimal").num_instances == head_of().num_instances


@pytest.mark.parametrize("kind_first", [True, False])
def test_assignments_set_the_chosen_kind_in_any_order(kind_first):
    both = ["model.heads.keypoints.kind=query", "model.heads.keypoints.num_layers=5"]
    assert head_of(*(both if kind_first else both[::-1])).num_layers == 5


def test_a_file_chooses_the_kind_of_its_base(tmp_path):
    file = write(tmp_path, {"kind": "query", "num_layers": 5}, base="tiny")
    found = head_of(model=None, file=file)
    assert (found.kind, found.num_layers, found.embed_dim) == ("query", 5, 128)
    assert head_of().kind == "dense"


def test_an_unknown_kind_is_refused_though_nothing_chooses_it(tmp_path):
    with pytest.raises(UserError, match="model.heads.keypoints.kinds: 'qurey' is unknown; did you mean 'query'"):
        head_of(model=None, file=write(tmp_path, {"kinds": {"qurey": {}}}))


def test_settings_of_another_kind_are_refused_where_a_file_names_them(tmp_path):
    with pytest.raises(UserError, match="model.heads.keypoints.depth"):
        head_of(model=None, file=write(tmp_path, {"kind": "query", "depth": 2}))


def test_heads_of_one_kind_have_no_such_section(tmp_path):
    with pytest.raises(UserError, match="model.heads.detection.kinds"):
        load_config("tiny", assignments=["model.heads.detection={kinds: {query: {}}}"])


@pytest.mark.parametrize("given", [[], ["model.heads.keypoints.kind=query"], ["model.heads.keypoints.kind=dense"]])
def test_weights_of_one_kind_start_a_model_with_the_other(given, tmp_path):
    """The settings of the head that the weights have are for its own kind; those of backbone and neck stay."""
    categories = [Category(id=1, name="person", keypoints=["nose", "tail"])]
    model = create_model("tiny", ["keypoints"], categories=categories, neck__embed_dim=32, heads__keypoints__depth=1)
    save_weights(model, tmp_path / "best.safetensors")
    config = run_config(init=str(tmp_path / "best.safetensors"), assignments=given).model
    head = config.heads["keypoints"]
    assert config.neck.embed_dim == 32
    assert head.kind == ("query" if "query" in str(given) else "dense")
    assert head.kind == "query" or head.depth == 1

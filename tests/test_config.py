"""How files, options and ``-o`` combine, and what a mistake in them is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mvision.config import Config, load_config, merge, parse_config, parse_model_config, shipped_configs
from mvision.errors import UserError

# Few lines that stand for 3 * 10 ** 9 values.
ALIASES = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


def _file(folder: Path, name: str = "mine.yaml", **sections: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def test_precedence_is_file_then_options_then_assignments(tmp_path: Path) -> None:
    file = _file(tmp_path, train={"epochs": 5, "batch_size": 4, "lr": 0.5})
    options = {"train.epochs": 6, "train.batch_size": 8}
    config = load_config(file=file, overrides=options, assignments=["train.epochs=7"])
    assert (config.train.epochs, config.train.batch_size, config.train.lr) == (7, 8, 0.5)


def test_a_file_goes_on_top_of_a_model(tmp_path: Path) -> None:
    tiny = load_config("tiny")
    config = load_config("tiny", file=_file(tmp_path, model={"neck": {"depth": 1}}))
    assert config.model.neck.depth == 1
    assert config.model.neck.embed_dim == tiny.model.neck.embed_dim
    assert config.model.backbone == tiny.model.backbone


def test_without_anything_it_is_tiny() -> None:
    assert load_config() == load_config("tiny")


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_complete_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.model.heads
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(file=written)
    assert again == config
    assert {task: type(settings) for task, settings in again.model.heads.items()} == {
        task: type(settings) for task, settings in config.model.heads.items()
    }


def test_base_is_another_file_or_a_shipped_model(tmp_path: Path) -> None:
    _file(tmp_path, "below.yaml", train={"epochs": 3, "lr": 0.5})
    over_file = _file(tmp_path, "a.yaml", base="below.yaml", train={"lr": 0.25})
    assert load_config(file=over_file).train.model_dump(include={"epochs", "lr"}) == {"epochs": 3, "lr": 0.25}
    over_shipped = _file(tmp_path, "b.yaml", base="tiny", train={"epochs": 2})
    assert load_config(file=over_shipped).model == load_config("tiny").model


def test_base_has_one_level(tmp_path: Path) -> None:
    _file(tmp_path, "first.yaml", base="tiny")
    second = _file(tmp_path, "second.yaml", base="first.yaml")
    with pytest.raises(UserError, match="one level is allowed"):
        load_config(file=second)


def test_floats_in_exponent_form_are_numbers(tmp_path: Path) -> None:
    """PyYAML reads ``1e-4`` as text."""
    file = tmp_path / "mine.yaml"
    file.write_text("train: {lr: 1e-4}", encoding="utf-8")
    config = load_config(file=file, assignments=["train.weight_decay=1e-3"])
    assert (config.train.lr, config.train.weight_decay) == (1e-4, 1e-3)


def test_empty_sections_mean_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  heads:\n    detection:\ntrain:\n  # lr: 1.0\n", encoding="utf-8")
    config = load_config(file=file)
    assert config.train == Config().train
    assert list(config.model.heads) == ["detection"]


def test_tasks_pick_the_heads_and_keep_their_settings(tmp_path: Path) -> None:
    file = _file(tmp_path, model={"heads": {"detection": {"num_queries": 7}}})
    config = load_config(file=file, tasks=["detection"])
    assert config.model.heads["detection"].model_dump()["num_queries"] == 7
    without = _file(tmp_path, "none.yaml", train={"epochs": 1})
    assert list(load_config(file=without, tasks=["detection"]).model.heads) == ["detection"]


def test_image_size_is_one_number_or_two() -> None:
    assert load_config(assignments=["model.image_size=320"]).model.image_size == (320, 320)
    assert load_config(overrides={"model.image_size": (320, 480)}).model.image_size == (320, 480)


def test_tasks_are_those_asked_for_or_those_of_the_file(tmp_path: Path) -> None:
    assert list(load_config("tiny").model.heads) == ["detection"]
    assert list(load_config("tiny", tasks=["instance-seg"]).model.heads) == ["instance-seg"]
    own = tmp_path / "own.yaml"
    own.write_text("base: small\nmodel: {heads: {instance-seg: {mask_points: 99}}}\n")
    head = load_config(file=own).model.heads
    assert list(head) == ["instance-seg"]
    assert head["instance-seg"].mask_points == 99
    assert head["instance-seg"].num_layers == load_config("small").model.heads["detection"].num_layers
    own.write_text("base: small\n")
    assert list(load_config(file=own).model.heads) == ["detection"]
    assert list(load_config("tiny", tasks=["keypoints", "detection"]).model.heads) == ["keypoints", "detection"]


def test_settings_for_one_task_alone(tmp_path: Path) -> None:
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(
        "model: {image_size: 64}\ntrain: {lr: 0.1}\ntasks: {keypoints: {model: {image_size: 96}, train: {lr: 0.2}}}\n"
    )
    own.write_text("base: base.yaml\ntrain: {lr: 0.3}\n")
    for tasks, side in ((["keypoints"], 96), (["detection"], 64), (["keypoints", "detection"], 64)):
        config = load_config(file=own, tasks=tasks)
        assert config.model.image_size == (side, side)
        assert config.train.lr == 0.3  # what lies above wins
    assert load_config(file=base, tasks=["keypoints"], overrides={"train.lr": 0.4}).train.lr == 0.4
    base.write_text("tasks: {keypoints: {train: {lrr: 0.2}}}\n")
    with pytest.raises(UserError, match=r"base.yaml: unknown key 'train.lrr'"):
        load_config(file=base, tasks=["detection"])


def test_a_timm_backbone_is_a_model() -> None:
    config = load_config("test_resnet")
    base = load_config("base")
    assert config.model.backbone.name == "test_resnet"
    assert config.model.neck == base.model.neck


def test_merge_replaces_lists_and_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}}
    assert merge(base, {"a": {"c": [3]}, "d": 4}) == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert base == {"a": {"b": 1, "c": [1, 2]}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {}}, "unknown key 'trian': did you mean 'train'?"),
        ({"train": {"epoch": 3}}, "unknown key 'train.epoch': did you mean 'epochs'?"),
        # A known name in the wrong place is told its place, not a lookalike of the place it was found in.
        ({"train": {"workers": 3}}, "unknown key 'train.workers': did you mean 'data.workers'?"),
        ({"data": {"zzz": 3}}, "unknown key 'data.zzz': choose one of augment, .*root, .*workers"),
        ({"model": {"heads": {"detection": {"num_queris": 3}}}}, "'model.heads.detection.num_queris'.*'num_queries'"),
        ({"model": {"heads": {"detectoin": {}}}}, "detectoin.*detection"),
        ({"model": {"categories": [{"id": 1, "nme": "x"}]}}, "'model.categories.0.nme': did you mean 'name'?"),
        ({"train": {"epochs": "many"}}, r"train.epochs: .*integer.*\(got 'many'\)"),
        ({"train": {"lr": -1}}, r"train.lr: .*greater than 0 \(got -1\)"),
        ({"train": {"precision": "fp8"}}, "train.precision: .*'bf16'.*got 'fp8'"),
        ({"train": {"freeze": ["nek"]}}, "train.freeze.0: .*'neck'.*got 'nek'"),
        ({"train": {"lr": -1, "epochs": "k"}}, "and 1 more"),
        ({"model": {"image_size": 100}}, r"model.image_size: .*multiples of 32 \(got 100\)"),
        ({"model": {"image_size": [64]}}, "model.image_size"),
        ({"model": 3}, r"model: .*dictionary.*got 3"),
        ({"model": {"heads": []}}, "model.heads: .*dictionary"),
    ],
)
def test_mistakes_name_key_value_and_way_out(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_config(tree)
    assert "\n" not in str(caught.value)


def test_a_key_of_several_types_names_them_all_and_no_type_tags() -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"model": {"neck": {"attention_levels": "fine"}}})
    assert str(caught.value).startswith("model.neck.attention_levels: input should be 'coarsest' or 'all', or: ")


def test_model_section_alone_is_prefixed() -> None:
    with pytest.raises(UserError, match=r"unknown key 'model.neck.dept': did you mean 'depth'\?"):
        parse_model_config({"neck": {"dept": 3}})


def test_mistakes_in_a_file_name_the_file_and_those_of_an_assignment_do_not(tmp_path: Path) -> None:
    file = _file(tmp_path, train={"epoch": 3})
    with pytest.raises(UserError, match=f"^config {file}: unknown key 'train.epoch'"):
        load_config(file=file)
    good = _file(tmp_path, "good.yaml", train={"epochs": 3})
    with pytest.raises(UserError, match=r"^unknown key 'train.epoch'"):
        load_config(file=good, assignments=["train.epoch=3"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "not valid YAML"),
        (b"- 1\n- 2", "has to be a mapping"),
        (b"\xff\xfe\x00", "not text in UTF-16"),
        (ALIASES.encode(), "not valid YAML: .*every alias"),
        (b"train: &t {x: *t}", "not valid YAML: .*alias"),
        (b"[" * 5000, "not valid YAML"),
        (b"train: {epochs: %s}" % (b"9" * 5000), "not valid YAML: .*number of more than"),
        (b"train: {lr: 2001-13-45}", "not valid YAML: .*2001-13-45"),
        (b"train: {lr: !!bool maybe}", "not valid YAML: .*maybe"),
        (b"1: 2", "unknown key '1'|1: keys should be strings"),
        (b"train: {1: 2}", "train.1: keys should be strings"),
        (b"train: {[a]: 2}", "not valid YAML: .*unhashable"),
        (b"train: [a]", "train: .*dictionary"),
        (b"model: {heads: {5: {}}}", "unknown task '?5"),
        (b"model: {heads: {null: {}}}", "unknown task '?None"),
        (b"base: [tiny]", "base: give the name"),
        (b"train: {lr: !!python/object/apply:os.getcwd []}", "not valid YAML"),
        (b"model: 3", "model: .*got 3"),
        (b"model: {heads: [detection]}", "model.heads: .*dictionary"),
        (b"tasks: [detection]", "tasks has to be a mapping"),
        (b"tasks: {detection: 3}", "tasks has to be a mapping"),
        (b"tasks: {keypoint: {}}", "unknown task 'keypoint': did you mean 'keypoints'"),
        (b"tasks: {detection: {train: {epoch: 3}}}", "unknown key 'train.epoch'"),
    ],
)
def test_unreadable_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(file=file)
    assert str(file) in str(caught.value)


def test_missing_file_and_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(file=tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"--model resnt50: .*tiny.*resnet50"):
        load_config("resnt50")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("smal", "small"), ("dfine-s", "dfine_s"), ("RT-DETR-R18", "rtdetr_r18"), ("ECdet_s", "ecdet_s")],
)
def test_a_near_name_of_a_shipped_model_is_suggested(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"--model {wrong}: no shipped model has this name: did you mean '{right}'"):
        load_config(wrong)


@pytest.mark.parametrize("assignment", ["train.epochs", "=3", ""])
def test_assignments_need_key_and_value(assignment: str) -> None:
    with pytest.raises(UserError, match=r"key\.sub=value"):
        load_config(assignments=[assignment])


def test_assignments_are_yaml() -> None:
    shared = "model.neck.share_attention=false"
    config = load_config(assignments=["train.freeze=[backbone]", "data.root=null", shared, "train.trackers=[]"])
    assert (config.train.freeze, config.data.root, config.model.neck.share_attention) == (["backbone"], None, False)
    with pytest.raises(UserError, match=r"-o train.lr: not valid YAML"):
        load_config(assignments=["train.lr=["])


def test_a_value_is_not_lost_to_a_key_below_it() -> None:
    assignments = ["train.class_weights=balanced", "train.class_weights.mug=5"]
    with pytest.raises(
        UserError, match="train.class_weights is 'balanced', which has no keys; set train.class_weights"
    ):
        load_config(assignments=assignments)
    assert load_config(assignments=assignments[1:]).train.class_weights == {"mug": 5.0}


def test_a_task_that_is_named_twice_is_one() -> None:
    once, twice = (load_config(tasks=["keypoints"] * times) for times in (1, 2))
    assert once == twice
    assert once.train.least_steps == 1500  # that of a model with this task alone


def test_the_size_of_tiles_stays_when_another_key_of_theirs_is_set(tmp_path: Path) -> None:
    config = load_config(assignments=["data.tile=160", "data.tile.visible=0.5"])
    assert (config.data.tile.size, config.data.tile.visible) == ((160, 160), 0.5)
    (tmp_path / "run.yaml").write_text("data:\n  tile: [96, 128]\n")
    config = load_config(file=tmp_path / "run.yaml", assignments=["data.tile.empty=0"])
    assert (config.data.tile.size, config.data.tile.empty) == ((96, 128), 0)


def test_an_included_task_has_the_settings_of_the_head_that_serves_it(tmp_path: Path) -> None:
    tasks = ["detection", "instance-seg"]
    file = _file(tmp_path, model={"heads": {"instance-seg": {"num_queries": 7}}})
    heads = load_config("tiny", file=file, tasks=tasks).model.heads
    assert [heads[task].model_dump()["num_queries"] for task in tasks] == [7, 7]
    file = _file(tmp_path, model={"heads": {"instance-seg": {"num_queries": 7}, "detection": {"num_queries": 8}}})
    with pytest.raises(UserError, match=r"model.heads.detection.num_queries is 8 and model.heads.instance-seg.* is 7"):
        load_config("tiny", file=file, tasks=tasks)


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("train", {"channels_last": True, "lr": 0.5}, {"lr": 0.5}),
        ("model.heads.detection", {"learned_queries": False, "num_queries": 7}, {"num_queries": 7}),
        ("model.heads.instance-seg", {"learned_queries": False, "boxes_from_masks": False}, {}),
        ("model.heads.keypoints", {"predict": "instances", "map_dim": 8}, {"kind": "dense", "map_dim": 8}),
        ("model.heads.keypoints", {"predict": "points", "map_dim": 8, "depth": 2}, {"kind": "minimal", "depth": 2}),
    ],
)
def test_retired_keys_are_replaced(section: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    given = dict(old)
    replaced, expected = (_in_section(section, settings) for settings in (old, new))
    assert parse_config(replaced) == parse_config(expected)
    assert old == given


@pytest.mark.parametrize(
    ("section", "key"), [("model.neck", "predict"), ("data", "channels_last"), ("model.heads.detection", "predict")]
)
def test_keys_are_retired_in_their_own_section_alone(section: str, key: str) -> None:
    with pytest.raises(UserError, match=f"unknown key '{section}.{key}'"):
        parse_config(_in_section(section, {key: True}))


def _in_section(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A tree of settings with nothing but this section."""
    for name in reversed(section.split(".")):
        settings = {name: settings}
    return settings


@pytest.mark.parametrize("value", [True, [1], None])
def test_a_retired_value_without_replacement_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(UserError, match=r"^model.heads.detection.learned_queries: .* not supported any more") as caught:
        parse_config({"model": {"heads": {"detection": {"learned_queries": value}}}})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"train.channels_last: False is not supported any more"):
        load_config("tiny", assignments=["train.channels_last=false"])


def _numbers(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all numbers."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(prefix + key)
    return found


@pytest.mark.parametrize(
    "value", [".inf", "-.inf", ".nan", "1e400", "1e300", "-1e300", "1000000000000000000000000000000"]
)
def test_every_number_has_a_range(value: str) -> None:
    """What no training can mean is refused in one line that names the key, before it is multiplied or allocated."""
    keys = _numbers(load_config("tiny").model_dump())
    assert len(keys) > 40
    for key in keys:
        with pytest.raises(UserError, match=f"^{key}: ") as caught:
            load_config(assignments=[f"{key}={value}"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs=1000000000000", "train.epochs: .*less than or equal"),
        ("train.batch_size=1000000000", "train.batch_size: .*less than or equal"),
        ("train.seed=4294967296", "train.seed: .*less than"),
        ("model.image_size=1000000", "model.image_size: .*at most"),
        ("data.workers=1000000", "data.workers: .*less than or equal"),
        ("train.task_weights={detection: .nan}", "train.task_weights: .*finite"),
        ("model.heads={5: {}}", "unknown task"),
        ("train={1: 2}", "train.1: keys should be strings"),
        ("model.neck=[*a]", "^-o model.neck: not valid YAML"),
        ("=5", "^-o =5: write it as key.sub=value"),
        ("train.lr", "^-o train.lr: write it as key.sub=value"),
        ("train.lr.x.y=1", "^train.lr: .*number"),
        (
            "model.image_size.x=1",
            r"^-o model.image_size.x: model.image_size is \[192, 192\], which has no keys; set mo",
        ),
    ],
)
def test_hostile_assignments(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(assignments=[assignment])


def test_masks_alone_get_fine_maps_from_a_plain_vit() -> None:
    name = "vit_tiny_patch16_224"
    chosen = {task: load_config(name, tasks=[task]).model.backbone for task in ("instance-seg", "detection")}
    assert (chosen["instance-seg"].pyramid, chosen["instance-seg"].detail) == ("mean-bilinear", 16)
    assert (chosen["detection"].pyramid, chosen["detection"].detail) == ("last", 0)
    assert load_config("resnet18", tasks=["instance-seg"]).model.backbone.detail == 0
    assert load_config(name, tasks=["instance-seg"], overrides={"model.backbone.detail": 0}).model.backbone.detail == 0

"""A weights file is whole or absent, builds its model again, and anything else is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mvision
from mvision import Model, UserError, load
from mvision.config import parse_model_config
from mvision.storage import hub
from mvision.weights import files as weights
from mvision.weights import init_from, read_weights, resolve_weights, save_weights

NAMES = ["cat", "dog", "tv"]


def make_model(names: list[str] | None = None, backbone: str = "test_resnet", dim: int = 32) -> Model:
    return Model(
        parse_model_config(
            {
                "backbone": {"name": backbone},
                "neck": {"embed_dim": dim, "num_heads": 4, "ffn_dim": 32, "depth": 1},
                "heads": {
                    "detection": {"embed_dim": dim, "num_heads": 4, "num_layers": 2, "ffn_dim": 32, "num_queries": 10}
                },
                "categories": [{"id": 10 + index, "name": name} for index, name in enumerate(names or NAMES)],
                "image_size": [64, 96],
            }
        )
    ).eval()


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(0, 1, 3 * 64 * 96).view(1, 3, 64, 96))["detection"]["logits"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with weights in it."""
    folder = tmp_path / "runs" / "detection" / "1"
    save_weights(make_model(), folder / "best.safetensors", {"epoch": 3})
    return folder


def refusal(source: object) -> str:
    with pytest.raises(UserError) as failure:
        load(source)
    assert "\n" not in str(failure.value)
    assert str(source) in str(failure.value)
    return str(failure.value)


def test_round_trip(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.25)
    save_weights(model, tmp_path / "new" / "model.safetensors")
    again = load(tmp_path / "new" / "model.safetensors")
    assert not again.training
    assert again.config == model.config
    assert [(category.id, category.name) for category in again.categories] == [(10, "cat"), (11, "dog"), (12, "tv")]
    assert torch.equal(logits(again), logits(model))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_the_header_says_what_it_is(run: Path) -> None:
    with safe_open(run / "best.safetensors", "pt") as file:
        described = json.loads(file.metadata()["mvision"])
    assert described["version"] == mvision.__version__
    assert described["epoch"] == 3
    assert described["model"]["backbone"]["name"] == "test_resnet"


def test_nothing_is_downloaded_for_weights_that_are_there(tmp_path: Path) -> None:
    model = make_model()
    model.config.backbone.pretrained = True
    save_weights(model, tmp_path / "a.safetensors")
    assert torch.equal(logits(load(tmp_path / "a.safetensors")), logits(model))


def test_views_and_tied_weights_are_saved(tmp_path: Path) -> None:
    model = make_model()
    heads = model.heads["detection"].decoder.class_heads
    heads[1].weight = heads[0].weight
    model.to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "a.safetensors")
    assert torch.allclose(logits(load(tmp_path / "a.safetensors")), logits(model), atol=1e-5)


def test_fused_models_are_saved_and_loaded_as_such(tmp_path: Path) -> None:
    model = make_model()
    expected = logits(model)
    save_weights(model.fuse(), tmp_path / "a.safetensors")
    assert torch.allclose(logits(load(tmp_path / "a.safetensors")), expected, atol=1e-5)
    with pytest.raises(UserError, match="fused for inference"):
        init_from(make_model(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("part", ["backbone", "neck"])
def test_a_model_that_is_fused_in_parts_is_not_saved(tmp_path: Path, part: str) -> None:
    model = make_model()
    expected = logits(model)
    getattr(model, part).fuse()
    with pytest.raises(UserError, match=rf"only a part of this model is fused \({part}\): call model.fuse\(\), or"):
        save_weights(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    save_weights(model.fuse(), tmp_path / "a.safetensors")
    assert torch.allclose(logits(load(tmp_path / "a.safetensors")), expected, atol=1e-5)


def test_every_form_of_a_run_is_found(run: Path) -> None:
    file = run / "best.safetensors"
    assert [resolve_weights(source) for source in (run, str(run), file)] == [file] * 3


@pytest.mark.parametrize("device", ["gpu", *([] if torch.cuda.is_available() else ["cuda", torch.device("cuda")])])
def test_a_device_that_cannot_be_used_is_one_line(run: Path, device: str | torch.device, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    unusable = f"device {device}: not usable here"
    of_export = unusable if device == "gpu" else f"an exported model runs on the CPU, not on {device}"
    for source, way, message in (
        (tmp_path / "model.onnx", load, of_export),
        (run, load, unusable),
        (run, weights.load, unusable),
        (run, Model.from_pretrained, unusable),
    ):
        with pytest.raises(UserError, match=message) as caught:
            way(source, device=device)
        assert "\n" not in str(caught.value)


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere" / "weights.safetensors")
    assert "there are several runs in it" in refusal(run.parent)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("model: {}\n")
    assert "has no best.safetensors yet" in refusal(tmp_path / "begun")
    (tmp_path / "empty").mkdir()
    assert "there is no weights file in this folder" in refusal(tmp_path / "empty")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("a.pt", "a.pth", "pytorch_model.bin", "disguised.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Dangerous()))
        message = refusal(tmp_path / name)
        assert ("can run code" in message) != name.endswith(".safetensors")
    assert "only a.pt, a.pth, disguised.safetensors, pytorch_model.bin" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files(run: Path, tmp_path: Path) -> None:
    whole = (run / "best.safetensors").read_bytes()
    broken = tmp_path / "broken.safetensors"
    for content in (b"", whole[:5], whole[:1000], whole[: len(whole) // 2], b"\xff" * 100 + whole):
        broken.write_bytes(content)
        assert "not a safetensors file, or damaged" in refusal(broken)
    save_file({"a": torch.zeros(3)}, broken)
    assert "not written by mvision" in refusal(broken)
    for described in ("[1]", "{", "null"):
        save_file({"a": torch.zeros(3)}, broken, {"mvision": described})
        assert "its header is damaged" in refusal(broken)
    save_file({"a": torch.zeros(3)}, broken, {"mvision": json.dumps({"model": {"bakbone": {}}})})
    assert "unknown key" in refusal(broken)


def test_tensors_that_do_not_fit_their_description(run: Path, tmp_path: Path) -> None:
    tensors = load_file(run / "best.safetensors")
    with safe_open(run / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    name = "neck.projections.0.conv.weight"
    other = tmp_path / "other.safetensors"
    save_file({key: value for key, value in tensors.items() if key != name}, other, metadata)
    assert f"a tensor is missing: {name}" in refusal(other)
    save_file({**tensors, "neck.more": torch.zeros(1)}, other, metadata)
    assert "a tensor is unknown: neck.more" in refusal(other)
    save_file({**tensors, name: torch.zeros(1)}, other, metadata)
    assert f"size mismatch for {name}" in refusal(other)


def test_keeping_some_heads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(run, tasks=["detection"]).tasks == load(run, tasks="detection").tasks == ["detection"]
    assert mvision.create_model(tasks="semantic-seg", num_classes=1, image_size=64).tasks == ["semantic-seg"]
    with pytest.raises(UserError, match="there is no head 'keypoints', only detection"):
        load(run, tasks=["keypoints"])
    # A second head under a name of its own.
    monkeypatch.setitem(mvision.heads.HEADS, "second", mvision.heads.HEADS["detection"])
    config = make_model().config
    config = config.model_copy(update={"heads": {**config.heads, "second": config.heads["detection"]}})
    joint = Model(config).eval()
    save_weights(joint, run / "best.safetensors")
    kept = load(run, tasks=["second"])
    assert kept.tasks == ["second"]
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(kept(images)["second"]["logits"], joint(images)["second"]["logits"])


def write_with_header(path: Path, model: Model, heads: dict[str, object]) -> None:
    """The weights of ``model`` with these sections of ``model.heads`` added to in the header."""
    save_weights(model, path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["mvision"])
    for task, settings in heads.items():
        header["model"]["heads"][task] |= settings
    save_file(load_file(path), path, {"format": "pt", "mvision": json.dumps(header)})


def test_a_header_with_retired_keys_loads(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "old.safetensors"
    write_with_header(path, model, {"detection": {"learned_queries": False}})
    again = load(path)
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))


def test_a_header_with_a_retired_value_without_replacement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    write_with_header(path, make_model(), {"detection": {"learned_queries": True}})
    assert "model.heads.detection.learned_queries: True is not supported any more" in refusal(path)


def test_keeping_a_task_of_a_fused_model(run: Path) -> None:
    model = make_model()
    expected = logits(model)
    save_weights(model.fuse(), run / "best.safetensors")
    assert torch.allclose(logits(load(run, tasks=["detection"])), expected, atol=1e-5)


def test_a_task_gets_the_head_of_the_task_that_included_it(tmp_path: Path) -> None:
    """Its tensors are renamed, and those that only the including task needs are left out."""
    config = make_model().config.model_dump()
    queries = config["heads"]["detection"]
    config["heads"] = {"instance-seg": {**queries, "pixel_dim": 16, "mask_dim": 8}, "detection": {}}
    joint = Model(parse_model_config(config)).eval()
    save_weights(joint, tmp_path / "joint.safetensors")
    alone = load(tmp_path / "joint.safetensors", tasks=["detection"])
    assert list(alone.heads) == ["detection"]
    assert torch.equal(logits(alone), logits(joint))
    with pytest.raises(UserError, match="name at least one task"):
        load(tmp_path / "joint.safetensors", tasks=[])


@pytest.mark.parametrize("failure", ["error", "killed halfway"])
def test_a_failing_write_leaves_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """The old file stays, no half-written one is left, and the message names path and reason."""
    before = (run / "best.safetensors").read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if failure == "error" else KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError if failure == "error" else KeyboardInterrupt) as raised:
        save_weights(make_model(), run / "best.safetensors")
    if failure == "error":
        assert "best.safetensors: cannot be written" in str(raised.value)
        assert "No space left" in str(raised.value)
    assert (run / "best.safetensors").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["best.safetensors"]


def test_a_new_file_takes_the_place_of_the_old_one(run: Path) -> None:
    """Whoever has the old file open, or is killed in between, has a whole one: its bytes are never written over."""
    old = run / "link"
    os.link(run / "best.safetensors", old)
    before = old.read_bytes()
    save_weights(make_model(["cow"]), run / "best.safetensors")
    assert old.read_bytes() == before
    assert load(run).categories[0].name == "cow"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A limit on the size of files makes the library's own write fail."""
    resource = pytest.importorskip("resource")
    model = make_model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_weights(model, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(make_model(), tmp_path / "file" / "a.safetensors")


def test_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_reachable", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("nobody/no_such_model")
    assert "the Hub cannot be reached" in message
    assert "download config.json and model.safetensors" in message


def test_hub_id_comes_from_the_cache(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of ours may be on the Hub too; only the files that are needed are asked for."""
    asked: dict[str, object] = {}

    def snapshot(name: str, allow_patterns: list[str], **options: object) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(run)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_reachable", lambda url: False)
    assert load("somebody/some_model").tasks == ["detection"]
    assert asked["name"] == "somebody/some_model"
    assert "best.safetensors" in asked["patterns"]


def test_reading_does_not_build(run: Path) -> None:
    found = read_weights(run)
    assert found.config.image_size == (64, 96)
    assert set(found.tensors) == set(make_model().state_dict())

"""Weights files that are damaged, foreign or made to do harm cost one line: no traceback, no memory, no waiting."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvision import UserError, load
from mvision.weights import init_from, read_weights, save_weights, stored
from tests.test_weights import make_model, refusal


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    save_weights(make_model(), path)
    return path


def rewrite(sound: Path, path: Path, change: Any) -> Path:
    """A copy whose description ``change`` gets to edit, or is replaced by the text that it returns."""
    described = json.loads(stored.read_header(sound).metadata["mvision"])
    text = change(described["model"])
    save_file(load_file(sound), path, {"mvision": text if isinstance(text, str) else json.dumps(described)})
    return path


def setting(path: str, value: Any) -> Any:
    def change(model: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            model = model[section]
        model[key] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("neck.num_layers", 1_000_000, "num_layers: input should be less than or equal to 100"),
        ("neck.embed_dim", 2**20, "embed_dim: input should be less than or equal to 8192"),
        ("neck.embed_dim", 8192, "do not fit the model that they describe"),
        ("neck.num_layers", 100, "do not fit the model that they describe: a tensor is missing"),
        ("neck.ffn_dim", 65536, "size mismatch for neck"),
        ("neck.expansion", 1e300, "expansion: input should be less than or equal to 16"),
        ("neck.num_heads", 7, "cannot be built"),
        ("neck.attention_levels", [0, 1, 2, 99], "cannot be built"),
        ("heads.detection.num_layers", 10**9, "num_layers: input should be less than or equal to 100"),
        ("heads.detection.num_queries", 10**9, "num_queries: input should be less than or equal to 100000"),
        ("heads.detection.num_points", 1000, "size mismatch for heads.detection"),
        ("backbone.name", "vit_giant_patch14_dinov2", "do not fit the model that they describe|cannot be built"),
        ("backbone.name", "hf_hub:somebody/model", "backbone 'hf_hub:somebody/model' is unknown"),
        ("backbone.name", "../../etc/passwd", "is unknown to timm"),
        ("backbone.name", "resnet18?pretrained=1", "is unknown to timm"),
        ("backbone.name", "x" * 10**6, "name: string should have at most 200 characters"),
        ("backbone.strides", list(range(10**5)), "strides: list should have at most 16 items"),
        ("backbone.strides", [], "strides: list should have at least 1 item"),
        ("image_size", [2**30, 2**30], "image_size: height and width can be 16384 at most"),
        ("image_size", 10**400, "image_size"),
        ("categories", [{"id": i, "name": "x"} for i in range(100_001)], "categories: list should have at most 100000"),
        ("heads", {}, "model.heads is empty"),
        ("heads", {"os.system": {}}, "unknown task 'os.system'"),
        ("heads", {"keypoints": {"kind": []}}, "kind: input should be 'dense'"),
        ("heads", {"keypoints": {"kind": {"a": 1}}}, "kind: .* is unknown"),
    ],
)
def test_descriptions_that_ask_for_too_much(sound: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = rewrite(sound, tmp_path / "b.safetensors", setting(key, value))
    with pytest.raises(UserError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("use", [read_weights, lambda source: init_from(make_model(), source)])
def test_training_from_weights_asks_the_same(sound: Path, tmp_path: Path, use: Callable[[Path], object]) -> None:
    path = rewrite(sound, tmp_path / "b.safetensors", setting("neck.ffn_dim", 65536))
    with pytest.raises(UserError, match="size mismatch for neck"):
        use(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model": [', "NaN", "[]", '{"model": 5}', '{"model": {"heads": 3}}'])
def test_descriptions_that_are_damaged(sound: Path, tmp_path: Path, text: str) -> None:
    message = refusal(rewrite(sound, tmp_path / "b.safetensors", lambda model: text))
    assert len(message) < 1000


def header(tensors: dict[str, Any], size: int = 0, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        header({"a": ONE}, 4, length=10**6),
        header({"a": ONE}),  # no data
        header({"a": {**ONE, "data_offsets": [0, 2**62]}}, 4),
        header({"a": {**ONE, "data_offsets": [4, 0]}}, 4),
        header({"a": {**ONE, "data_offsets": [-4, 0]}}, 4),
        header({"a": {**ONE, "shape": [2**40, 2**40]}}, 4),
        header({"a": {**ONE, "dtype": "X9"}}, 4),
        header({"a": ONE, "b": ONE}, 4),  # both at one place
        header({"a": {"dtype": "F32"}}, 4),
        b'\x1f\0\0\0\0\0\0\0{"a": 1, "a": 2, "a": [[[[[[[[[[',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_headers_that_are_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "not a safetensors file, or damaged" in refusal(tmp_path / "a.safetensors")


def test_a_header_of_many_megabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_HEADER", 1000)
    save_file({f"tensor_{number}": torch.zeros(1) for number in range(100)}, tmp_path / "a.safetensors")
    assert "bytes, and 1,000 are allowed" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["neck.projections.0.conv.weight", "backbone.mean"])
def test_weights_that_are_not_finite_are_refused_by_name(sound: Path, tmp_path: Path, value: float, name: str) -> None:
    model = make_model()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = value
    save_weights(model, tmp_path / "a.safetensors")
    assert f"not finite: {name} contains NaN or infinity" in refusal(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"not finite: {name}"):
        init_from(make_model(), tmp_path / "a.safetensors")


def test_large_weights_whose_sum_overflows_are_finite() -> None:
    large = torch.full((3,), 6e4, dtype=torch.float16)
    assert stored.not_finite([("a", large), ("b", torch.tensor([1, 2])), ("c", torch.tensor([]))]) == []
    large[1] = float("inf")
    assert stored.not_finite([("a", large)]) == ["a"]


def test_numbers_of_another_kind_are_refused(sound: Path, tmp_path: Path) -> None:
    tensors, metadata = load_file(sound), stored.read_header(sound).metadata
    name = "neck.projections.0.conv.weight"
    for dtype, accepted in ((torch.float64, True), (torch.bfloat16, True), (torch.int32, False), (torch.bool, False)):
        save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / "a.safetensors", metadata)
        if accepted:
            assert load(tmp_path / "a.safetensors").state_dict()[name].dtype == torch.float32
        else:
            assert f"type mismatch for {name}: " in refusal(tmp_path / "a.safetensors")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a file but a device, pipe or socket" in refusal(tmp_path / "pipe.safetensors")
    assert "not a file but a device, pipe or socket" in refusal("/dev/zero")
    os.mkfifo(tmp_path / "best.safetensors")
    assert "there is only best.safetensors" in refusal(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened" in refusal(tmp_path / "loop")


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "b", "with\0zero", "runs/../../../x.safetensors", ""])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(UserError, match="weights ") as raised:
        load(name)
    assert len(str(raised.value)) < 1000
    assert "\0" not in str(raised.value)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may do everything
    assert "this folder cannot be read (permission denied)" in refusal(tmp_path)


def test_exports_are_named_where_weights_are_needed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.xml").write_text("x")
    for source, message in (
        ("model.onnx", "an exported model, which only"),
        ("folder", "an OpenVINO export, which only"),
    ):
        with pytest.raises(UserError, match=message):
            init_from(make_model(), tmp_path / source)

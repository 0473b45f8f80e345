"""Files of torch.save are read as tensors alone: nothing in them is run, and they cannot take more than they hold."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision import UserError, load
from mvision.storage import pickles
from mvision.storage.pickles import load_pickle, state_dict


class Dangerous:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.pth"
    torch.save({"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}}, path)
    return path


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    return state_dict(load_pickle(path), path)


def refusal(path: Path) -> str:
    """Why a file is refused; it is also refused as weights, in the same words."""
    with pytest.raises(UserError) as failure:
        read(path)
    with pytest.raises(UserError) as as_weights:
        load(path, family="deim")
    message = str(failure.value)
    assert str(as_weights.value) == message
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 600
    return message


def test_tensors_by_name(sound: Path) -> None:
    tensors, notes = read(sound)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert notes == []


@pytest.mark.parametrize("place", ["weights", "state", "key"])
def test_nothing_is_run(tmp_path: Path, place: str) -> None:
    harm: Any = Dangerous(tmp_path / "ran")
    content = {"weights": {"model": {"a": harm}}, "state": {"model": {"a": torch.zeros(1)}, "optimizer": harm}}
    torch.save(content.get(place, harm), tmp_path / "a.pth")
    assert "it would run code when opened (posix.mkdir" in refusal(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(harm))
    assert "can run code when opened and are never read" in refusal(tmp_path / "b.pth")
    assert not (tmp_path / "ran").exists()


def test_whole_models_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    assert "it would run code when opened (torch.nn.modules.linear.Linear" in refusal(tmp_path / "a.pth")


def test_old_files_of_torch_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert "not a file of torch.save, or damaged (it is no zip archive)" in refusal(tmp_path / "a.pth")


def test_files_that_are_cut_off(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    path = tmp_path / "a.pth"
    for length in (5, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        assert "damaged: its end is missing" in refusal(path)
    path.write_bytes(b"")
    assert "it is empty" in refusal(path)
    path.write_bytes(whole[: len(whole) // 2] + bytes(50) + whole[len(whole) // 2 + 50 :])
    with pytest.raises(UserError, match="damaged|not read|no tensor"):
        read(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    os.truncate(tmp_path / "a.pth", 2**40)
    assert "its end is missing" in refusal(tmp_path / "a.pth")


def compressed(sound: Path, path: Path) -> Path:
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        new.writestr("sound/data/9", bytes(2**24))
    return path


def test_zip_bombs(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = compressed(sound, tmp_path / "a.pth")
    assert bomb.stat().st_size < 2**16
    assert "is compressed, as torch.save never does" in refusal(bomb)
    monkeypatch.setattr(pickles, "MAX_PICKLE", 10)
    assert "its pickle takes" in refusal(sound)
    monkeypatch.setattr(pickles, "MAX_MEMBERS", 2)
    assert "parts, and 2 are allowed" in refusal(sound)


def test_members_that_overlap(sound: Path, tmp_path: Path) -> None:
    """Every entry of the directory at the end names the same megabyte: a file of any size, unpacked."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data/0", bytes(2**20))
        entry = archive.infolist()[0]
        for number in range(1, 50):
            again = zipfile.ZipInfo(f"a/data/{number}")
            again.header_offset, again.file_size, again.compress_size, again.CRC = 0, 2**20, 2**20, entry.CRC
            archive.filelist.append(again)
        archive._didModify = True  # type: ignore[attr-defined]
    assert "its parts claim 52,428,800 bytes, more than" in refusal(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**9),
        torch.zeros(3).to_sparse(),
    ],
    ids=["one number, repeated", "sparse"],
)
def test_tensors_of_kinds_that_weights_never_are(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"kind that weights never are|not read|damaged"):
        read(tmp_path / "a.pth")


def test_many_names_for_the_same_numbers(tmp_path: Path) -> None:
    shared = torch.zeros(100_000)
    torch.save({f"tensor {number}": shared for number in range(50)}, tmp_path / "a.pth")
    assert "its tensors claim more than the" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by their names"),
        ({}, "there are no tensors in it"),
        ({"model": {}}, "there are no tensors in it"),
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"model": {"a": {"b": torch.zeros(1)}}}, "'a' is a dict, not a tensor"),
        ({1: torch.zeros(1)}, "'1' is a Tensor, not a tensor|'1'"),
        ({"model": {"a": torch.zeros(1)}}, "not a model of RT-DETR"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.pth", family="deim")

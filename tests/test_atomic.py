"""A file is written whole or not at all, and a mistyped name is answered with a near one."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mvision.errors import did_you_mean
from mvision.storage import atomic
from mvision.storage.atomic import remove_partial_files, whole_file, write_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file with content, alone in its folder."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    return path


def test_the_new_file_replaces_the_old_one_at_the_end(old: Path) -> None:
    with whole_file(old) as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old"
        assert temporary.parent == old.parent  # a rename is atomic on one file system only
        assert temporary.name.startswith(".")
        assert str(os.getpid()) in temporary.name
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_unchanged(old: Path, error: BaseException) -> None:
    def write_half() -> None:
        with whole_file(old) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_a_failed_rename_leaves_no_temporary_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_text(old, "new")
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_the_content_is_on_the_disk_before_the_file_has_its_name(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_size) or fsync(number))
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append("rename") or replace(self, target))
    write_text(old, "four")
    assert events == [4, "rename"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_others_may_read_the_file_whatever_wrote_it(tmp_path: Path) -> None:
    """As they may read any other new file; libraries that make temporary files of their own make them private."""
    expected = tmp_path / "usual"
    expected.touch()
    with whole_file(tmp_path / "a") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE(expected.stat().st_mode)


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "Grüße ≤")
    assert (tmp_path / "a").read_bytes() == "Grüße ≤".encode()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a", "x")


def test_a_planted_link_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where its name was guessed: the file of the link stays as it was, and the write fails."""
    (tmp_path / "precious").write_text("old")
    monkeypatch.setattr(atomic, "_partial_name", lambda name: ".guessed.partial")
    (tmp_path / ".guessed.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "precious").read_text() == "old"
    assert (tmp_path / ".guessed.partial").is_symlink()  # it is not ours to remove


def test_the_temporary_name_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(20):
        with whole_file(tmp_path / "a") as temporary:
            names.add(temporary.name)
    assert len(names) == 20


def test_a_link_is_replaced_and_its_file_stays(old: Path) -> None:
    link = old.with_name("link")
    link.symlink_to(old)
    write_text(link, "new")
    assert not link.is_symlink()
    assert (link.read_text(), old.read_text()) == ("new", "old")
    link.unlink()
    link.symlink_to(old.with_name("gone"))  # to nothing
    write_text(link, "new")
    assert link.read_text() == "new"


def test_a_folder_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    places = [tmp_path / "folder", *(Path("/dev/null"),) * Path("/dev/null").exists()]
    for place in places:
        with pytest.raises(FileExistsError, match="is there and is not a file"):
            write_text(place, "new")
        assert not place.is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize("length", [200, 240, 255])
def test_names_of_the_greatest_length(tmp_path: Path, length: int) -> None:
    for name in ("a" * length, "ü" * (length // 2)):  # two bytes each
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"


def test_the_error_names_the_file_and_not_the_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int, mode: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        write_text(tmp_path / "a.txt", "new")
    assert caught.value.filename == str(tmp_path / "a.txt")


@pytest.mark.skipif(os.name != "posix", reason="whether a process runs is not asked on Windows")
def test_what_killed_processes_left_is_removed(old: Path) -> None:
    """Of this machine's processes that have ended; of any where the caller has the folder for itself."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        child = process.pid
    folder, own = old.parent, atomic._partial_name("a.txt")
    dead = own.replace(f"-{os.getpid()}-", f"-{child}-")
    elsewhere = f".a.txt.{'0' * 8}-{child}-{'1' * 12}.partial"
    of_safetensors = ".tmpgGMVaq"
    for name in (own, dead, elsewhere, of_safetensors, ".of_others.partial", "a.partial"):
        (folder / name).touch()
    assert remove_partial_files(folder) == 1
    assert not (folder / dead).exists()
    assert remove_partial_files(folder, all_of_them=True) == 3
    assert sorted(file.name for file in folder.iterdir()) == [".of_others.partial", "a.partial", "a.txt"]
    assert remove_partial_files(folder / "none") == 0


def test_did_you_mean() -> None:
    assert did_you_mean("trian", ["train", "transfer"]) == "did you mean 'train'?"
    assert did_you_mean("NANO", ["tiny", "Nano"]) == "did you mean 'Nano'?"
    assert did_you_mean("xyz", ["tiny", "nano"]) == "choose one of nano, tiny"
    many = [f"resnet{index}" for index in range(100)]
    assert did_you_mean("resnt50", many).startswith("did you mean 'resnet50' or 'resnet")
    assert did_you_mean("!", many) == "no known name is like it"

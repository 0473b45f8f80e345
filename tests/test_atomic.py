"""A file is written whole or not at all, and a mistyped name is answered with a near one."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from mvision.errors import did_you_mean
from mvision.storage.atomic import whole_file, write_text


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


def test_did_you_mean() -> None:
    assert did_you_mean("trian", ["train", "transfer"]) == "did you mean 'train'?"
    assert did_you_mean("NANO", ["tiny", "Nano"]) == "did you mean 'Nano'?"
    assert did_you_mean("xyz", ["tiny", "nano"]) == "choose one of nano, tiny"
    many = [f"resnet{index}" for index in range(100)]
    assert did_you_mean("resnt50", many).startswith("did you mean 'resnet50' or 'resnet")
    assert did_you_mean("!", many) == "no known name is like it"

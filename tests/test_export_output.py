"""An export arrives at its target as a whole or not at all: kills, full disks, and what earlier processes left."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mvision import UserError
from mvision.deploy.exported import is_exported
from mvision.deploy.output import check_target, data_name, place, restore, scratch, writing
from tests.test_export_command import text_of, write_folder, write_onnx

# Every function of the standard library by which ``place`` changes something on the disk.
OPERATIONS = [(os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"), (Path, "replace")]


class Killed(BaseException):
    """Stands for SIGKILL: no ``except Exception`` of the code under test catches it."""


def killed_before(number: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do the work until it is about to do its file operation of that number; False if it has not as many."""
    done = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def operation(*args: object, **kwargs: object) -> object:
            nonlocal done
            if done == number:
                raise Killed
            done += 1
            return original(*args, **kwargs)

        return operation

    with monkeypatch.context() as patched:
        for owner, name in OPERATIONS:
            patched.setattr(owner, name, counted(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_kill_leaves_the_earlier_or_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "best_openvino", set()
    for number in range(100):
        shutil.rmtree(tmp_path)
        (tmp_path / "scratch").mkdir(parents=True)
        write_folder(target, "old")
        fresh = tmp_path / "scratch" / "best_openvino"
        write_folder(fresh, "new")
        was_killed = killed_before(number, monkeypatch, partial(place, fresh, target))
        assert is_exported(target)  # brings an earlier one back
        text = (target / "model.bin").read_text()
        assert f"<text>{text}</text>" in (target / "model.xml").read_text()
        seen.add(text)
        # The next export goes through, and leaves nothing else.
        check_target(target, "openvino")
        write_folder(tmp_path / "scratch" / "next", "next")
        place(tmp_path / "scratch" / "next", target)
        shutil.rmtree(tmp_path / "scratch")
        assert {path.name for path in tmp_path.iterdir()} == {"best_openvino"}
        if not was_killed:
            break
    assert number >= 4
    assert seen == {"old", "new"}


def test_a_kill_leaves_a_graph_with_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "x.onnx", set()
    for number in range(100):
        shutil.rmtree(tmp_path)
        (tmp_path / "scratch").mkdir(parents=True)
        write_onnx(target, "old", data=data_name(target))
        fresh = tmp_path / "scratch" / "x.onnx"
        write_onnx(fresh, "new", data=data_name(fresh))
        was_killed = killed_before(number, monkeypatch, partial(place, fresh, target))
        text = text_of(target)
        assert weights_of(target) == f"weights of {text}"
        seen.add(text)
        if not was_killed:
            break
    assert number > 3
    assert seen == {"old", "new"}
    assert len(list(tmp_path.glob("x.onnx.*"))) == 1


def weights_of(path: Path) -> str:
    import onnx

    (entry,) = onnx.load(path, load_external_data=False).graph.initializer[0].external_data
    return path.with_name(entry.value).read_text()


def test_a_folder_of_the_user_with_the_second_name_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.earlier").mkdir()
    (tmp_path / ".x.earlier" / "mine").write_text("precious")
    write_folder(tmp_path / "x", "old")
    (tmp_path / "scratch").mkdir()
    write_folder(tmp_path / "scratch" / "new", "new")
    with pytest.raises(OSError, match="not empty"):
        place(tmp_path / "scratch" / "new", tmp_path / "x")
    assert (tmp_path / ".x.earlier" / "mine").read_text() == "precious"
    assert (tmp_path / "x" / "model.bin").read_text() == "old"


def test_nothing_is_brought_back_over_what_is_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", "new")
    write_folder(tmp_path / ".x.earlier", "old")
    restore(tmp_path / "x")
    assert (tmp_path / "x" / "model.bin").read_text() == "new"


def test_folders_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mvision.storage.atomic import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])) as folder: (folder / 'half').write_text('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.onnx"], check=False)
    (left,) = tmp_path.iterdir()
    assert left.is_dir()
    (tmp_path / ".export-of-mine").mkdir()
    with scratch(tmp_path / "x.onnx") as ours:
        assert not left.exists()
        with scratch(tmp_path / "x.onnx"):
            assert ours.is_dir()  # its process is alive
    assert [path.name for path in tmp_path.iterdir()] == [".export-of-mine"]


def test_errors_of_the_disk_name_the_output(tmp_path: Path) -> None:
    message = "--output out: cannot be written .No space left on device.; choose another"
    with pytest.raises(UserError, match=message), writing(Path("out")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--output .*cannot be written"), scratch(tmp_path / "file" / "x.onnx"):
        pass

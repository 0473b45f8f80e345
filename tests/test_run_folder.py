"""A run's folder: its name, what is refused, and its state after a kill."""

import subprocess
import sys

import pytest

from mvision.errors import UserError
from mvision.storage import atomic
from mvision.storage.run_folder import RunFolder


def test_resuming_a_folder_without_state_is_refused(tmp_path):
    with pytest.raises(UserError, match="no saved state"):
        RunFolder.resume(tmp_path)


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunFolder.create(None, ["detection"]).path) == "runs/detection/1"
    assert str(RunFolder.create(None, ["detection"]).path) == "runs/detection/2"


def test_a_state_of_pickles_is_refused(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"files that can run code.*--init .*best\.safetensors"):
        RunFolder.resume(tmp_path)


def test_one_run_at_a_time_and_the_claim_ends_with_the_process(tmp_path):
    code = "import sys, os, pathlib; from mvision.storage.run_folder import RunFolder\n"
    code += "with RunFolder(pathlib.Path(sys.argv[1])).claimed(): print('claimed', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="a training is going on in this folder"), RunFolder(tmp_path).claimed():
            pass
        other.kill()
        other.wait()
        with RunFolder(tmp_path).claimed():
            pass


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / "last").mkdir()
    left = [folder / atomic._partial_name("state") for folder in (tmp_path, tmp_path / "last")]
    for file in (*left, tmp_path / "notes.txt"):
        file.touch()
    with RunFolder(tmp_path).claimed():
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last", "notes.txt"]
        assert not list((tmp_path / "last").iterdir())


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder is not empty; choose another, or --resume"):
        RunFolder.create(tmp_path, ["detection"])
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "run", ["detection"])


def test_records_agree_with_the_state(tmp_path):
    """Those of epochs that are trained again are removed, and one that a kill prevented is made up for."""
    run = RunFolder(tmp_path)
    assert run.records() == []
    assert run.restore_records(0, None) == []
    for epoch in range(4):
        run.log({"epoch": epoch, "loss": {}})
    records = [{"epoch": epoch, "loss": {}} for epoch in range(3)]
    assert run.restore_records(2, records[1]) == records[:2]
    assert run.restore_records(3, records[2]) == records
    assert run.records() == records


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 1',
        "[]",
        '{"epoch": "one", "loss": {}}',
        '{"loss": {}}',
        '{"epoch": 1}',
        '{"epoch": 1, "loss": 1}',
        '{"epoch": 1, "loss": {"boxes": "much"}}',
        '{"epoch": 1, "loss": {}, "metrics": {"detection": 1}}',
        '{"epoch": 1, "loss": {}, "metrics": []}',
    ],
)
def test_a_damaged_record_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "loss": {}}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not .*; remove that line"):
        RunFolder(tmp_path).records()


def test_the_end_of_a_run_is_noted_for_its_number_of_epochs(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.is_finished(3)
    (tmp_path / "last").mkdir()
    run.mark_finished(3)
    assert run.is_finished(3)
    assert not run.is_finished(4)  # trained on, and killed before its figures were written

"""A run's folder: its name, what is refused, and its state after a kill."""

import pytest

from mvision.errors import UserError
from mvision.storage.run_folder import RunFolder


def test_resuming_a_folder_without_state_is_refused(tmp_path):
    with pytest.raises(UserError, match="no saved state"):
        RunFolder.resume(tmp_path)


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunFolder.create(None, ["detection"]).path) == "runs/detection/1"
    assert str(RunFolder.create(None, ["detection"]).path) == "runs/detection/2"


def test_the_state_survives_a_kill_between_the_two_renames(tmp_path):
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.old" / "progress.json").write_text("{}")
    run = RunFolder.resume(tmp_path)
    assert (run.state() / "progress.json").is_file()


def test_a_new_state_replaces_the_old_one(tmp_path):
    run = RunFolder(tmp_path)
    for text in ("first", "second", "third"):
        fresh = tmp_path / ".fresh"
        fresh.mkdir()
        (fresh / "progress.json").write_text(text)
        run.replace_state(fresh)
        assert (RunFolder.resume(tmp_path).state() / "progress.json").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder is not empty; choose another, or --resume"):
        RunFolder.create(tmp_path, ["detection"])
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "run", ["detection"])


def test_records_are_cut_at_the_epoch_that_is_trained_again(tmp_path):
    run = RunFolder(tmp_path)
    assert run.records() == []
    for epoch in range(4):
        run.log({"epoch": epoch})
    run.cut_records(2)
    assert [record["epoch"] for record in run.records()] == [0, 1]

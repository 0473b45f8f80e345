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
    run = RunFolder(tmp_path)
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.old" / "progress.json").write_text("{}")
    assert (run.state() / "progress.json").is_file()

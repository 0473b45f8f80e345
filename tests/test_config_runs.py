"""The configuration and the data of a run, found from its folder or its weights."""

from __future__ import annotations

from pathlib import Path

from mvision.config import config_of_run, data_of_run, load_config


def test_the_config_of_a_run_is_found_from_its_folder_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{train: {epochs: 3}, data: {}, model: {}}")
    weights = tmp_path / "best.safetensors"
    weights.touch()
    for source in (tmp_path, weights):
        config = config_of_run(source)
        assert config is not None
        assert config.train.epochs == 3
    (tmp_path / "empty").mkdir()
    assert config_of_run(tmp_path / "empty") is None
    for text in ("server: {port: 80}", "train: {epochs: 3}", "- a list"):  # of other programs
        (tmp_path / "empty" / "config.yaml").write_text(text)
        assert config_of_run(tmp_path / "empty") is None
    assert config_of_run(tmp_path / "not there.safetensors") is None
    assert config_of_run("somebody/a_model") is None


def test_the_data_of_a_run_by_its_folder(tmp_path: Path) -> None:
    """Its folder keeps the run's splits and folds, and serves all tasks alone; another one has nothing of the run's."""
    more = [{"root": "other", "tasks": ["keypoints"]}]
    data = {"root": str(tmp_path), "val": "test", "val_fraction": 0.25, "tasks": ["detection"], "more": more}
    run = load_config("tiny", overrides={"data": data})
    assert data_of_run(run, None) is run.data
    for root in (str(tmp_path), f"{tmp_path}/../{tmp_path.name}/"):
        found = data_of_run(run, root)
        assert (found.val, found.val_fraction, found.tasks, found.more) == ("test", 0.25, [], [])
    for config in (run, None):
        found = data_of_run(config, "elsewhere")
        assert (found.root, found.val, found.val_fraction) == ("elsewhere", "val", 0)

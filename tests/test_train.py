"""The training run: what it leaves, resuming, data without objects, divergence, several processes."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file

from mvision.commands.val import validate
from mvision.config import load_config
from mvision.engine.epoch import train_epoch
from mvision.engine.optim import set_learning_rate
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.model import Model
from mvision.storage.run_folder import RunFolder
from mvision.weights import load
from tests.conftest import write_squares
from tests.small_runs import fast_config, run_in_process


def records_of(run):
    return RunFolder(run).records()


def test_a_run_leaves_everything_it_promises(squares, tmp_path, capsys):
    run = run_in_process(squares, tmp_path / "run", train__epochs=2)
    expected = {"best.safetensors", "last", "config.yaml", "metrics.jsonl", "results.png", "predictions.jpg"}
    expected |= {"metrics.json", ".lock", "confusion_matrix.png", "curves.png", "curves.json", "calibration.png"}
    assert {path.name for path in run.iterdir()} == expected
    figures = json.loads((run / "metrics.json").read_text())
    assert {"AP", "AP50", "AP/blue", "AP/red"} <= set(figures["detection"])
    records = records_of(run)
    assert [record["step"] for record in records] == [2, 4]
    best = max((r["metrics"]["detection"] for r in records), key=lambda m: m["AP"])
    assert {name: figures["detection"][name] for name in best} == best
    assert cv2.imread(str(run / "predictions.jpg")) is not None
    assert cv2.imread(str(run / "results.png")) is not None
    model = load(run)
    assert model.categories[1].name == "red"
    assert "Average Precision" in capsys.readouterr().out


def test_training_learns(tmp_path):
    data = write_squares(tmp_path / "data", images=20)
    run = run_in_process(data, tmp_path / "run", train__epochs=4, train__val_interval=4)
    first, last = (sum(records_of(run)[index]["loss"].values()) for index in (0, -1))
    assert last < 0.8 * first


def test_a_resumed_run_equals_the_uninterrupted_one(squares, tmp_path, monkeypatch):
    whole = run_in_process(squares, tmp_path / "whole", train__epochs=3)

    class Stop(Exception):
        pass

    def stop_in_the_third_epoch(trainer, loader, epoch):
        if epoch == 2:
            raise Stop
        return train_epoch(trainer, loader, epoch)

    with monkeypatch.context() as patch:
        patch.setattr("mvision.engine.train.train_epoch", stop_in_the_third_epoch)
        with pytest.raises(Stop):
            run_in_process(squares, tmp_path / "killed", train__epochs=3)
    assert len(records_of(tmp_path / "killed")) == 2
    torch.manual_seed(12345)  # another process would start with another state
    resumed = train(load_config(file=tmp_path / "killed" / "config.yaml"), resume=tmp_path / "killed", device="cpu")

    def without_time(run):
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records_of(run)]

    assert without_time(resumed) == without_time(whole)
    states = [load_file(RunFolder(run).state) for run in (whole, resumed)]
    assert {name.partition(".")[0] for name in states[0]} == {"model", "average", "optimizer", "random"}
    for first, second in ((load(whole).state_dict(), load(resumed).state_dict()), states):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_epoch_without_objects_trains(tmp_path, precision):
    data = write_squares(tmp_path / "empty", images=3, objects=0)
    kept = write_squares(tmp_path / "kept", images=3, objects=1)
    # At least one label is needed for there to be anything to learn at all: it is in the last image alone.
    content = json.loads((kept / "annotations" / "train.json").read_text())
    content["annotations"] = content["annotations"][-1:]
    (data / "annotations" / "train.json").write_text(json.dumps(content))
    run = run_in_process(
        data, tmp_path / "run", train__epochs=2, train__batch_size=1, train__precision=precision, data__augment__crop=0
    )
    for record in records_of(run):
        assert all(np.isfinite(value) for value in record["loss"].values())
    assert all(value.isfinite().all() for value in load(run).state_dict().values() if value.is_floating_point())


def test_a_damaged_image_is_named_and_left_out(squares, tmp_path, capsys):
    (squares / "images" / "train_1.jpg").write_bytes(b"no picture")
    run = run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert (run / "best.safetensors").is_file()
    printed = capsys.readouterr()
    assert "train_1.jpg" in printed.out + printed.err


def test_divergence_ends_with_one_clear_line(squares, tmp_path, monkeypatch):
    def loss(model, outputs, targets):
        return {"detection/class": next(model.parameters()).sum() * float("nan")}

    monkeypatch.setattr("mvision.engine.epoch.MAX_BAD_STEPS", 2)
    monkeypatch.setattr("mvision.model.Model.loss", loss)
    with pytest.raises(UserError, match=r"diverged: no finite gradient in 2 steps.*lr"):
        run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert not (tmp_path / "run" / "best.safetensors").exists()


def scripted_evaluation(monkeypatch, figures):
    """Evaluations give these AP one after the other; returns a list that gets the weights that were evaluated."""
    evaluated, values = [], iter(figures)

    def evaluate_all(model, validation, accelerator):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"detection": {"AP": next(values)}}

    monkeypatch.setattr("mvision.engine.train.evaluate_all", evaluate_all)
    monkeypatch.setattr("mvision.engine.checkpoint.plot_run", lambda records, path: None)  # most of a short run's time
    return evaluated


def test_patience_is_a_number_of_evaluations(squares, tmp_path, monkeypatch, capsys):
    """Evaluated after every second epoch: the third evaluation is the second without a better figure."""
    scripted_evaluation(monkeypatch, [0.5, 0.4, 0.3, 0.5])
    run = run_in_process(squares, tmp_path / "run", train__epochs=9, train__patience=2, train__val_interval=2)
    assert [record["epoch"] for record in records_of(run) if "metrics" in record] == [1, 3, 5]
    assert len(records_of(run)) == 6
    printed = capsys.readouterr().out
    assert "stopped early: no better result in 2 evaluations" in printed
    assert "best weights (epoch 2)" in printed


def test_the_moving_average_is_evaluated_and_saved_after_the_last_epoch_too(squares, tmp_path, monkeypatch):
    evaluated = scripted_evaluation(monkeypatch, [0.4, 0.5, 0.5])
    settings = {"train__ema_decay": 0.9, "train__ema_warmup": 1, "train__val_interval": 2}
    run = run_in_process(squares, tmp_path / "run", train__epochs=3, **settings)
    assert [record["epoch"] for record in records_of(run) if "metrics" in record] == [1, 2]
    state, best = load_file(RunFolder(run).state), load_file(run / "best.safetensors")
    weight = "neck.projections.0.conv.weight"
    assert torch.equal(evaluated[1][weight], state[f"average.{weight}"])
    assert torch.equal(best[weight], state[f"average.{weight}"])
    assert not torch.allclose(state[f"model.{weight}"], best[weight], rtol=1e-3)
    assert torch.equal(evaluated[2][weight], best[weight])  # the last evaluation is that of the best weights


def test_the_validation_images_are_evaluated(squares, tmp_path, monkeypatch):
    file = squares / "annotations" / "val.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][2:]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] > 2]
    file.write_text(json.dumps(content))
    seen = []

    def evaluate_all(model, validation, accelerator):
        seen.append([target.image_id for part in validation for batch in part.loader for target in batch.targets])
        return {"detection": {"AP": 0.5}}

    monkeypatch.setattr("mvision.engine.train.evaluate_all", evaluate_all)
    run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert seen == [[3, 4], [3, 4]]


def test_the_schedule_is_over_the_steps_that_are_taken(squares, tmp_path, monkeypatch):
    """Four images, one a batch, three batches a step: two steps an epoch."""
    seen = []

    def record(optimizer, config, step, total, last):
        seen.append((step, total, last))
        return set_learning_rate(optimizer, config, step, total, last)

    monkeypatch.setattr("mvision.engine.epoch.set_learning_rate", record)
    scripted_evaluation(monkeypatch, [0.5, 0.5, 0.5])
    run = run_in_process(
        squares,
        tmp_path / "run",
        train__epochs=2,
        train__batch_size=1,
        train__accumulate=3,
        data__augment__crop=0,
        data__augment__last_epochs=0.4,
    )
    assert seen == [(0, 4, 2), (1, 4, 2), (2, 4, 2), (3, 4, 2)]  # the second epoch is of the last ones
    assert [record["step"] for record in records_of(run)] == [2, 4]


def test_frozen_parts_stay_as_they_were(squares, tmp_path):
    config = fast_config(squares, train__epochs=1, train__freeze=["backbone"], train__ema_decay=0)
    run = train(config, output=tmp_path / "run", device="cpu")
    set_seed(config.train.seed)
    fresh, trained = Model(config.model).state_dict(), load(run).state_dict()
    assert all(torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("backbone."))
    assert any(not torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("neck."))


def test_init_takes_the_weights_of_another_run(squares, tmp_path, capsys):
    first = run_in_process(squares, tmp_path / "first", train__epochs=1)
    config = fast_config(squares, train__epochs=1, train__lr=1e-9, train__ema_decay=0)
    second = train(config, output=tmp_path / "second", init=str(first), device="cpu")
    before, after = load(first).state_dict(), load(second).state_dict()
    weight = "neck.projections.0.conv.weight"
    torch.testing.assert_close(before[weight], after[weight], atol=1e-6, rtol=0)


def test_an_output_folder_in_use_is_refused(squares, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*not empty"):
        run_in_process(squares, tmp_path / "run", train__epochs=1)


def test_two_processes_train_and_agree_on_the_figures(squares, tmp_path):
    """Gloo on CPU: one run folder, and the figures that one process measures for its weights.

    Objects are in one image alone, so one of the processes has batches without any.
    """
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom mvision.config import load_config\n"
        "from mvision.engine.train import train\n"
        "if __name__ == '__main__':\n"
        "    train(load_config(file=sys.argv[1]), output=Path(sys.argv[2]), device='cpu')\n"
    )
    content = json.loads((squares / "annotations" / "train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    (squares / "annotations" / "train.json").write_text(json.dumps(content))
    config = tmp_path / "config.yaml"
    config.write_text(fast_config(squares, train__epochs=2).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(config), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    validate(str(tmp_path / "run"), data=str(squares), output=tmp_path / "val", device="cpu", workers=0)
    one = json.loads((tmp_path / "val" / "metrics.json").read_text())
    two = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert one == two


def test_a_tracker_that_is_not_installed_is_no_training_without_it(tmp_path, monkeypatch):
    """accelerate leaves it out in silence."""
    monkeypatch.setattr("mvision.engine.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        UserError, match=r"the package of wandb is not installed \(installed: tensorboard\): pip install wandb"
    ):
        run_in_process(write_squares(tmp_path / "data"), tmp_path / "run", train__trackers=["wandb"])
    assert not (tmp_path / "run").exists()

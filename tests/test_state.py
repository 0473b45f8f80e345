"""The saved state of a run: nothing in it is code, nothing in it is NaN, damage is one line."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mvision.data import Batch
from mvision.engine.checkpoint import start
from mvision.engine.epoch import train_epoch
from mvision.engine.state import load_state, not_finite, random_states, read_state, save_state
from mvision.engine.train import _train_epochs
from mvision.errors import Stopped, UserError
from mvision.storage.run_folder import BEST, RunFolder
from tests.stand_in_runs import (
    Batches,
    assert_same_runs,
    go_on,
    make_trainer,
    stand_ins,  # noqa: F401 - a fixture
    whole_run,
    whole_runs,  # noqa: F401 - a fixture
)


@pytest.mark.parametrize("part", ["weights", "average", "optimizer"])
def test_what_is_not_finite_is_never_saved(part: str, tmp_path: Path, whole: dict[str, Path]) -> None:
    """Neither as the best weights nor as the state, which stays that of the epoch before."""
    trainer = make_trainer()
    torch.manual_seed(1)
    spoilt = {
        "weights": lambda: trainer.bare_model.last.weight,
        "average": lambda: trainer.eval_model.last.bias,
        "optimizer": lambda: trainer.optimizer.state[trainer.bare_model.wide.weight]["exp_avg_sq"],
    }

    def spoil(epoch: int, index: int) -> None:
        if (epoch, index) == (1, 4):
            with torch.no_grad():
                spoilt[part]().flatten()[0] = float("inf" if part == "optimizer" else "nan")

    run = RunFolder(tmp_path)
    start(trainer, run, None)
    message = r"diverged in epoch 2: .* not finite .* the state of epoch 1 is kept in .*lower train\.lr"
    with pytest.raises(UserError, match=message):
        _train_epochs(trainer, run, Batches(spoil), [])  # type: ignore[arg-type]
    assert part in not_finite(trainer)[0]
    assert read_state(run.state).progress.epoch == 1
    assert all(tensor.isfinite().all() for file in (run.state, run.path / BEST) for tensor in load_file(file).values())
    go_on(tmp_path)
    assert_same_runs(tmp_path, whole_run(whole))


def test_running_means_survive_a_step_that_overflows(tmp_path: Path) -> None:
    """The norm takes NaN from the forward pass, whether or not the optimiser makes the step."""
    trainer = make_trainer(accumulate=1)

    class Overflow(Batches):
        def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
            for index, batch in enumerate(super().epoch(number, start)):
                yield Batch(batch.images * (float("inf") if index == 2 else 1), [])

    train_epoch(trainer, Overflow(), 0)  # type: ignore[arg-type]
    assert trainer.bare_model.norm.num_batches_tracked == 5
    assert not_finite(trainer) == []


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def test_no_pickle_is_opened(tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the names that earlier versions, accelerate and torch use lie beside the state."""
    with pytest.raises(Stopped):
        go_on(tmp_path / "run", Batches(lambda epoch, index: os.kill(os.getpid(), signal.SIGTERM)))
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scaler.pt", "state.pkl"):
        (tmp_path / "run" / "last" / name).write_bytes(pickle.dumps(Bomb()))
    go_on(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole_run(whole))


@pytest.mark.parametrize(
    "content",
    [b"", b"no safetensors", pickle.dumps(Bomb()), b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{}      "],
)
def test_a_damaged_state_is_one_line(content: bytes, tmp_path: Path) -> None:
    state = RunFolder(tmp_path).state
    state.parent.mkdir()
    state.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.safetensors: the saved state is damaged.*--init .*best\.safetensors"):
        read_state(state)


def test_a_state_of_another_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        go_on(tmp_path, Batches(lambda epoch, index: os.kill(os.getpid(), signal.SIGTERM)))
    trainer, run = make_trainer(), RunFolder(tmp_path)
    trainer.bare_model.last = nn.Linear(20, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="of another model than the config describes"):
        start(trainer, run, read_state(run.state))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_scale_of_the_loss_and_more_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fp16 adds to the state; and a process that the saved run did not have keeps its own random numbers."""
    first, second = make_trainer(), make_trainer()
    for trainer, scale in ((first, 32.0), (second, 4096.0)):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accelerator.scaler.scale(torch.ones(1))  # it is made when it is used
    first.random = random_states(first.accelerator)
    save_state(first, RunFolder(tmp_path).state, None)
    load_state(second, RunFolder(tmp_path).state, read_state(RunFolder(tmp_path).state))
    assert second.accelerator.scaler is not None
    assert second.accelerator.scaler.get_scale() == 32
    monkeypatch.setattr(Accelerator, "process_index", 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_state(second, RunFolder(tmp_path).state, read_state(RunFolder(tmp_path).state))
    assert torch.equal(torch.get_rng_state(), before)


def test_options_of_a_resumed_run_have_an_effect(tmp_path: Path) -> None:
    """The rates are those of the config, not those that the run had before."""
    with pytest.raises(Stopped):
        go_on(tmp_path, Batches(lambda epoch, index: os.kill(os.getpid(), signal.SIGTERM)))
    trainer = go_on(tmp_path, lr=0.05, weight_decay=0.5, epochs=2)
    assert {group["peak_lr"] for group in trainer.optimizer.param_groups} == {0.05}
    assert max(group["weight_decay"] for group in trainer.optimizer.param_groups) == 0.5
    assert len(RunFolder(tmp_path).records()) == 2
    assert go_on(tmp_path, epochs=3).progress.epoch == 3

"""Runs that are killed, stopped or out of disk space at every moment, on a model that trains in milliseconds.

What is compared is a whole run with one that was broken off and resumed: its state, its best weights, its records.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvision.compat import reset_accelerate
from mvision.config import parse_config
from mvision.data import Batch
from mvision.engine import checkpoint
from mvision.engine import train as train_module
from mvision.engine.checkpoint import start
from mvision.engine.epoch import train_epoch
from mvision.engine.optim import Ema, build_optimizer
from mvision.engine.state import load_state, not_finite, random_states, read_state, run_facts, save_state
from mvision.engine.train import _train_epochs
from mvision.engine.trainer import Trainer
from mvision.errors import Stopped, UserError
from mvision.storage import atomic
from mvision.storage.atomic import write_text
from mvision.storage.run_folder import BEST, RunFolder

SCORES = [0.2, 0.6, 0.4]
"""Of the three epochs: the second is the best one."""


class Noisy(nn.Module):
    """A matrix for Muon and one too small for it, a filter in channels_last memory, a norm, noise in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.last = nn.Linear(3, 20), nn.BatchNorm1d(20), nn.Linear(20, 2)
        self.conv = nn.Conv2d(3, 20, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, targets: list[Any]) -> Tensor:
        maps = self.conv(images[:, :, None, None] * torch.linspace(0, 1, 9).reshape(3, 3))
        return self.last(self.norm(self.wide(images) + maps.flatten(1)) + 0.1 * torch.rand(len(images), 20))

    def loss(self, outputs: Tensor, targets: list[Any]) -> dict[str, Tensor]:
        return {"detection/box": outputs.square().mean()}


class Batches:
    """Five batches; ``before`` is called with the epoch and the number of each."""

    def __init__(self, before: Callable[[int, int], None] = lambda epoch, index: None) -> None:
        self.before = before

    def __len__(self) -> int:
        return 5

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, len(self)):
            self.before(number, index)
            yield Batch(torch.rand(4, 3, generator=torch.Generator().manual_seed(5 * number + index)), [])


def make_trainer(**settings: Any) -> Trainer:
    torch.manual_seed(0)
    config = parse_config(
        {"train": {"epochs": 3, "accumulate": 2, "warmup_steps": 2, "lr": 0.1, "ema_warmup": 3, **settings}}
    )
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model = Noisy()
    ema = Ema(model, config.train.ema_decay, config.train.ema_warmup) if config.train.ema_decay else None
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, config.train))  # type: ignore[arg-type]
    return Trainer(config, accelerator, wrapped, optimizer, ema, 9, facts=run_facts(config, [(20, 4)], 5))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation with figures that are given, and files that need no real model."""

    def evaluate_all(model: nn.Module, validation: list[Any], accelerator: Any) -> dict[str, dict[str, float]]:
        epoch = len(validation)
        validation.append(None)
        return {"detection": {"AP": SCORES[epoch]}}

    def save_weights(model: nn.Module, path: Path, extra: dict[str, Any]) -> None:
        with atomic.whole_file(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)

    monkeypatch.setattr(os, "fsync", lambda number: None)  # most of the time of such short runs
    monkeypatch.setattr(train_module, "evaluate_all", evaluate_all)
    monkeypatch.setattr(checkpoint, "save_weights", save_weights)
    monkeypatch.setattr(checkpoint, "plot_run", lambda records, path: write_text(path, f"{len(records)} epochs"))


def go_on(folder: Path, loader: Any = None, **settings: Any) -> Trainer:
    """A run in this folder from the start, or from its state if it has one."""
    trainer, run = make_trainer(**settings), RunFolder(folder)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(999 if run.state.is_file() else 1)  # another process starts with other random numbers
    with run.claimed(), trainer.stop.listening():
        saved = read_state(run.state) if run.state.is_file() else None
        start(trainer, run, saved)
        done = [None] * trainer.progress.epoch
        _train_epochs(trainer, run, loader or Batches(), done)  # type: ignore[arg-type]
    return trainer


def assert_same_runs(folder: Path, whole: Path, epochs: int = 3) -> None:
    runs = [RunFolder(path) for path in (folder, whole)]
    for file in ("state", "best"):
        first, second = (load_file(run.state if file == "state" else run.path / BEST) for run in runs)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    first_records, second_records = ([{**r, "seconds": 0} for r in run.records()] for run in runs)
    assert first_records == second_records
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert (folder / "results.png").read_text() == f"{epochs} epochs"


class Killed(BaseException):
    """In place of SIGKILL: nothing can catch it, and no clean-up has an effect after it."""


def break_off(monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException]) -> list[str]:
    """From the ``at``-th operation on files on, all of them fail; returns a list that gets the names of all of them."""
    operations: list[str] = []

    def guard(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def guarded(*arguments: Any, **options: Any) -> Any:
            operations.append(name)
            if len(operations) > at:
                raise error()
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, guarded)

    for owner, name in (
        *((Path, name) for name in ("mkdir", "replace", "unlink", "write_text", "chmod")),
        *((os, name) for name in ("open", "fsync")),
        (atomic, "_partial_name"),
    ):
        guard(owner, name)
    return operations


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs by optimiser; made by the first test that wants one."""
    return {"folder": tmp_path_factory.mktemp("whole")}


def whole_run(whole: dict[str, Path], **settings: Any) -> Path:
    name = str(settings)
    if name not in whole:
        whole[name] = whole["folder"] / str(len(whole))
        go_on(whole[name], **settings)
    return whole[name]


def test_the_stand_ins_train(whole: dict[str, Path]) -> None:
    folder = whole_run(whole)
    assert [record["metrics"]["detection"]["AP"] for record in RunFolder(folder).records()] == SCORES
    average, best = load_file(RunFolder(folder).state), load_file(folder / BEST)
    assert not torch.equal(average["average.wide.weight"], best["wide.weight"])  # the second epoch's, not the third's
    assert read_state(RunFolder(folder).state).progress.best_epoch == 1


@pytest.mark.parametrize(
    ("first", "error"), [(0, Killed), (1, lambda: OSError(errno.ENOSPC, "No space left on device"))]
)
def test_a_run_broken_off_before_an_operation_on_files_goes_on_as_if_nothing_had_been(
    first: int, error: Callable[[], BaseException], tmp_path: Path, whole: dict[str, Path]
) -> None:
    """Every second operation for either kind; with steps of one it passes too, and takes twice as long."""
    reference, at, ended, messages = whole_run(whole, epochs=2), first, False, []
    while not ended:
        folder = tmp_path / str(at)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            operations = break_off(patch, at, error)
            try:
                go_on(folder, epochs=2)
                ended = True
            except (Killed, UserError, OSError) as caught:
                messages.append(str(caught))
        go_on(folder, epochs=2)
        assert_same_runs(folder, reference, epochs=2)
        at += 2
    assert at > 40  # operations of a whole run
    assert {"mkdir", "open", "fsync", "replace", "unlink"} <= set(operations)
    assert error is Killed or all("no space left" in message.lower() for message in messages)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "accumulate": 1}, {"ema_decay": 0}])
def test_a_run_stopped_after_any_step_goes_on_there(
    settings: dict[str, Any], tmp_path: Path, whole: dict[str, Path]
) -> None:
    reference = whole_run(whole, **settings)
    for stop_at in ((0, 0), (0, 3), (1, 2), (1, 4), (2, 4)):
        trained: list[tuple[int, int]] = []

        def send(epoch: int, index: int, trained: list[Any] = trained, stop_at: tuple[int, int] = stop_at) -> None:
            trained.append((epoch, index))
            if (epoch, index) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        folder = tmp_path / f"{stop_at}"
        with pytest.raises(Stopped) as stopped:
            go_on(folder, Batches(send), **settings)
        assert stopped.value.code == 143
        go_on(folder, Batches(lambda *place, trained=trained: trained.append(place)), **settings)  # type: ignore[misc]
        assert len(trained) == len(set(trained)) == 15  # no batch twice, none left out
        assert_same_runs(folder, reference)


def test_a_run_stopped_while_it_evaluates_goes_on_with_the_evaluation(
    tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = train_module.evaluate_all

    def interrupted(model: Any, validation: Any, accelerator: Any) -> Any:
        if len(validation) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(model, validation, accelerator=accelerator)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate_all", interrupted)
        with pytest.raises(Stopped, match="stopped by Ctrl-C"):
            go_on(tmp_path / "run")
    progress = read_state(RunFolder(tmp_path / "run").state).progress
    assert (progress.epoch, progress.batch, progress.best_epoch) == (1, 5, 0)
    trained: list[int] = []
    go_on(tmp_path / "run", Batches(lambda epoch, index: trained.append(epoch)))
    assert trained == [2] * 5
    assert_same_runs(tmp_path / "run", whole_run(whole))


def test_a_run_stopped_while_it_saves_the_best_weights_saves_them_later(
    tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights = checkpoint.save_weights

    def interrupted(model: Any, path: Path, extra: dict[str, Any]) -> None:
        if extra["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save_weights(model, path, extra)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", interrupted)
        with pytest.raises(Stopped):
            go_on(tmp_path / "run")
    go_on(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole_run(whole))


def test_a_signal_while_the_epoch_is_saved_waits_for_it(
    tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot(records: list[Any], path: Path) -> None:
        write_text(path, f"{len(records)} epochs")
        if len(records) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "plot_run", plot)
    with pytest.raises(Stopped):
        go_on(tmp_path / "run")
    progress = read_state(RunFolder(tmp_path / "run").state).progress
    assert (progress.epoch, progress.batch) == (2, 0)
    monkeypatch.setattr(checkpoint, "plot_run", lambda records, path: write_text(path, f"{len(records)} epochs"))
    go_on(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole_run(whole))


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    after: list[int] = []

    def send(epoch: int, index: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it; one is enough
        os.kill(os.getpid(), signal.SIGINT)
        after.append(index)

    with pytest.raises(Stopped, match="stopped by Ctrl-C"):
        go_on(tmp_path / "run", Batches(send))
    assert after == []
    assert not RunFolder(tmp_path / "run").state.exists()
    assert "stopping after this step, to save the state; Ctrl-C again stops at once" in capfd.readouterr().err


def test_signals_that_the_caller_ignores_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        go_on(tmp_path / "run", Batches(lambda epoch, index: os.kill(os.getpid(), signal.SIGTERM)))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(RunFolder(tmp_path / "run").records()) == 3


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

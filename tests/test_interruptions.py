"""Runs that are killed, stopped or out of disk space at every moment, on a model that trains in milliseconds.

What is compared is a whole run with one that was broken off and resumed: its state, its best weights, its records.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvision.engine import checkpoint, stopping
from mvision.engine import train as train_module
from mvision.engine.state import read_state
from mvision.errors import Stopped, UserError
from mvision.storage.atomic import write_text
from mvision.storage.run_folder import BEST, RunFolder
from tests.stand_in_runs import (
    SCORES,
    Batches,
    Killed,
    assert_same_runs,
    break_off,
    go_on,
    stand_ins,  # noqa: F401 - a fixture
    whole_run,
    whole_runs,  # noqa: F401 - a fixture
)


def test_the_stand_ins_train(whole: dict[str, Path]) -> None:
    folder = whole_run(whole)
    assert [record["metrics"]["detection"]["AP"] for record in RunFolder(folder).records()] == SCORES
    average, best = load_file(RunFolder(folder).state), load_file(folder / BEST)
    assert not torch.equal(average["average.wide.weight"], best["wide.weight"])  # the second epoch's, not the third's
    assert read_state(RunFolder(folder).state).progress.best_epoch == 1


def test_curves_that_take_longer_than_epochs_are_drawn_at_the_start_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def plot(records: list[Any], path: Path) -> None:
        drawn.append(len(records))
        time.sleep(0.05)

    monkeypatch.setattr(checkpoint, "plot_run", plot)
    monkeypatch.setattr(checkpoint, "DRAWING", 0.001)
    go_on(tmp_path / "run")
    assert drawn == [1, 3]


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "muon", "accumulate": 1},
        {"ema_decay": 0},
        {"schedule": "flat_cosine", "flat": 0.5, "final_lr": 0.3},  # flat up to step 4 of 9, falling up to step 6
    ],
    ids=str,
)
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


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 4), (2, 0)], ids=str)
def test_a_signal_while_a_batch_is_loaded_does_not_wait_for_it(
    place: tuple[int, int], tmp_path: Path, whole: dict[str, Path]
) -> None:
    """A disk that does not answer keeps a run from stopping no longer: it is saved as it was before that batch."""

    def hang(epoch: int, index: int) -> None:
        if (epoch, index) == place:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("waited for the batch")

    with pytest.raises(Stopped) as stopped:
        go_on(tmp_path / "run", Batches(wait=hang))
    assert stopped.value.code == 143
    progress = read_state(RunFolder(tmp_path / "run").state).progress
    assert (progress.epoch, progress.batch) == place
    go_on(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole_run(whole))


def test_a_signal_while_a_batch_of_a_group_is_loaded_waits_for_the_group(
    tmp_path: Path, whole: dict[str, Path]
) -> None:
    """The gradients of its first batch would be lost."""

    def send(epoch: int, index: int) -> None:
        if (epoch, index) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        go_on(tmp_path / "run", Batches(wait=send))
    progress = read_state(RunFolder(tmp_path / "run").state).progress
    assert (progress.epoch, progress.batch) == (1, 2)
    go_on(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole_run(whole))


@pytest.mark.parametrize(("later", "launched"), [(2.5, False), (2.5, True), (0.5, False)])
def test_a_second_sigterm_does_not_wait_but_a_repeated_one_is_the_same(
    later: float, launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    after: list[int] = []
    if launched:
        monkeypatch.setattr(os, "environ", {**os.environ, stopping.LAUNCHED: "0"})

    def send(epoch: int, index: int) -> None:
        now = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(stopping.time, "monotonic", lambda: now + later)
            os.kill(os.getpid(), signal.SIGTERM)
        after.append(index)

    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        go_on(tmp_path / "run", Batches(send), accumulate=1)
    assert after == ([] if later > stopping.REPEATED else [0])
    assert RunFolder(tmp_path / "run").state.exists() == (later < stopping.REPEATED)
    assert "stopping after this step, to save the state; SIGTERM again stops at once" in capfd.readouterr().err


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


@pytest.mark.parametrize("taken", [0, 1])
def test_a_progress_bar_ends_before_a_stop_is_told(taken: int) -> None:
    """The signal comes between two waits or before the first, so the error does not end the bar by passing through."""
    happened: list[str] = []

    class Bar:
        def __iter__(self) -> Iterator[int]:
            return iter(range(2))

        def close(self) -> None:
            happened.append("the bar ends")

    stop = stopping.StopRequest()
    items = stop.waiting(Bar(), lambda: True, lambda: happened.append("saved"))
    for _ in range(taken):
        next(items)
    stop.number = signal.SIGTERM
    with pytest.raises(Stopped):
        next(items)
    assert happened == ["the bar ends", "saved"]

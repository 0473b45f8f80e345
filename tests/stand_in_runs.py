"""Training runs of a model that trains in milliseconds, broken off at any operation on files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
from mvision.engine.auto import decided
from mvision.engine.checkpoint import start
from mvision.engine.optim import Ema, build_optimizer
from mvision.engine.state import read_state, run_facts
from mvision.engine.train import _train_epochs
from mvision.engine.trainer import Trainer
from mvision.storage import atomic
from mvision.storage.atomic import write_text
from mvision.storage.run_folder import BEST, RunFolder

SCORES = [0.2, 0.6, 0.4]
"""Of the three epochs: the second is the best one."""


class Noisy(nn.Module):
    """A matrix for Muon and one too small for it, a filter in channels_last memory, a norm, noise in every step."""

    backbone = SimpleNamespace(without_decay=list)  # no parameter is named that gets no weight decay

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.last = nn.Linear(3, 20), nn.BatchNorm1d(20), nn.Linear(20, 2)
        self.conv = nn.Conv2d(3, 20, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, targets: list[Any]) -> Tensor:
        maps = self.conv(images[:, :, None, None] * torch.linspace(0, 1, 9).reshape(3, 3))
        return self.last(self.norm(self.wide(images) + maps.flatten(1)) + 0.1 * torch.rand(len(images), 20))

    def loss(self, outputs: Tensor, targets: list[Any]) -> dict[str, Tensor]:
        return {"detection/box": outputs.square().mean()}


class Called(Batch):
    """Makes a call when the training step takes it."""

    call: Callable[[], None]

    def to(self, device: torch.device | str) -> Batch:
        self.call()
        return super().to(device)


Call = Callable[[int, int], None]


class Batches:
    """Five batches; ``before`` is called with the epoch and the number of each in its step, ``wait`` while it loads."""

    def __init__(self, before: Call = lambda epoch, index: None, wait: Call = lambda epoch, index: None) -> None:
        self.before, self.wait = before, wait

    def __len__(self) -> int:
        return 5

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, len(self)):
            self.wait(number, index)
            batch = Called(torch.rand(4, 3, generator=torch.Generator().manual_seed(5 * number + index)), [])
            batch.call = partial(self.before, number, index)
            yield batch


def make_trainer(**settings: Any) -> Trainer:
    torch.manual_seed(0)
    given = {
        "optimizer": "adamw",
        "epochs": 3,
        "accumulate": 2,
        "warmup_steps": 2,
        "lr": 0.1,
        "ema_decay": 0.9999,
        "ema_warmup": 3,
    }
    config = decided(parse_config({"train": {"val_interval": 1, **given, **settings}}), 5, "random")
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model = Noisy()
    ema = Ema(model, config.train.ema_decay, config.train.ema_warmup) if config.train.ema_decay else None
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, config.train))  # type: ignore[arg-type]
    return Trainer(config, accelerator, wrapped, optimizer, ema, 9, 3, facts=run_facts(config, [(20, 4)], 5))


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
    monkeypatch.setattr(checkpoint, "DRAWING", math.inf)  # after every epoch, however long it takes
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


@pytest.fixture(name="whole", scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs by optimiser; made by the first test that wants one."""
    return {"folder": tmp_path_factory.mktemp("whole")}


def whole_run(whole: dict[str, Path], **settings: Any) -> Path:
    name = str(settings)
    if name not in whole:
        whole[name] = whole["folder"] / str(len(whole))
        go_on(whole[name], **settings)
    return whole[name]

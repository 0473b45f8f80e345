"""Early stopping that a run decides on itself never comes while the learning rate is near its peak."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mvision.config import DecidedTrain, load_config, parse_config
from mvision.engine.auto import decided
from mvision.engine.checkpoint import has_ended
from mvision.engine.optim import set_learning_rate
from mvision.engine.plan import describe_plan, describe_run
from mvision.engine.trainer import Progress
from tests.small_runs import run_in_process

BATCHES = 10


def settings(images: int = 100, **train: Any) -> DecidedTrain:
    config = parse_config({"train": {"epochs": 60, "val_interval": 1, "optimizer": "adamw", **train}})
    return decided(config, BATCHES, "random", [(160, images)]).train


def epochs_until_stopped(config: DecidedTrain, best_epoch: int) -> int:
    return next(
        epoch
        for epoch in range(best_epoch + 1, config.epochs + 1)
        if has_ended(config, Progress(epoch=epoch, best=0.5, best_epoch=best_epoch))
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "flat_cosine"])
@pytest.mark.parametrize("train", [{}, {"val_interval": 3}, {"warmup_steps": 100}, {"flat": 0.7}, {"epochs": 21}])
def test_a_run_goes_on_until_its_learning_rate_has_fallen(schedule: str, train: dict[str, Any]) -> None:
    config = settings(**{"epochs": 100, **train}, schedule=schedule)
    assert config.patience >= 10
    stop = epochs_until_stopped(config, config.val_interval - 1)  # nothing after the first evaluation is better
    weight = torch.optim.SGD([{"params": [torch.zeros(1)], "peak_lr": 1.0}], lr=1.0)
    total = config.epochs * BATCHES
    last = round(config.epochs * 0.1) * BATCHES
    assert set_learning_rate(weight, config, stop * BATCHES, total, last) < 0.27
    assert stop < config.epochs  # and it does stop


def test_the_number_is_that_of_the_docstring() -> None:
    assert settings(warmup_steps=0).patience == 40
    assert settings(schedule="constant").patience == 15
    assert settings(schedule="constant", epochs=24).patience == 10


@pytest.mark.parametrize(
    ("given", "images"), [({"epochs": 19}, 100), ({"val_interval": 4}, 100), ({}, 2001), ({"warmup_steps": 600}, 100)]
)
def test_some_runs_never_stop_early(given: dict[str, Any], images: int) -> None:
    assert settings(images, **given).patience == 0
    assert settings(images, **given, patience=3).patience == 3  # unless they are told to


def test_the_longest_validation_split_counts_with_the_others() -> None:
    config = parse_config({"train": {"epochs": 60, "val_interval": 1}})
    assert decided(config, BATCHES, "random", [(16, 1500), (16, 500)]).train.patience > 0
    assert decided(config, BATCHES, "random", [(16, 1500), (16, 501)]).train.patience == 0


@pytest.mark.parametrize("task", ["detection", "instance-seg", "keypoints", "semantic-seg"])
def test_short_runs_of_the_smallest_model_never_stop_early(task: str) -> None:
    config = load_config("tiny", tasks=[task])
    assert config.train.patience == "auto"
    assert decided(config, 100, "random", [(1600, 300)]).train.patience == 0


def test_the_plan_says_it() -> None:
    config = parse_config({"train": {"epochs": 60, "val_interval": 1, "warmup_steps": 0}})
    run = decided(config, BATCHES, "random", [(160, 40)])
    line = describe_plan(run, 600, 60)
    assert line.endswith("stops early after 40 of its 60 evaluations without a better one")
    run.train.patience = 0
    assert "stops early" not in describe_plan(run, 600, 60)


def test_a_run_writes_the_number_into_its_config(squares, tmp_path) -> None:
    run = run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["patience"] == 0


@pytest.mark.parametrize("has", [True, False])
def test_the_run_says_that_the_processor_does_not_compute_in_its_precision(
    monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    monkeypatch.setattr("mvision.machine.cpu_has_bf16", lambda: has)
    run = decided(parse_config({"train": {"epochs": 60}}), BATCHES, "random", [(160, 40)])
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", num_processes=1)
    model = SimpleNamespace(parameters=list, tasks=["detection"], categories=[])
    trainer: Any = SimpleNamespace(config=run, bare_model=model, accelerator=accelerator, total_steps=600, last_steps=0)
    source: Any = SimpleNamespace(train=range(160), val=range(40))
    expected = "bf16 on 1 x cpu" if has else "bf16, which this device does not compute in (fp32 is faster), on 1 x cpu"
    assert f", {expected}" in describe_run(trainer, [source])

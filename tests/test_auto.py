"""What a new run decides for itself from its data and its start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mvision.config import Config, DecidedTrain, load_config, parse_config
from mvision.data.loading.samplers import TrainBatches
from mvision.engine.auto import Start, decided, resumed, start_of
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.weights.transfer import HeadStart, Transferred
from tests.conftest import write_squares
from tests.small_runs import fast_config


def settings(batches: int = 10, start: Start = "random", **train: Any) -> DecidedTrain:
    return decided(parse_config({"train": train}), batches, start).train


@pytest.mark.parametrize(
    ("batches", "start", "epochs"),
    [
        (5000, "random", 72),  # a large data set
        (28, "random", 72),  # 2016 steps
        (20, "random", 100),  # 2000 steps
        (2, "random", 1000),
        (1, "random", 1440),  # twenty times 72
        (5000, "model", 36),
        (20, "model", 50),
        (20, "backbone", 100),
    ],
)
def test_small_data_sets_have_more_epochs(batches: int, start: Start, epochs: int) -> None:
    assert settings(batches, start).epochs == epochs
    assert settings(batches, start, epochs=3).epochs == 3


def test_accumulated_batches_are_one_step() -> None:
    assert settings(20, accumulate=2).epochs == 200
    assert settings(batch_size=16, accumulate=4).lr == settings(batch_size=64).lr == 2 * settings().lr


def test_the_optimiser_and_what_belongs_to_it_follow_the_start() -> None:
    new, tuned = settings(start="random"), settings(start="model")
    assert (new.optimizer, tuned.optimizer) == ("muon", "adamw")
    assert new.backbone_lr is None
    assert tuned.backbone_lr is not None
    assert tuned.backbone_lr < tuned.lr < new.lr
    assert settings(start="random", optimizer="adamw").lr == tuned.lr
    assert settings(start="backbone").optimizer == "muon"
    assert settings(start="model", optimizer="muon").clip_norm == new.clip_norm


def test_the_learning_rate_follows_the_root_of_the_batch() -> None:
    assert settings(batch_size=4).lr == pytest.approx(settings(batch_size=16).lr / 2)
    assert settings(batch_size=4, base_lr=1e-3).lr == pytest.approx(5e-4)
    assert settings(batch_size=4, lr=1e-3).lr == 1e-3
    assert settings(start="backbone", lr=1e-3).backbone_lr == pytest.approx(1e-4)


@pytest.mark.parametrize("batches", [1, 3, 75, 7000])
@pytest.mark.parametrize("epochs", [1, 12, 300])
def test_times_are_shares_of_the_run(batches: int, epochs: int) -> None:
    found, total = settings(batches, epochs=epochs), batches * epochs
    assert found.warmup_steps <= 0.05 * total + 0.5
    decay = found.ema_decay * (1 - math.exp(-total / found.ema_warmup))  # at the end of the run
    assert 1 / (1 - decay) <= max(1.0, 0.02 * total) + 1e-6
    assert 1 <= found.val_interval <= max(1, epochs / 50)


def test_what_is_given_stays() -> None:
    given = {"epochs": 7, "optimizer": "adamw", "lr": 3e-3, "backbone_lr": None, "weight_decay": 0.5, "beta2": 0.9,
             "warmup_steps": 2, "clip_norm": 0.0, "ema_decay": 0.0, "ema_warmup": 9, "val_interval": 3}  # fmt: skip
    found = settings(start="model", **given)
    assert {name: getattr(found, name) for name in given} == given
    assert given.keys() == DecidedTrain.__annotations__.keys() - {"patience"}


def taken(backbone: float, neck: float, *heads: tuple[int, int]) -> Transferred:
    starts = {str(index): HeadStart(loaded, layers, 0, 1) for index, (loaded, layers) in enumerate(heads)}
    return Transferred("", {"backbone": backbone, "neck": neck}, starts)


@pytest.mark.parametrize(
    ("found", "start", "with_backbone"),
    [
        (None, "random", "backbone"),
        (taken(1, 1, (20, 20)), "model", "model"),
        (taken(1, 0.9, (18, 20)), "model", "model"),
        (taken(1, 1, (15, 20)), "encoder", "encoder"),  # a detector's decoder that is to learn masks
        (taken(1, 1, (20, 20), (0, 20)), "encoder", "encoder"),  # one of two heads is new
        (taken(1, 0.5, (20, 20)), "backbone", "backbone"),
        (taken(0, 1, (20, 20)), "random", "backbone"),  # another backbone than in the weights
    ],
)
def test_the_start_is_what_was_loaded(found: Transferred | None, start: Start, with_backbone: Start) -> None:
    config = load_config("tiny", tasks=["detection"])
    assert start_of(config, found) == start
    config.model.backbone.pretrained = True
    assert start_of(config, found) == with_backbone


AUTO = {"train__epochs": 1, "train__optimizer": "auto", "train__lr": "auto"}


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and a detector's run on it."""
    folder = tmp_path_factory.mktemp("detector")
    data = write_squares(folder / "squares")
    return data, train(fast_config(data, **AUTO), output=folder / "run", device="cpu")


@pytest.mark.parametrize(
    ("tasks", "parts", "optimizer"),
    [
        (["detection"], None, "adamw"),
        (["detection"], ["backbone", "neck"], "muon"),
        (["instance-seg"], None, "muon"),  # the decoder is loaded, what makes masks is new
        (["semantic-seg"], None, "muon"),  # a head of its own, of which the weights have nothing
    ],
)
def test_a_new_head_on_a_trained_encoder_learns_with_muon(
    detector: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tasks: list[str],
    parts: list[str] | None,
    optimizer: str,
) -> None:
    data, source = detector
    config = fast_config(data, **AUTO)
    if tasks != ["detection"]:
        config.model.heads = load_config("tiny", tasks=tasks).model.heads
    capsys.readouterr()
    train(config, output=tmp_path / "run", init=str(source), init_parts=parts, device="cpu")
    assert f"schedule: {optimizer} with" in capsys.readouterr().out


def test_a_run_that_goes_on_decides_nothing() -> None:
    run = decided(Config(), 10, "random")
    assert resumed(run, Path("run")).train == run.train
    with pytest.raises(UserError, match="train.warmup_steps: auto is decided when a run starts, and run goes on"):
        resumed(parse_config({"train": {**run.train.model_dump(), "warmup_steps": "auto"}}), Path("run"))


def test_a_run_writes_and_follows_what_it_decided(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = []
    plan_epochs = TrainBatches.plan_epochs
    monkeypatch.setattr(
        TrainBatches, "plan_epochs", lambda self, *args: planned.append(args[0]) or plan_epochs(self, *args)
    )
    config = fast_config(squares, train__full_epochs=1, train__least_steps=5, train__warmup_steps="auto")
    run = train(config, output=tmp_path / "run", device="cpu")
    batches = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"]
    epochs = math.ceil(5 / batches)
    assert epochs > 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == epochs
    written = load_config(file=run / "config.yaml").train
    assert written.model_dump() == decided(config, batches, "random").train.model_dump()
    assert (written.epochs, written.warmup_steps) == (epochs, round(0.05 * epochs * batches))
    assert planned == [epochs]
    assert f"{epochs * batches} steps, " in capsys.readouterr().out
    assert train(load_config(file=run / "config.yaml"), resume=run, device="cpu") == run  # complete


def test_a_run_from_weights_of_the_backbone_freezes_its_norms(squares: Path, tmp_path: Path) -> None:
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, tmp_path / "own.safetensors")
    for given, frozen in (({"model__backbone__weights": str(tmp_path / "own.safetensors")}, True), ({}, False)):
        run = train(fast_config(squares, train__epochs=1, **given), output=tmp_path / str(frozen), device="cpu")
        assert load_config(file=run / "config.yaml").model.backbone.freeze_norms is frozen
        found = load_file(run / "best.safetensors")
        (mean,) = (value for name, value in found.items() if name.endswith("net.bn1.running_mean"))
        assert torch.equal(mean, weights["bn1.running_mean"]) is frozen

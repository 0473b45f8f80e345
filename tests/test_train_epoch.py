"""The arithmetic of the training loop, on a linear model whose training is written out in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mvision.compat import reset_accelerate
from mvision.config import parse_config
from mvision.data import Batch
from mvision.engine import checkpoint
from mvision.engine.checkpoint import is_out_of_patience, keep_best
from mvision.engine.epoch import train_epoch
from mvision.engine.optim import Ema
from mvision.engine.trainer import Progress, Trainer
from mvision.errors import UserError
from mvision.storage.run_folder import RunFolder

PEAK, WARMUP, FINAL, DECAY, RISE, CLIP = 0.2, 2, 0.1, 0.9, 3, 0.5
SETTINGS = {
    "epochs": 2,
    "accumulate": 2,
    "lr": PEAK,
    "warmup_steps": WARMUP,
    "final_lr": FINAL,
    "clip_norm": CLIP,
    "ema_decay": DECAY,
    "ema_warmup": RISE,
    "task_weights": {"second": 0.5},
}
STEPS = 6  # two epochs of five batches, two of which make a step, and the last one alone


class Line(nn.Module):
    """Two numbers from three; each is the business of one task."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images: Tensor, targets: list[Any]) -> Tensor:
        return self.linear(images)

    def loss(self, outputs: Tensor, targets: list[Any]) -> dict[str, Tensor]:
        error = (outputs - torch.stack([target.values for target in targets])).square().mean(0)
        return {"first/box_0": 0.25 * error[0], "first/box_1": 0.75 * error[0], "second/box_0_dn": error[1]}


class Labels:
    def __init__(self, values: Tensor) -> None:
        self.values = values


class Batches:
    """Five batches, other ones in each epoch; the fourth has much larger errors than the others."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 5

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        for index in range(len(self)):
            images, values = torch.rand(4, 3, generator=generator), torch.rand(4, 2, generator=generator)
            values = values * 10 if index == 3 else values
            if index < start:
                continue
            yield Batch(images * (math.nan if index in self.bad else 1), [Labels(row) for row in values])  # type: ignore


def make_trainer(**settings: Any) -> Trainer:
    torch.manual_seed(0)
    config = parse_config({"train": {**SETTINGS, **settings}})
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model = Line()
    # SGD: a step is as long as its gradient. Adam's would not change if all gradients were twice as large.
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": PEAK, "peak_lr": PEAK}], fused=True)
    ema = Ema(model, config.train.ema_decay, config.train.ema_warmup) if config.train.ema_decay else None
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    return Trainer(config, accelerator, wrapped, optimizer, ema, STEPS)


def plain_training(model: Line) -> tuple[nn.Module, list[float]]:
    """Train the model as the settings ask for, in plain torch; returns its moving average and the gradient norms."""
    average, norms = copy.deepcopy(model), []
    groups = [list(Batches().epoch(epoch))[i : i + 2] for epoch in (0, 1) for i in (0, 2, 4)]
    for step, group in enumerate(groups):
        losses = [model.loss(model(batch.images, []), batch.targets).values() for batch in group]
        gradient = torch.autograd.grad(
            sum(one + two + 0.5 * three for one, two, three in losses) / 2, list(model.parameters())
        )
        norms.append(torch.cat([part.flatten() for part in gradient]).norm().item())
        falling = FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        rate = PEAK * ((step + 1) / (WARMUP + 1) if step < WARMUP else falling)
        decay = DECAY * (1 - math.exp(-(step + 1) / RISE))
        with torch.no_grad():
            for value, mean, part in zip(model.parameters(), average.parameters(), gradient):
                value -= rate * min(1.0, CLIP / norms[-1]) * part
                mean.copy_(decay * mean + (1 - decay) * value)
    return average, norms


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-4, atol=1e-6)


def test_training_equals_the_same_in_plain_torch() -> None:
    """Accumulation, clipping, learning rates, task weights and the moving average, over two epochs."""
    trainer = make_trainer()
    expected = copy.deepcopy(trainer.bare_model)
    average, norms = plain_training(expected)  # type: ignore[arg-type]
    assert min(norms) < 0.8 * CLIP < 2 * CLIP < max(norms)  # some steps are clipped, others are not
    for epoch in (0, 1):
        train_epoch(trainer, Batches(), epoch)  # type: ignore[arg-type]
    assert trainer.progress.step == STEPS
    assert_same_weights(trainer.bare_model, expected)
    assert_same_weights(trainer.eval_model, average)
    assert not torch.allclose(average.linear.weight, expected.linear.weight, rtol=1e-2)


def test_without_average_and_clipping() -> None:
    trainer = make_trainer(ema_decay=0, clip_norm=0, accumulate=5, warmup_steps=0)
    assert trainer.eval_model is trainer.bare_model
    weight = trainer.bare_model.linear.weight.detach().clone()
    losses = [trainer.bare_model.loss(trainer.bare_model(b.images, []), b.targets) for b in Batches().epoch(0)]
    total = sum(loss["first/box_0"] + loss["first/box_1"] + 0.5 * loss["second/box_0_dn"] for loss in losses) / 5
    (gradient,) = torch.autograd.grad(total, [trainer.bare_model.linear.weight])
    assert gradient.norm() > 2 * CLIP
    train_epoch(trainer, Batches(), 0)  # type: ignore[arg-type]
    torch.testing.assert_close(trainer.bare_model.linear.weight.detach(), weight - PEAK * gradient)


def test_the_mean_of_every_term_is_returned_summed_over_layers() -> None:
    trainer = make_trainer(lr=1e-12, accumulate=1)
    for group in trainer.optimizer.param_groups:
        group["peak_lr"] = 0.0
    means = train_epoch(trainer, Batches(), 0)  # type: ignore[arg-type]
    line = trainer.bare_model.linear
    errors = [
        (line(batch.images) - torch.stack([target.values for target in batch.targets])).square().mean(0)  # type: ignore
        for batch in Batches().epoch(0)
    ]
    first, second = torch.stack(errors).mean(0).tolist()
    assert means == pytest.approx({"first/decoder_box": first, "second/dn_box": second}, rel=1e-5)


def test_steps_without_a_finite_gradient_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One now and then is passed over; the run ends when there are many in a row."""
    monkeypatch.setattr("mvision.engine.epoch.MAX_BAD_STEPS", 2)
    trainer = make_trainer(accumulate=1)
    train_epoch(trainer, Batches(bad=(0, 2, 4)), 0)  # type: ignore[arg-type]
    assert trainer.progress.step == 5
    assert F.linear(torch.ones(3), trainer.bare_model.linear.weight).isfinite().all()
    assert capsys.readouterr().out.count("the gradient is not finite") == 3
    with pytest.raises(UserError, match=r"diverged: no finite gradient in 2 steps \(precision no, lr 0.2\)"):
        train_epoch(make_trainer(accumulate=1), Batches(bad=(1, 2)), 0)  # type: ignore[arg-type]


def test_the_best_weights_are_those_of_the_best_mean_over_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task by its primary metric: the AP of boxes, the mIoU of regions. What is saved is the moving average."""
    saved: list[tuple[Any, Path, dict[str, Any]]] = []
    monkeypatch.setattr(checkpoint, "save_weights", lambda model, path, extra: saved.append((model, path, extra)))
    trainer = make_trainer()
    evaluations = [(0.6, 0.1), (0.5, 0.4), (0.45, 0.45), (0.7, 0.1), (0.1, 0.9)]
    for epoch, (boxes, regions) in enumerate(evaluations):
        metrics = {
            "detection": {"AP": boxes, "AP50": 1.0},
            "semantic-seg": {"accuracy": 0.9 - regions, "mIoU": regions},
        }
        keep_best(trainer, RunFolder(tmp_path), metrics, epoch)
    assert [extra["epoch"] for _, _, extra in saved] == [1, 2, 5]  # the third is as good as the second, not better
    assert (trainer.progress.best, trainer.progress.best_epoch) == (0.5, 4)
    assert trainer.ema is not None
    assert all(model is trainer.ema.module for model, _, _ in saved)
    assert {path for _, path, _ in saved} == {tmp_path / "best.safetensors"}
    assert saved[1][2]["metrics"]["semantic-seg"]["mIoU"] == 0.4


@pytest.mark.parametrize(("patience", "stops_at"), [(0, None), (1, 5), (3, 9)])
def test_patience_counts_evaluations(patience: int, stops_at: int | None) -> None:
    """Evaluated after every second epoch, 1, 3, 5, ... counted from 0; the best one is that of epoch 3."""
    config = parse_config({"train": {"val_interval": 2, "patience": patience}}).train
    stops = [epoch for epoch in range(3, 12) if is_out_of_patience(config, Progress(best=0.5, best_epoch=3), epoch)]
    assert (stops[0] if stops else None) == stops_at

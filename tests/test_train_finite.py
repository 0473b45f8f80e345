"""Steps whose gradient is not finite: they change nothing, and nobody waits to learn that they were such."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision.data import Batch
from mvision.engine import epoch as epoch_module
from mvision.engine.epoch import train_epoch
from mvision.engine.optim import Ema, build_optimizer
from mvision.engine.readings import BufferGuard, Readings
from mvision.engine.trainer import Trainer
from mvision.errors import UserError
from tests.stand_in_runs import Batches, make_trainer


class SomeBad(Batches):
    """Batches whose images with these numbers are NaN."""

    def __init__(self, bad: Sequence[int], before: Any = lambda epoch, index: None) -> None:
        super().__init__(before)
        self.bad = bad

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for index, batch in enumerate(super().epoch(number, start), start=start):
            batch.images = batch.images * (torch.nan if index in self.bad else 1)
            yield batch


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, running means, and the optimiser's state."""
    model = trainer.bare_model
    values = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, parameter in model.named_parameters():
        state = trainer.optimizer.state[parameter]
        values |= {f"{key} of {name}": value for key, value in state.items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in values.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_step_without_a_finite_gradient_changes_nothing(
    optimizer: str, bad: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Tensor]] = []
    averages: list[Tensor] = []

    def look(epoch: int, index: int) -> None:
        seen.append(everything(trainer))
        averages.append(trainer.eval_model.wide.weight.detach().clone())  # type: ignore[union-attr]

    trainer = make_trainer(optimizer=optimizer, accumulate=1, ema_decay=0.9, ema_warmup=1)
    train_epoch(trainer, SomeBad([bad], look), 0)  # type: ignore[arg-type]
    before, after, later = seen[bad], seen[bad + 1], seen[bad + 2]
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert {name for name, value in later.items() if torch.equal(value, after[name])} == set()
    weights = before["wide.weight"]
    decay = trainer.ema.get_decay(bad)  # type: ignore[union-attr]
    torch.testing.assert_close(averages[bad + 1], decay * averages[bad] + (1 - decay) * weights)
    assert capsys.readouterr().out == f"step {bad}: the gradient is not finite; step left out\n"
    assert trainer.progress.bad_steps == 0
    assert trainer.progress.step == 5


def test_steps_left_out_are_counted_in_a_row_also_where_they_are_read_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, where the steps of half a second are read together; a pause reads what is left."""
    monkeypatch.setattr(epoch_module, "MAX_BAD_STEPS", 3)
    monkeypatch.setattr(epoch_module, "_interval", lambda device: 1e9)
    trainer = make_trainer(accumulate=1)
    train_epoch(trainer, SomeBad([0, 1, 3, 4]), 0)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 0", "step 1", "step 3", "step 4"]
    assert trainer.progress.bad_steps == 2
    with pytest.raises(UserError, match="no finite gradient in 3 steps"):
        train_epoch(trainer, SomeBad([0]), 1)  # type: ignore[arg-type]


def test_losses_read_late_have_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the last bit, with other terms in some batches: a run that is resumed goes on with the sums."""
    batches = [{"a/box_0": 0.1, "a/box_1": 0.7}, {"a/box_0": 1e8, "b/mask": 0.3}, {"b/mask": 1 / 3, "a/box_0": -1e8}]
    often, rarely = Readings({"a/decoder_box": 0.3}), Readings({"a/decoder_box": 0.3})
    for number, terms in enumerate(batches):
        for readings in (often, rarely):
            readings.add_terms(list(terms), torch.tensor(list(terms.values()), requires_grad=True))
            readings.add_step(number, torch.tensor(float(number == 1)))
        often.read()
    assert rarely.read() == [(0, True), (1, False), (2, True)]
    assert rarely.read() == []
    expected = {"a/decoder_box": 0.3, "b/decoder_mask": 0.0}
    for terms in batches:
        for name, value in terms.items():
            expected[f"{name[0]}/decoder_{name[2:].partition('_')[0]}"] += torch.tensor(value).item()
    assert dict(often.sums) == dict(rarely.sums) == expected


def test_a_network_without_norms_has_nothing_to_guard() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    BufferGuard(network).update(torch.tensor(1.0))
    assert torch.equal(network.weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimiser_step_does_not_wait_for_a_gpu(optimizer: str) -> None:
    trainer = make_trainer(optimizer=optimizer, accumulate=1)
    model = trainer.bare_model.cuda()
    trainer = make_trainer_of(model, trainer)
    guard, readings = BufferGuard(model), Readings({})
    for step in range(4):
        with torch.no_grad():
            before = {name: value.clone() for name, value in model.state_dict().items()}
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if step == 3 else 0.1)
            readings.add_step(step, epoch_module._optimize(trainer, guard))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
        assert bool(changed) == (step < 3)
    assert readings.read() == [(0, True), (1, True), (2, True), (3, False)]


def make_trainer_of(model: nn.Module, trainer: Trainer) -> Trainer:
    """Another trainer for a model that was moved."""
    accelerator = trainer.accelerator
    optimizer = accelerator.prepare(build_optimizer(model, trainer.config.train), device_placement=[True])  # type: ignore
    return Trainer(trainer.config, accelerator, model, optimizer, Ema(model, 0.9, 1), 9)

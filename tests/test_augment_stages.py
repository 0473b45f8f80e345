"""Which epochs of a run have which augmentation, and what its first lines say of it."""

from __future__ import annotations

import pytest

from mvision.config import AugmentConfig, Config
from mvision.data.loading.samplers import TrainBatches
from mvision.engine.plan import describe_plan

SIZE = (48, 64)


def test_augmentation_is_light_at_the_end_of_the_run() -> None:
    batches = TrainBatches(4, 4, SIZE, epochs=10, augment=AugmentConfig(last_epochs=0.2))
    light, mixing = [], []
    for batches.epoch in range(10):
        light.append(next(iter(batches))[0].light)
        mixing.append(next(iter(batches))[0].mixing)
    assert light == [False] * 8 + [True] * 2
    assert mixing == [True] * 8 + [False] * 2


@pytest.mark.parametrize(
    ("epochs", "start", "stop", "expected"),
    [
        (58, 0.069, 0.5, range(4, 29)),  # DEIM-D-FINE-L
        (10, 0.0, 1.0, range(8)),  # never in the last epochs
        (10, 0.9, 1.0, range(0)),
        (10, 0.3, 0.3, range(0)),
        (1, 0.0, 1.0, range(1)),
    ],
)
def test_mosaic_and_mixup_have_their_share_of_the_run(epochs: int, start: float, stop: float, expected: range) -> None:
    augment = AugmentConfig(mosaic=0.5, mixing_start=start, mixing_stop=stop, last_epochs=0.2)
    batches = TrainBatches(4, 4, SIZE, epochs=epochs, augment=augment)
    mixed = []
    for batches.epoch in range(epochs):
        (keys,) = batches
        assert len({key.mixing for key in keys}) == 1
        if keys[0].mixing:
            mixed.append(batches.epoch)
    assert mixed == list(expected)


def test_shares_of_the_run_are_in_order() -> None:
    AugmentConfig(mixing_start=0.5, mixing_stop=0.5)
    with pytest.raises(ValueError, match=r"mixing_start 0\.6 is after mixing_stop 0\.5"):
        AugmentConfig(mixing_start=0.6, mixing_stop=0.5)


@pytest.mark.parametrize(
    ("augment", "train", "expected"),
    [
        ({}, {}, "900 steps, warm-up to step 100, cosine to 0.01 of the peak"),
        ({}, {"warmup_steps": 900}, "900 steps, all of them warm-up (train.warmup_steps 900)"),
        ({}, {"schedule": "constant"}, "900 steps, warm-up to step 100, then constant"),
        ({}, {"schedule": "linear", "final_lr": 0}, "900 steps, warm-up to step 100, linear to 0 of the peak"),
        (
            {"mosaic": 0.5, "mixup": 0.5, "mixing_start": 0.1, "mixing_stop": 0.5},
            {"schedule": "flat_cosine", "final_lr": 0.5},
            "900 steps, warm-up to step 100, constant to step 450, cosine to 0.5 of the peak at step 810; "
            "mosaic and mixup in epochs 2 to 5 of 10",
        ),
        ({"mosaic": 0.1}, {"flat": 0.05, "schedule": "flat_cosine"}, "at step 810; mosaic in epochs 1 to 9 of 10"),
        ({"mixup": 0.1, "mixing_stop": 0.01}, {}, "of the peak; mixup in none of 10 epochs"),
    ],
)
def test_a_run_says_what_it_will_do_when(augment: dict[str, float], train: dict[str, object], expected: str) -> None:
    settings = {"data": {"augment": augment}, "train": {"epochs": 10, "warmup_steps": 100, **train}}
    line = describe_plan(Config.model_validate(settings), 900, 90)
    assert line.startswith("schedule: 900 steps, ")
    assert line.endswith(expected)

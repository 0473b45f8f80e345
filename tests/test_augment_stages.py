"""Which epochs of a run have which augmentation, and what its first lines say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mvision.config import AugmentConfig, Config
from mvision.data import CocoSplit, Dataset, SampleKey, find_layout, read_data_sources
from mvision.data.loading.compare import objects_of_mixed
from mvision.data.loading.samplers import TrainBatches
from mvision.engine.auto import decided
from mvision.engine.checks import warn_of_crowded_pictures
from mvision.engine.optim import falling_part
from mvision.engine.plan import describe_plan
from tests.coco_files import annotation, coco, write_set

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
        ({}, {"warmup_steps": 0}, "900 steps, no warm-up, cosine to 0.01 of the peak"),
    ],
)
def test_a_run_says_what_it_will_do_when(augment: dict[str, float], train: dict[str, object], expected: str) -> None:
    settings = {"data": {"augment": augment}, "train": {"epochs": 10, "warmup_steps": 100, **train}}
    line = describe_plan(decided(Config.model_validate(settings), 90, "random"), 900, 90)
    assert line.startswith(
        "schedule: muon with a learning rate of 0.008; weights averaged over about 18 steps; 900 steps, "
    )
    assert line.endswith(expected)


def crowded(folder: Path) -> Path:
    """Twelve images of 48 x 64 pixels, image n with n - 1 small objects all over it."""
    rng = np.random.default_rng(0)
    entries = []
    for image in range(1, 13):
        for x, y in rng.uniform((0, 0), (60, 44), size=(image - 1, 2)).round().tolist():
            entries.append(annotation(image, [x, y, 4, 4]))
    for split in ("train", "val"):
        write_set(folder, coco(entries, images=12), split)
    return folder


@pytest.mark.parametrize(
    "mixed",
    [
        {"mosaic": 1.0},
        {"mosaic": 1.0, "mosaic_form": "whole"},
        {"mixup": 1.0},
        {"mosaic": 0.5, "mixup": 0.5, "mosaic_form": "whole"},
    ],
    ids=str,
)
def test_the_number_of_objects_in_mixed_pictures_is_foreseen(mixed: dict[str, Any], tmp_path: Path) -> None:
    split = CocoSplit(find_layout(crowded(tmp_path)).split("train"))
    augment = AugmentConfig.model_validate({"crop": 0, "zoom_out": 0, "photometric": 0, **mixed})
    dataset = Dataset(split, augment)
    found = [len(dataset[SampleKey(n, n % 12, (96, 128))].targets or ()) for n in range(360)]
    foreseen = objects_of_mixed(split, augment)
    assert np.mean(foreseen) == pytest.approx(np.mean(found), rel=0.12)
    assert np.quantile(foreseen, 0.9) == pytest.approx(np.quantile(found, 0.9), rel=0.12)


def test_more_objects_than_queries_are_foreseen_before_the_first_step(tmp_path: Path) -> None:
    mosaic = {"mosaic": 1.0, "mosaic_form": "whole"}

    def warnings(queries: int, augment: dict[str, Any], **train: int) -> list[str]:
        settings = {
            "model": {"heads": {"detection": {"num_queries": queries}}},
            "data": {"root": str(root), "augment": augment},
            "train": train,
        }
        config, lines = decided(Config.model_validate(settings), 100, "random"), list[str]()
        warn_of_crowded_pictures(config, read_data_sources(config.data, ["detection"], 0, lambda _: None), lines.append)
        return lines

    root = crowded(tmp_path / "cells")
    (line,) = warnings(20, mosaic)
    assert "of the training pictures of cells have more objects than the 20 that detection can find" in line
    assert "about 3" in line  # about a third
    assert "-o model.heads.detection.num_queries=50" in line
    assert warnings(50, mosaic) == warnings(20, {}) == []
    assert warnings(20, {**mosaic, "mixing_stop": 0.1}, epochs=2) == []


def test_the_recipe_of_the_page_is_deims() -> None:
    """DEIM-D-FINE-L: 58 epochs; mosaic and mixup in [4, 29), flat until 29, the last 8 plain and at the lowest rate."""
    text = (Path(__file__).parents[1] / "docs" / "augmentation.md").read_text()
    (block,) = (block for block in text.split("```")[1::2] if "flat_cosine" in block)
    config = Config.model_validate(yaml.safe_load(block.removeprefix("yaml")))
    augment = config.data.augment
    assert augment.mixing(58) == range(4, 29)
    assert augment.count_last(58) == 8
    assert falling_part(decided(config, 100, "random").train, 58 * 100, 8 * 100) == (29 * 100, 50 * 100)
    assert (augment.mosaic, augment.mixup, augment.mosaic_form) == (0.5, 0.5, "whole")

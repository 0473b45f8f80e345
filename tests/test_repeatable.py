"""The same seed is the same training: with any number of workers, with and without cache, whole or resumed."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mvision.config import AugmentConfig, DataConfig, load_config
from mvision.data.augment.geometry import fit, paint
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.labels import WHOLE
from mvision.data.formats.layouts import find_layout
from mvision.data.loading import cache as cache_module
from mvision.data.loading.batch import Batch
from mvision.data.loading.cache import ImageCache
from mvision.data.loading.dataset import Dataset, SampleKey
from mvision.data.loading.loader import Loader, build_eval_loader, build_train_loader
from mvision.engine.epoch import train_epoch
from mvision.engine.train import train
from tests.coco_files import PEOPLE, annotation, coco, picture, write_set
from tests.small_runs import fast_config

SIZE = (64, 96)
OUTLINE = [[20.0, 20.0, 120.0, 30.0, 100.0, 110.0, 24.0, 90.0]]
POINTS = [30, 30, 2, 60, 40, 2, 80, 90, 1]
# Everything that a config can switch on, colours, geometry and distortions of albumentations among it.
EVERYTHING = AugmentConfig.model_validate(
    {
        "photometric": 0.7,
        "zoom_out": 0.4,
        "crop": 0.5,
        "flip": 0.5,
        "vertical_flip": 0.3,
        "mosaic": 0.4,
        "mosaic_form": "whole",
        "mixup": 0.4,
        "copy_paste": 0.5,
        "rotate": 20,
        "scale": 0.3,
        "multi_scale": 0.4,
        "last_epochs": 0.34,
        "extra": [
            {"name": "Rotate", "args": {"limit": 20}},
            {"name": "ElasticTransform", "args": {"p": 0.5}},
            {"name": "GaussianBlur"},
            {"name": "CoarseDropout", "args": {"p": 0.7}},
            {"name": "GaussNoise", "args": {"p": 1.0}},
            {"name": "ImageCompression"},
            {"name": "RandomRain"},
        ],
    }
)


def split_of(root: Path, images: int = 6, size: tuple[int, int] = (144, 192), suffix: str = ".jpg") -> CocoSplit:
    """JPEGs of more than twice the input's size, which a mosaic would decode at a half."""
    entries = [
        annotation(n, [20, 20, 100, 90], 1, segmentation=OUTLINE, keypoints=POINTS)
        for n in range(1, images + 1)
        for _ in range(n % 3)
    ]
    entries.append(annotation(1, [60, 60, 40, 40], 1, iscrowd=1, segmentation=OUTLINE))
    tree = coco(entries, PEOPLE, images, size)
    for entry in tree["images"]:
        entry["file_name"] = entry["file_name"].replace(".png", suffix)
    write_set(root, tree)
    return CocoSplit(find_layout(root).split("train"), ("boxes", "masks", "keypoints"))


def loader_of(split: CocoSplit, workers: int) -> Loader:
    config = DataConfig(augment=EVERYTHING, workers=workers)
    return build_train_loader(split, config, batch_size=3, image_size=SIZE, seed=5, epochs=3)


def assert_same(first: Batch, second: Batch) -> None:
    """Every pixel, every label, every file that was replaced."""
    assert torch.equal(first.images, second.images)
    assert first.skipped == second.skipped
    for one, other in zip(first.targets, second.targets, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, field.name


def test_samples_are_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    """Three epochs of everything, one file damaged: the first fills the cache, the others read it."""
    split = split_of(tmp_path)
    (tmp_path / "images" / "4.jpg").write_bytes(b"damaged")
    loaders = [loader_of(split, workers) for workers in (0, 1, 2)]
    torch.set_num_threads(2)  # workers have one
    cv2.setNumThreads(2)
    try:
        for epoch in range(3):
            for alone, *others in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
                for other in others:
                    assert_same(alone, other)
    finally:
        torch.set_num_threads(1)
        for loader in loaders:
            loader.close()


def test_samples_are_the_same_whatever_was_made_before(tmp_path: Path) -> None:
    """An epoch of its own, as a resumed run makes it, and one after two others and after other random numbers."""
    split = split_of(tmp_path)
    through, alone = loader_of(split, 0), loader_of(split, 0)
    for epoch in range(2):
        for _ in through.epoch(epoch):
            np.random.rand()
            random.random()
            torch.rand(1)
            cv2.setRNGSeed(epoch)
    for first, second in zip(through.epoch(2), alone.epoch(2), strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_that_goes_on_in_its_middle_has_the_same_batches(tmp_path: Path, workers: int) -> None:
    split = split_of(tmp_path)
    whole, rest = loader_of(split, 0), loader_of(split, workers)
    try:
        (first,) = rest.epoch(1, start=1)
        assert_same(list(whole.epoch(1))[1], first)
        assert len(list(rest.epoch(2))) == 2  # the next epoch is whole
    finally:
        rest.close()


def test_samples_are_the_same_without_memory_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of(tmp_path)
    cached = loader_of(split, 0)
    assert isinstance(cached.dataset, Dataset)
    assert cached.dataset.cache is not None
    monkeypatch.setattr(cache_module, "_budget", lambda: 0)
    plain = loader_of(split, 0)
    assert isinstance(plain.dataset, Dataset)
    assert plain.dataset.cache is None
    for epoch in range(2):
        for first, second in zip(cached.epoch(epoch), plain.epoch(epoch), strict=True):
            assert_same(first, second)


def test_large_data_sets_are_decoded_as_small_as_a_sample_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too large for any cache is reduced, however much memory there is: by the size of the set alone."""
    monkeypatch.setattr(cache_module, "SMALL", 1000)
    monkeypatch.setattr(cache_module, "ORDINARY", 1000)
    dataset = loader_of(split_of(tmp_path), 0).dataset
    assert isinstance(dataset, Dataset)
    assert dataset.image(0, at_least=SIZE).shape == (72, 96, 3)
    assert dataset.image(0).shape == (144, 192, 3)


def test_a_sample_never_changes_the_cached_image(tmp_path: Path) -> None:
    """A picture of the input's own size is not resampled, and the transforms after that may work in place."""
    split = split_of(tmp_path, images=1, size=SIZE)
    cache = ImageCache(split.records)
    dataset = Dataset(split, AugmentConfig(photometric=0, crop=0, flip=0, zoom_out=0), cache=cache)
    original = dataset.image(0).copy()
    sample = dataset[SampleKey(0, 0, SIZE)]
    assert sample.image is not None
    assert np.array_equal(sample.image, original)
    sample.image[:] = 0
    assert np.array_equal(dataset.image(0), original)
    image = picture(8, 8)
    placement = fit(WHOLE, (8, 8), (0, 0, 8, 8), (8, 8))
    assert placement is not None
    assert not np.shares_memory(paint(image, placement, np.zeros_like(image)), image)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(tmp_path: Path, workers: int) -> None:
    """The model draws its noise from them: a number more or less in an epoch is another training."""
    split = split_of(tmp_path)
    evaluated = build_eval_loader(split, DataConfig(workers=workers), batch_size=3, image_size=SIZE)
    trained = loader_of(split, workers)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    for loader in (trained, evaluated, trained):
        assert list(loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]
    trained.close()
    evaluated.close()


def records_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def settings(workers: int) -> dict[str, Any]:
    shares = {"mixing_start": 0.3, "mixing_stop": 0.6}  # the second epoch
    augment = EVERYTHING.model_dump() | shares | {"multi_scale": 0.0, "extra": [{"name": "GaussNoise"}]}
    return {"train__epochs": 3, "data__workers": workers, "data__augment": augment}


def assert_same_runs(first: Path, second: Path) -> None:
    assert records_of(first) == records_of(second)
    for name in ("best.safetensors", "last/state.safetensors"):
        weights, others = load_file(first / name), load_file(second / name)
        assert weights.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in weights.items()), name


def test_runs_are_the_same_with_any_number_of_workers_and_when_resumed(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(fast_config(squares, **settings(0)), output=tmp_path / "whole", device="cpu")
    others = [train(fast_config(squares, **settings(2)), output=tmp_path / "two", device="cpu")]

    class Stop(Exception):
        pass

    def stop_in_the_third_epoch(trainer: Any, loader: Any, epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise Stop
        return train_epoch(trainer, loader, epoch)

    with monkeypatch.context() as patch:
        patch.setattr("mvision.engine.train.train_epoch", stop_in_the_third_epoch)
        with pytest.raises(Stop):
            train(fast_config(squares, **settings(1)), output=tmp_path / "stopped", device="cpu")
    torch.manual_seed(12345)
    config = load_config(file=tmp_path / "stopped" / "config.yaml")
    others.append(train(config, resume=tmp_path / "stopped", device="cpu"))
    for run in others:
        assert_same_runs(whole, run)

"""Weights of classes in the losses, and images with rare classes that are shown more often."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvision.config import load_config
from mvision.data.loading.draws import draw, number_drawn
from mvision.data.loading.repeats import images_with_classes, repeat_factors
from mvision.data.loading.samplers import TrainBatches
from mvision.engine.epoch import train_epoch
from mvision.engine.imbalance import class_weights
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.heads.query.losses import quality_focal
from mvision.heads.semantic import IGNORED, focal_and_dice
from mvision.storage.run_folder import RunFolder
from mvision.weights import load
from tests.conftest import write_squares
from tests.small_runs import run_in_process
from tests.test_heads import CATEGORIES, SMALL, STRIDES, make_features, make_targets

POSES = {"kind": "query", "embed_dim": 32, "num_queries": 12, "num_layers": 2, "num_heads": 4, "ffn_dim": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "detection": ("detection", {**SMALL["detection"], "dense_weight": 1.0, "num_denoising": 6}),
    "matchability": ("detection", {**SMALL["detection"], "class_loss": "mal"}),
    "masks": ("instance-seg", SMALL["instance-seg"]),
    "dense keypoints": ("keypoints", SMALL["keypoints"]),
    "query poses": ("keypoints", POSES),
}


class TestWeights:
    def test_balanced(self) -> None:
        counts = np.array([100.0, 0, 20, 5])
        weights = class_weights(counts, [None] * 4)
        assert weights[1] == 1
        # All classes together have as much weight as each other, and the mean over the 125 objects is 1.
        assert (weights * counts)[[0, 2, 3]] == pytest.approx([125 / 3] * 3)
        assert (weights * counts).sum() == pytest.approx(counts.sum())

    def test_given(self) -> None:
        weights = class_weights(np.array([30.0, 10]), [1.0, 4.0])
        assert weights[1] / weights[0] == pytest.approx(4)
        assert weights @ [30, 10] == pytest.approx(40)

    @pytest.mark.parametrize("kind", ["vfl", "mal"])
    def test_of_positives_alone(self, kind: Any) -> None:
        logits, index = torch.tensor([[0.3, -0.2], [0.1, 0.4]]), (torch.tensor([0]), torch.tensor([1]))
        settings = torch.tensor([0.6]), kind, 0.75, 2.0
        plain = quality_focal(logits, index, *settings)
        weighted = quality_focal(logits, index, *settings, class_weights=torch.tensor([5.0, 3.0]))
        assert torch.equal(weighted, plain * torch.tensor([[1.0, 3.0], [1.0, 1.0]]))

    def test_of_pixels(self) -> None:
        """The focal loss is the mean over pixels, each as often as the weight of its class; Dice is not weighted."""
        torch.manual_seed(0)
        logits = torch.randn(1, 3, 1, 4)
        gt = torch.tensor([[[0, 1, 2, IGNORED]]])
        focal, dice = focal_and_dice(logits, gt, torch.tensor([2.0, 5.0]))
        of_pixels = [focal_and_dice(logits[..., [x]], gt[..., [x]])[0] for x in range(3)]
        assert focal == pytest.approx(float((of_pixels[0] + 2 * of_pixels[1] + 5 * of_pixels[2]) / 8))
        assert dice == focal_and_dice(logits, gt)[1]


@pytest.mark.parametrize("kind", KINDS)
class TestHeads:
    @pytest.fixture
    def terms(self, kind: str) -> Any:
        """The loss terms with some weights, of outputs and random numbers that stay the same."""
        torch.manual_seed(0)
        task, settings = KINDS[kind]
        cls = head_class(task, settings)
        head = cls(cls.Config(**settings), [32, 32, 32] if kind == "query poses" else [16] * 3, STRIDES, CATEGORIES)
        assert cls.weighs_classes
        targets = make_targets(4, 3)
        features = make_features()
        if kind == "query poses":
            features = [torch.cat((x, -x), 1) for x in features]
        outputs = head(features, targets=targets)

        def terms(*weights: float) -> dict[str, Tensor]:
            head.class_weights = torch.tensor(weights) if weights else None
            torch.manual_seed(1)
            return {name: value.detach() for name, value in head.loss(outputs, targets).items()}

        return terms

    def test_equal_weights_change_nothing(self, terms: Any) -> None:
        plain, weighted = terms(), terms(1.0, 1.0, 1.0)
        assert all(torch.equal(plain[name], weighted[name]) for name in plain)

    def test_the_class_terms_grow_with_the_weights_of_each_class(self, terms: Any, kind: str) -> None:
        plain, every = terms(), terms(3.0, 3.0, 3.0)
        each = [terms(*(3.0 if place == index else 1.0 for place in range(3))) for index in range(3)]
        for name, value in plain.items():
            growth = [float(one[name] - value) for one in each]
            assert sum(growth) == pytest.approx(float(every[name] - value), rel=1e-3, abs=1e-5)
            if not name.startswith("class"):
                assert growth == [0, 0, 0]
                continue
            # Of the three classes the second one has no keypoints; other objects of it train one set of layers alone.
            learned = [0, 2] if kind == "query poses" or name == "class_one2one" else [0, 1, 2]
            assert [index for index in range(3) if growth[index] > 0] == learned


def source(images: list[list[int]], weight: float = 1.0, crowd: tuple[int, ...] = (), classes: int = 3) -> Any:
    """A data set by the classes of its images' objects; ``crowd``: objects that are crowd regions."""
    labels = np.array([label for image in images for label in image], dtype=np.int64)
    split = SimpleNamespace(
        labels=SimpleNamespace(labels=labels, crowd=np.isin(np.arange(len(labels)), crowd)),
        start=np.cumsum([0, *map(len, images)]),
        categories=[SimpleNamespace(name=name) for name in "abc"[:classes]],
    )
    return SimpleNamespace(train=Sized(split, len(images)), weight=weight)


class Sized:
    """A split with a length, which ``SimpleNamespace`` cannot have."""

    def __init__(self, split: SimpleNamespace, length: int) -> None:
        self.__dict__.update(vars(split))
        self.length = length

    def __len__(self) -> int:
        return self.length


class TestRepeats:
    def test_factors_of_the_paper(self) -> None:
        """Class a is in 8 of 10 images, b in 2, c in 1."""
        images = [[0]] * 5 + [[0, 0, 1], [0, 1], [0, 2], [], []]
        found = repeat_factors([source(images)], 0.4, {"a", "b", "c"})
        assert found.factors[0].tolist() == pytest.approx([1] * 5 + [2**0.5] * 2 + [2, 1, 1])
        assert found.of_classes == {"c": (0.1, pytest.approx(2.0)), "b": (0.2, pytest.approx(2**0.5))}
        assert (found.images, found.shown) == (10, int(5 + 2 * 2**0.5 + 2 + 2))

    def test_classes_that_are_not_learned_and_crowds_do_not_count(self) -> None:
        images = [[0], [0], [0], [1], [2]]
        found = repeat_factors([source(images, crowd=(3,))], 0.8, {"a", "b"})
        assert found.factors[0].tolist() == pytest.approx([(0.8 / 0.6) ** 0.5] * 3 + [1, 1])
        assert images_with_classes(source(images, crowd=(3,))).sum(0).tolist() == [3, 0, 1]

    def test_several_data_sets_share_their_classes(self) -> None:
        """Class b is in 2 of the 4 + 2 * 2 images that an epoch shows: rare in one set alone is not rare."""
        found = repeat_factors([source([[0], [0], [0], [0]]), source([[1], [0]], weight=2)], 1.0, {"a", "b"})
        share = 2 / 8
        of_a, of_b = (6 / 8) ** -0.5, share**-0.5
        assert found.factors[0].tolist() == pytest.approx([of_a] * 4)
        assert found.factors[1].tolist() == pytest.approx([2 * of_b, 2 * of_a])

    def test_an_image_is_drawn_as_often_as_its_factor(self) -> None:
        factors = np.random.default_rng(0).uniform(0, 3, 60)
        total = np.zeros(60)
        for epoch in range(300):
            drawn = draw(factors, np.random.default_rng(epoch))
            assert len(drawn) == number_drawn(factors) == int(factors.sum())
            counts = np.bincount(drawn[:, 0], minlength=60)
            assert set(counts - np.floor(factors)) <= {0, 1}
            total += counts
        assert total / 300 == pytest.approx(factors, abs=0.12)
        assert len(np.unique(drawn, axis=0)) == len(drawn)  # every copy has a number of its own

    def test_batches_are_those_of_the_seed_and_the_epoch(self) -> None:
        factors = [np.array([1.0, 2.5, 1.0, 1.2]), np.full(6, 1.5)]

        def batches(seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> list[list[Any]]:
            sampler = TrainBatches(
                [(4, 1.0), (6, 1.5)], 4, (64, 64), seed, rank=rank, world_size=world, factors=factors
            )
            sampler.epoch, sampler.start = epoch, start
            assert len(sampler) == 3  # of 5 + 9 images
            return list(sampler)

        first = batches(0, 0)
        assert first == batches(0, 0)
        assert first != batches(0, 1)
        assert first != batches(1, 0)
        assert batches(0, 0, start=1) == first[1:]
        halves = zip(batches(0, 0, rank=0, world=2), batches(0, 0, rank=1, world=2))
        assert [{key.index for key in [*one, *other]} for one, other in halves] == [
            {key.index for key in batch} for batch in first
        ]
        keys = [(key.index, key.repeat) for batch in first for key in batch]
        assert len(set(keys)) == len(keys) == 12
        assert {index for index, _ in keys} <= set(range(10))
        assert max(repeat for index, repeat in keys if index == 1) >= 1


def rare_squares(root: Path) -> Path:
    """Blue squares in every image, a red one in the last of eight alone."""
    data = write_squares(root, images=8)
    file = data / "annotations" / "train.json"
    content = json.loads(file.read_text())
    blue, red = (category["id"] for category in content["categories"])
    for number, entry in enumerate(content["annotations"]):
        entry["category_id"] = red if number == len(content["annotations"]) - 1 else blue
    file.write_text(json.dumps(content))
    return data


def test_a_run_says_its_weights_and_factors_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rare_squares(tmp_path / "data")
    more = {"train__epochs": 2, "train__class_weights": "balanced", "data__repeat_threshold": 0.5}
    whole = run_in_process(data, tmp_path / "whole", **more)
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("repeat factors: red x 2.00 (in 0.125 of the images); an epoch shows 9") for line in lines
    )
    # The image with the red square is shown twice, so there are 16 blue objects and two red ones.
    assert "class weights of detection: red 4.5, blue 0.562 (the mean over objects is 1)" in lines

    class Stop(Exception):
        pass

    def stop_in_the_second_epoch(trainer: Any, loader: Any, epoch: int) -> Any:
        if epoch == 1:
            raise Stop
        return train_epoch(trainer, loader, epoch)

    with monkeypatch.context() as patch:
        patch.setattr("mvision.engine.train.train_epoch", stop_in_the_second_epoch)
        with pytest.raises(Stop):
            run_in_process(data, tmp_path / "killed", **more)
    resumed = train(load_config(file=tmp_path / "killed" / "config.yaml"), resume=tmp_path / "killed", device="cpu")
    losses = [[record["loss"] for record in RunFolder(run).records()] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    states = [load(run).state_dict() for run in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unknown_class_is_refused(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.class_weights: the data has no class 'rod'; did you mean 'red'"):
        run_in_process(squares, tmp_path / "run", train__class_weights={"rod": 2.0})
    assert not (tmp_path / "run").exists()

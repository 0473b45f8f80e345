"""Several data sets in one run: one list of classes, shares, and labels that are missing on purpose."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mvision import UserError
from mvision.commands.val import validate
from mvision.config import AugmentConfig, DataConfig, load_config
from mvision.data import (
    CocoSplit,
    Dataset,
    SampleKey,
    build_train_loader,
    find_layout,
    read_data_sources,
    read_validation,
)
from mvision.data.loading.samplers import TrainBatches
from mvision.data.loading.sources import merge_categories
from mvision.engine.train import train
from mvision.heads.query.losses import LossSet, set_losses
from mvision.heads.query.matching import Pairs, pad_targets
from mvision.structures import Targets
from mvision.weights import load
from tests.conftest import write_squares
from tests.small_runs import FAST, add_corners
from tests.test_heads import make_features, make_head, make_targets

TASKS = ["detection", "keypoints"]


def rename(root: Path, old: str, new: str, identity: int) -> None:
    """A class of a data set gets another name and id."""
    for file in (root / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        for category in content["categories"]:
            if category["name"] == old:
                for entry in content["annotations"]:
                    if entry["category_id"] == category["id"]:
                        entry["category_id"] = identity
                category |= {"id": identity, "name": new}
        file.write_text(json.dumps(content))


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Classes 2 blue and 5 red, without keypoints."""
    return write_squares(tmp_path / "boxes", images=4)


@pytest.fixture
def poses(tmp_path: Path) -> Path:
    """Classes 2 green and 5 red, with the corners of the squares as keypoints."""
    root = write_squares(tmp_path / "poses", images=6, seed=1)
    add_corners(root)
    rename(root, "blue", "green", 2)
    return root


def data(boxes: Path, poses: Path, **more: object) -> DataConfig:
    first = {"root": str(boxes), "tasks": ["detection"], "workers": 0}
    return DataConfig.model_validate({**first, "more": [{"root": str(poses), **more}]})


def silent(_: str) -> None: ...


def test_classes_of_one_name_are_one_class(boxes: Path, poses: Path) -> None:
    splits = [find_layout(root).split("train") for root in (boxes, poses)]
    merged = merge_categories([CocoSplit(split) for split in splits])
    assert [(c.id, c.name, len(c.keypoints)) for c in merged] == [(2, "blue", 0), (5, "red", 4), (6, "green", 1)]
    read = CocoSplit(splits[1], ("boxes", "keypoints"), merged)
    assert set(read.labels.labels.tolist()) == {1, 2}
    assert read.labelled_classes is not None
    assert read.labelled_classes.tolist() == [False, True, True]
    alone = CocoSplit(splits[1], ("boxes", "keypoints"))
    names = [[alone.categories[label].name for label in alone.labels.labels]]
    assert names == [[merged[label].name for label in read.labels.labels]]
    annotations = read.coco_dict
    assert [c["name"] for c in annotations["categories"]] == ["red", "green"]
    assert {a["category_id"] for a in annotations["annotations"]} == {5, 6}


def test_one_class_with_two_kinds_of_keypoints_is_refused(boxes: Path, poses: Path) -> None:
    add_corners(boxes)
    for file in (boxes / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["keypoints"] = ["a", "b", "c", "d"][: len(category["keypoints"])]
        file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"poses.*train.json: class 'red' has other keypoints .* rename it in one"):
        merge_categories([CocoSplit(find_layout(root).split("train")) for root in (boxes, poses)])


def test_the_tasks_of_a_data_set_count_in_evaluation_too(boxes: Path, poses: Path) -> None:
    _, used = read_validation(data(boxes, poses), None, TASKS)
    assert [(name, tasks, sorted(split.fields)) for name, tasks, split in used] == [
        ("boxes", ["detection"], ["boxes"]),
        ("poses", TASKS, ["boxes", "keypoints"]),
    ]
    _, used = read_validation(data(boxes, poses, tasks=["detection"]), None, ["detection"])
    assert [sorted(split.fields) for _, _, split in used] == [["boxes"], ["boxes"]]
    first, second = read_data_sources(data(boxes, poses, tasks=["detection"]), ["detection"], 0, silent)
    assert [source.tasks for source in (first, second)] == [["detection"], ["detection"]]


def test_every_data_set_is_used_for_its_tasks(boxes: Path, poses: Path) -> None:
    first, second = read_data_sources(data(boxes, poses), TASKS, 0, silent)
    assert (first.name, first.tasks) == ("boxes", ["detection"])
    assert (second.name, second.tasks) == ("poses", TASKS)  # it has boxes as well
    assert read_data_sources(data(boxes, poses, tasks=["keypoints"]), TASKS, 0, silent)[1].tasks == ["keypoints"]
    assert [c.name for c in first.train.categories] == [c.name for c in second.val.categories]


@pytest.mark.parametrize(
    ("tasks", "more", "message"),
    [
        (
            ["detection", "instance-seg"],
            {"tasks": ["detection"]},
            r"no data set .* has labels for instance-seg",
        ),
        (["detection"], {"tasks": ["keypoints"]}, r"poses is used for no task of this model \(detection\)"),
        (["detection"], {"tasks": ["detektion"]}, "unknown task 'detektion'"),
    ],
)
def test_bad_use(boxes: Path, poses: Path, tasks: list[str], more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_data_sources(data(boxes, poses, **more), tasks, 0, silent)


def test_samples_say_what_is_known(boxes: Path, poses: Path) -> None:
    config = data(boxes, poses, tasks=["keypoints"], weight=2.0)
    parts = read_data_sources(config, TASKS, 0, silent)
    loader = build_train_loader(parts, config, batch_size=16, image_size=(64, 64))
    (batch,) = loader.epoch(0)
    assert len(batch) == 16  # 4 + 2 * 6
    by_tasks = Counter(target.tasks for target in batch.targets)
    assert by_tasks == {frozenset({"detection"}): 4, frozenset({"keypoints"}): 12}
    for target, image in zip(batch.targets, batch.images):
        if target.tasks == {"detection"}:
            assert target.labelled_classes.tolist() == [True, True, False]
            assert target.keypoints is None
        else:
            assert target.labelled_classes.tolist() == [False, True, True]
            assert target.keypoints is not None
            assert target.keypoints.shape == (len(target), 4, 3)
            twins = Counter(t.image_id for t in batch.targets if t.tasks == target.tasks)
            assert twins[target.image_id] == 2
            assert image.shape == (3, 64, 64)
    pairs = [key for keys in loader.batches for key in keys if key.index >= 4]
    assert sorted(key.repeat for key in pairs) == [0] * 6 + [1] * 6


@pytest.mark.parametrize("form", ["filled", "whole"])
def test_mosaic_and_mixup_never_join_data_sets(
    boxes: Path, poses: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of a data set without a class, beside one of another that has it, would teach that it is not there."""
    config = data(boxes, poses)
    config.augment = AugmentConfig.model_validate({"mosaic": 0.7, "mixup": 0.7, "mosaic_form": form})
    parts = read_data_sources(config, TASKS, 0, silent)
    dataset = build_train_loader(parts, config, batch_size=10, image_size=(64, 64)).dataset
    shown: list[tuple[Path, int]] = []
    image = Dataset.image

    def record(self: Dataset, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        shown.append((self.folder.parent, self.records[index].id))
        return image(self, index, at_least)

    monkeypatch.setattr(Dataset, "image", record)
    several = 0
    for number, index in enumerate([*range(10)] * 3):
        shown.clear()
        targets = dataset[SampleKey(number, index, (64, 64))].targets
        assert targets is not None
        assert targets.labelled_classes is not None
        root = boxes if index < 4 else poses
        assert {folder for folder, _ in shown} == {root}
        assert targets.tasks == frozenset(TASKS if index >= 4 else ["detection"])
        assert targets.labelled_classes.tolist() == ([False, True, True] if index >= 4 else [True, True, False])
        assert targets.labelled_classes[targets.labels].all()
        several += len({identity for _, identity in shown}) > 1
    assert several > 15


def test_shares() -> None:
    half = TrainBatches([(10, 1.0), (20, 0.5)], 4, (64, 64), seed=1)
    assert len(half) == 5
    chosen = [key.index for keys in half for key in keys]
    assert sum(index >= 10 for index in chosen) == 10
    assert len(set(chosen)) == 20
    alone, first = TrainBatches(30, 4, (64, 64), seed=1), TrainBatches([(10, 1.0), (20, 1.0)], 4, (64, 64), seed=1)
    assert list(alone) == list(first)  # the same images as if it were one data set


def test_unknown_classes_are_no_negatives() -> None:
    logits = torch.zeros(1, 2, 3, 4, requires_grad=True)
    boxes = torch.full((1, 2, 3, 4), 0.5)
    known = torch.tensor([True, False, True, False])
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    target = Targets(box, torch.tensor([2]), torch.tensor([0.25]), labelled_classes=known)
    plain = replace(target, labelled_classes=None)
    zero, one = torch.tensor([0, 0]), torch.tensor([1, 1])
    pairs = Pairs(layer=zero, image=torch.tensor([0, 1]), query=one, object=zero)
    gt = pad_targets([target, plain], torch.device("cpu"))
    set_losses([LossSet(logits, boxes, pairs, gt.total, [""])], gt)["class"].sum().backward()
    assert logits.grad is not None
    moved = logits.grad[0].ne(0)
    assert moved[0].any(0).tolist() == known.tolist()
    assert moved[1].all()


@pytest.mark.parametrize("task", ["detection", "instance-seg", "keypoints", "semantic-seg"])
def test_heads_learn_nothing_where_nothing_is_known(task: str) -> None:
    head = make_head(task)
    targets = [target.only(()) for target in make_targets(3, 1)]
    terms = head.loss(head(make_features(), targets=targets), targets)
    assert torch.stack(list(terms.values())).sum().item() == 0
    torch.stack(list(terms.values())).sum().backward()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]


def test_keypoint_scores_of_unknown_classes_stay() -> None:
    head = make_head("keypoints")
    targets = [replace(t, labelled_classes=torch.tensor([True, True, False])) for t in make_targets(0, 0)]
    targets = [replace(t, keypoints=torch.zeros(0, 3, 3)) for t in targets]
    torch.stack(list(head.loss(head(make_features(), targets=targets), targets).values())).sum().backward()
    assert head.one.score.bias.grad.ne(0).tolist() == [True, False]  # cat and owl
    assert head.many.score.bias.grad.ne(0).tolist() == [True, True, False]


def test_boxes_from_one_and_poses_from_another(boxes: Path, poses: Path, tmp_path: Path) -> None:
    options = {
        **FAST,
        "train.epochs": 1,
        "model.heads.keypoints": {"embed_dim": 16, "pixel_dim": 16, "map_dim": 8},
        "data": data(boxes, poses).model_dump(),
    }
    config = load_config("tiny", tasks=TASKS, overrides=options)
    run = train(config, output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())
    assert {"AP", "AP/blue", "poses/AP", "poses/AP/green"} <= set(figures["detection"])
    assert figures["detection"]["AP/green"] == -1  # not a class of the first data set
    assert "poses/AP" not in figures["keypoints"]
    model = load(run)
    assert [category.name for category in model.categories] == ["blue", "red", "green"]
    assert [category.name for category in model.head("keypoints").classes] == ["red", "green"]
    validate(str(run), output=tmp_path / "val", device="cpu")
    again = json.loads((tmp_path / "val" / "metrics.json").read_text())
    assert again.keys() == figures.keys()
    for task, values in again.items():  # scores of batches of another size differ in the last digits
        assert values == pytest.approx(figures[task], abs=1e-6)
    table = validate(str(run), data=str(poses), tasks=["keypoints"], device="cpu")
    assert "OKS" in table

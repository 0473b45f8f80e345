"""Semantic segmentation: the ground truth made from masks, predicted regions, and mean IoU over pixels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss

from mvision import UserError, create_model, load
from mvision.config import load_config, parse_model_config
from mvision.engine.train import train
from mvision.evaluation.semantic import SemanticMetric
from mvision.heads.semantic import (
    IGNORED,
    UNKNOWN,
    SemanticHead,
    SemanticOutputs,
    class_map,
    class_scores,
    focal_and_dice,
    likeliest_classes,
)
from mvision.structures import Category, Targets
from mvision.structures.boxes import xyxy_to_cxcywh
from mvision.structures.run_lengths import MAX_PIXELS
from mvision.weights import load as load_weights
from tests.test_heads import make_features, make_head

CATEGORIES = [Category(id=3, name="cat"), Category(id=7, name="dog")]


def make_target(*boxes: tuple[float, float, float, float], masked: list[bool] | None = None) -> Targets:
    """Objects of labels 0, 1, ... whose masks fill their boxes, on a grid of 16 x 16."""
    corners = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 16, 16, dtype=torch.uint8)
    for index, (left, top, right, bottom) in enumerate((corners * 16).int().tolist()):
        if masked is None or masked[index]:
            masks[index, top:bottom, left:right] = 1
    return Targets(xyxy_to_cxcywh(corners), torch.arange(len(boxes)), corners.prod(-1), masks=masks)


def test_smaller_objects_lie_on_larger_ones() -> None:
    gt = class_map(make_target((0.25, 0.25, 0.5, 0.5), (0.0, 0.0, 1.0, 1.0)), (8, 8))
    assert gt[3, 3] == 1
    assert gt[6, 6] == 2
    assert (class_map(make_target(), (8, 8)) == 0).all()


def test_the_box_of_an_object_without_mask_is_ignored() -> None:
    target = make_target((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 1.0, 1.0), masked=[False, True])
    gt = class_map(target, (8, 8))
    assert gt[0, 0] == IGNORED
    assert gt[3, 3] == 2  # the mask of another object
    assert gt[0, 7] == 0
    target.masks = None
    assert (class_map(target, (8, 8)) == IGNORED).all()


def test_crowd_regions_are_ignored_and_objects_lie_on_them() -> None:
    crowd = torch.zeros(16, 16, dtype=torch.uint8)
    crowd[8:, :8] = 1
    for target, on_it in ((make_target((0.0, 0.75, 0.25, 1.0)), 1), (make_target(), IGNORED)):
        gt = class_map(replace(target, ignored=crowd), (8, 8))
        assert (gt[:4] == 0).all()
        assert (gt[4:, 4:] == 0).all()
        assert gt[4, 0] == IGNORED
        assert gt[7, 0] == on_it
    assert target.only({"boxes", "masks"}).ignored is target.ignored
    assert replace(target, ignored=crowd).only({"boxes"}).ignored is None


def test_pixels_without_an_object_are_background_only_if_all_classes_are_labelled() -> None:
    target = make_target((0.0, 0.0, 0.5, 0.5))
    for labelled, elsewhere in ((None, 0), ([True, True], 0), ([True, False], UNKNOWN), ([False], IGNORED)):
        target.labelled_classes = None if labelled is None else torch.tensor(labelled)
        gt = class_map(target, (8, 8))
        assert gt[0, 0] == 1
        assert gt[7, 7] == elsewhere
        empty = replace(make_target(), labelled_classes=target.labelled_classes)
        assert (class_map(empty, (8, 8)) == elsewhere).all()


def test_weights_with_retired_settings_still_load() -> None:
    old = {"dropout": 0.1, "focal_weight": 2.0, "dice_weight": 1.0, "gamma": 1.0, "embed_dim": 32}
    heads = parse_model_config({"heads": {"semantic-seg": old}}).heads
    assert heads["semantic-seg"] == SemanticHead.Config(embed_dim=32)
    with pytest.raises(UserError, match=r"model.heads.semantic-seg.gamma: 2.0 is not supported any more"):
        parse_model_config({"heads": {"semantic-seg": {"gamma": 2.0}}})


def test_the_loss_is_focal_and_dice() -> None:
    """On one pixel per class the terms are known: with equal logits every probability is one half."""
    head = make_head("semantic-seg")
    target = make_target((0.0, 0.0, 0.5, 1.0))
    terms = head.loss(SemanticOutputs(torch.zeros(1, 2, 2, 2)), [target])
    assert terms["focal"].item() == pytest.approx(2 * 0.5 * math.log(2))  # weight 2, gamma 1
    assert terms["dice"].item() == pytest.approx(0.5, abs=1e-4)  # 1 - 2 * 1 / (2 + 2)


@pytest.mark.parametrize("labelled", [0.02, 0.7, 1.0])
def test_the_losses_are_those_of_segmentation_models(labelled: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 5, 12, 10)).requires_grad_()
    gt = torch.where(torch.rand(3, 12, 10) < labelled, torch.randint(0, 4, (3, 12, 10)), IGNORED)  # no pixel of class 4
    theirs = FocalLoss("multiclass", gamma=1.0, ignore_index=IGNORED), DiceLoss("multiclass", ignore_index=IGNORED)
    for found, loss in zip(focal_and_dice(logits, gt), theirs):
        expected = loss(logits, gt)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected)))


def test_unknown_pixels_are_one_of_the_classes_that_are_not_labelled() -> None:
    """Their odds are added; with the background alone left over it is the loss of background."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4)
    gt = torch.full((2, 4, 4), UNKNOWN)
    gt[0, 0] = torch.tensor([0, 1, 2, IGNORED])
    all_but_background = torch.tensor([[False, True, True]] * 2)
    torch.testing.assert_close(
        focal_and_dice(logits, gt, excluded=all_but_background)[0],
        focal_and_dice(logits, gt.where(gt != UNKNOWN, torch.tensor(0)))[0],
    )
    one = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]], requires_grad=True)
    focal, dice = focal_and_dice(one, torch.full((1, 1, 1), UNKNOWN), excluded=torch.tensor([[False, True, False]]))
    odds = math.e + math.e**3
    for_others, for_labelled = math.log(1 + 1 / odds), math.log(1 + math.e**2)
    expected = for_others / (1 + odds) + for_labelled * (1 - 1 / (1 + math.e**2))
    assert focal.item() == pytest.approx(expected / 3, rel=1e-5)
    assert dice.item() == 0
    focal.backward()
    grad = one.grad[0, :, 0, 0].tolist()  # type: ignore[index]
    assert grad[0] < 0 < grad[1]
    assert grad[2] < 0


def test_data_sets_with_different_classes_teach_background_together() -> None:
    """Both have the same picture of three stripes; one labels the first, the other the last. Nobody labels the middle
    one as background, and it is nothing else in both."""
    head = make_head("semantic-seg")
    left, right = make_target((0.0, 0.0, 0.25, 1.0)), make_target((0.75, 0.0, 1.0, 1.0))
    right.labels = torch.tensor([1])
    left.labelled_classes, right.labelled_classes = torch.tensor([True, False]), torch.tensor([False, True])
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(head.loss(SemanticOutputs(logits.expand(2, -1, -1, -1)), [left, right]).values())
        loss.backward()
        optimizer.step()
    assert logits.argmax(1)[0, 0].tolist() == [1, 1, 0, 0, 0, 0, 2, 2]


def test_scores_are_means_over_the_pixels_of_a_class() -> None:
    logits = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = -9
    for image, found in zip(logits, class_scores(logits)):
        best, prob = image.argmax(0), image.softmax(0)
        assert list(found) == best.unique().tolist()
        for index, score in found.items():
            assert score == pytest.approx(prob[index][best == index].mean().item(), rel=1e-6)


def test_ignored_pixels_have_no_gradient() -> None:
    head = make_head("semantic-seg")
    logits = torch.randn(1, 4, 8, 8, requires_grad=True)
    target = make_target((0.0, 0.0, 0.5, 0.5), masked=[False])
    torch.stack(list(head.loss(SemanticOutputs(logits), [target]).values())).sum().backward()
    assert logits.grad is not None
    assert logits.grad[..., :4, :4].eq(0).all()
    assert logits.grad[..., 5:, 5:].ne(0).all()


def test_regions_are_the_likeliest_class_of_every_pixel() -> None:
    head = make_head("semantic-seg")
    logits = torch.zeros(1, 4, 8, 8)
    logits[0, 0] = 5
    logits[0, 2, :4] = 9  # dog above, with 0.98
    logits[0, 3, 6:, 6:] = 6  # owl in a corner, with 0.73
    (found,) = head.postprocess({"logits": logits}, [(80, 160)], threshold=0.0)
    assert found.labels.tolist() == [1, 2]
    assert found.scores.tolist() == pytest.approx([0.98178, 0.72842], abs=1e-4)
    masks = np.asarray(found.masks)
    assert not (masks[0] & masks[1]).any()
    assert masks[0, :38].all()
    assert not masks[0, 46:].any()
    assert found.boxes[0].tolist()[:3] == [0, 0, 160]
    assert len(head.postprocess({"logits": logits}, [(80, 160)], threshold=0.9)[0]) == 1
    (equal,) = head.postprocess({"logits": logits}, [(80, 160)], threshold=float(found.scores[1]))
    assert equal.labels.tolist() == [1, 2]  # a score equal to the threshold is kept
    logits[0, 0] = 99
    (nothing,) = head.postprocess({"logits": logits}, [(80, 160)], threshold=0.0)
    assert len(nothing) == 0
    assert nothing.to_coco(1) == []


@pytest.mark.parametrize("tasks", [["semantic-seg"], ["detection", "semantic-seg"]])
def test_no_threshold_and_no_overlap_of_boxes_leaves_a_region_out(tasks: list[str]) -> None:
    model = create_model("tiny", tasks=tasks, num_classes=6, image_size=64).eval()
    picture = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    for options in ({}, {"tile": 80}):
        every, chosen = (
            model.predict(picture, threshold, nms=nms, precision="fp32", **options)[0]
            for threshold, nms in ((0.0, None), ({"*": 1.0, "0": 0.9}, 0.01))
        )
        if len(tasks) > 1:
            assert len(chosen) == 0
            every, chosen = every.regions, chosen.regions
        assert len(every) > 1
        assert every.scores.max() < 0.9  # below the threshold
        assert chosen.labels.tolist() == every.labels.tolist()
        assert chosen.masks.rles == every.masks.rles


def test_class_by_class_is_the_same_as_all_at_once() -> None:
    logits = torch.randn(4, 5, 12, 9, generator=torch.Generator().manual_seed(0))
    logits[3, 2:4] = -1  # neither takes part in this image
    groups, sizes = [[2, 0, 3], [1]], [(100, 77), (30, 40)]
    maps = likeliest_classes(logits, [range(5)] * 3 + [[1, 4]], groups, sizes)
    logits[3, 2:4] = -torch.inf
    for group, size, found in zip(groups, sizes, maps):
        whole = torch.nn.functional.interpolate(logits[group].nan_to_num(neginf=-99), size=size, mode="bilinear")
        assert torch.equal(found, whole.argmax(1).int())


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_regions_of_a_batch_are_those_of_its_images(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setitem(MAX_PIXELS, "cpu", at_once)
    head = make_head("semantic-seg")
    logits = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    logits[2, 0] = 99  # nothing but background
    sizes = [(80, 160), (50, 40), (80, 160), (80, 160), (50, 40)]
    for number, found in enumerate(head.postprocess({"logits": logits}, sizes, threshold=0.4)):
        (alone,) = head.postprocess({"logits": logits[number : number + 1]}, [sizes[number]], threshold=0.4)
        assert found.size == sizes[number]
        assert found.scores.tolist() == alone.scores.tolist()
        assert found.labels.tolist() == alone.labels.tolist()
        assert np.array_equal(found.boxes, alone.boxes)
        assert found.masks.rles == alone.masks.rles
        for box, mask in zip(found.boxes.astype(int).tolist(), found.masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_other_strides_are_refused() -> None:
    with pytest.raises(
        UserError, match="semantic-seg: made for maps of the strides 8, 16 and 32, this model has 16, 32"
    ):
        SemanticHead(SemanticHead.Config(), [16, 16], [16, 32], CATEGORIES)


def test_a_lateral_takes_the_place_of_the_enlarged_map() -> None:
    head = SemanticHead(SemanticHead.Config(embed_dim=32), [16, 16, 16], [8, 16, 32], CATEGORIES, lateral=8)
    outputs = head(make_features(), torch.randn(2, 8, 24, 16))
    assert outputs["logits"].shape == (2, 3, 24, 16)


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(number: int, category: int, left: int, top: int, right: int, bottom: int, **more: object) -> dict:
    box = [left, top, right - left, bottom - top]
    return {
        "id": number, "image_id": 5, "category_id": category, "bbox": box, "iscrowd": 0, "area": box[2] * box[3],
        "segmentation": rectangle(left, top, right, bottom), **more,
    }  # fmt: skip


def test_iou_over_pixels() -> None:
    from mvision.structures.masks import encode_mask

    data = {
        "images": [{"id": 5, "width": 10, "height": 10}],
        "annotations": [
            annotation(1, 3, 0, 0, 10, 4),
            annotation(2, 7, 0, 0, 2, 2),  # on top of the first
            annotation(3, 7, 0, 8, 10, 10, segmentation=[]),  # a box alone: nothing counts there
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    metric = SemanticMetric(data, CATEGORIES)
    cat = np.zeros((10, 10), dtype=bool)
    cat[:5] = True  # one row too many, and where the dog is
    dog = np.zeros((10, 10), dtype=bool)
    dog[9] = True  # in the box alone
    results = [
        {"image_id": 5, "category_id": category, "score": 0.5, "segmentation": encode_mask(mask)}
        for category, mask in ((3, cat), (7, dog))
    ]
    metric.update(results, [5])
    metric.update([], [5])  # seen before
    figures = metric.compute()
    assert figures["IoU/cat"] == pytest.approx(36 / 50)
    assert figures["IoU/dog"] == 0
    assert figures["mIoU"] == pytest.approx(0.36)
    assert figures["accuracy"] == pytest.approx((36 + 30) / 80)
    assert "cat" in metric.table()
    other = SemanticMetric(data, [*CATEGORIES, Category(id=9, name="owl")])
    other.merge(metric.measured)
    assert other.notes == []
    empty = SemanticMetric(data, [*CATEGORIES, Category(id=9, name="owl")])
    empty.update([], [5])
    assert empty.compute()["IoU/owl"] == -1
    assert empty.compute()["mIoU"] == 0


def test_where_results_overlap_the_highest_score_counts_and_crowds_are_ignored() -> None:
    from mvision.structures.masks import encode_mask

    data = {
        "images": [{"id": 5, "width": 10, "height": 10}],
        "annotations": [
            annotation(1, 3, 0, 0, 10, 4),
            annotation(2, 7, 0, 2, 10, 10, iscrowd=1, area=1),  # behind the first
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    everywhere = encode_mask(np.ones((10, 10), dtype=bool))
    for scores, iou in (((0.6, 0.5), 1.0), ((0.5, 0.6), 0.0)):
        metric = SemanticMetric(data, CATEGORIES)
        results = [
            {"image_id": 5, "category_id": category, "score": score, "segmentation": everywhere}
            for category, score in zip((3, 7), scores)
        ]
        metric.update([*results, {**results[0], "category_id": 99, "score": 1.0}], [5])
        assert metric.measured[5].sum(axis=0)[1] == 40  # pixels of the cat, also those in front of the crowd
        assert metric.compute() == {"mIoU": iou, "accuracy": iou, "IoU/cat": iou, "IoU/dog": -1}
        lines = [line.split() for line in metric.table().splitlines() if line]
        assert lines[-2:] == [["cat", f"{iou:.3f}"], ["dog", "-"]]
    with pytest.raises(ValueError, match="image id 6 is not in the annotations"):
        metric.update([], [6])
    assert set(SemanticMetric(data, CATEGORIES).compute().values()) == {-1.0}


def test_train_evaluate_and_predict(squares: Path, tmp_path: Path) -> None:
    options = {
        "train.epochs": 1, "train.batch_size": 2, "train.precision": "fp32", "data.workers": 0,
        "data.root": str(squares), "model.image_size": 64, "model.neck.embed_dim": 32,
    }  # fmt: skip
    config = load_config("tiny", tasks=["semantic-seg"], overrides=options)
    run = train(config, output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())["semantic-seg"]
    assert {"mIoU", "IoU/blue", "IoU/red", "accuracy"} <= set(figures)
    assert (run / "predictions.jpg").is_file()
    (found,) = load(run).predict(str(squares / "images" / "val_0.jpg"), threshold=0.0)
    found.draw(np.zeros((*found.size, 3), np.uint8))


def test_regions_stay_apart_from_objects(squares: Path, tmp_path: Path) -> None:
    options = {
        "train.epochs": 1, "train.batch_size": 2, "train.precision": "fp32", "data.workers": 0,
        "data.root": str(squares), "model.image_size": 64, "model.neck.embed_dim": 32,
        "model.heads.detection": {"embed_dim": 32, "num_queries": 10, "num_layers": 1, "num_heads": 4, "ffn_dim": 32},
    }  # fmt: skip
    config = load_config("tiny", tasks=["detection", "semantic-seg"], overrides=options)
    run = train(config, output=tmp_path / "run", device="cpu")
    assert sorted(json.loads((run / "metrics.json").read_text())) == ["detection", "semantic-seg"]
    model = load_weights(run)
    with torch.no_grad():
        model.head("semantic-seg").classify.bias[1] = 99  # blue everywhere
    (found,) = model.predict(str(squares / "images" / "val_0.jpg"), threshold=0.0)
    assert found.regions is not None
    assert found.regions.labels.tolist() == [0]
    entries = found.to_coco(1)
    assert [entry.get("region", False) for entry in entries] == [False] * len(found) + [True]
    assert found.masks is None
    drawn = found.draw(np.zeros((*found.size, 3), np.uint8))
    assert (drawn.any(-1)).mean() > 0.9


def test_dice_does_not_count_unknown_pixels() -> None:
    """As if they were ignored: which of the classes they have is not known."""
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gt = torch.tensor([0, 1, 2, UNKNOWN] * 4).view(1, 4, 4)
    excluded = torch.tensor([[False, True, False]])
    _, dice = focal_and_dice(logits, gt, excluded=excluded)
    _, without = focal_and_dice(logits, torch.where(gt == UNKNOWN, IGNORED, gt))
    torch.testing.assert_close(dice, without)

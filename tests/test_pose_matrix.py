"""Any numbers of points, classes and objects through both kinds of keypoint heads, from labels to pictures."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mvision.compat import has_packed_convolutions
from mvision.config import parse_model_config
from mvision.deploy.compare import difference
from mvision.drawing import draw_instances
from mvision.evaluation import KeypointMetric
from mvision.fast.packed import PackedLinear
from mvision.fast.prepare import prepare
from mvision.heads.keypoints import KeypointHead
from mvision.heads.keypoints.results import PoseResults
from mvision.heads.poses import QueryPoseHead
from mvision.model import Model
from mvision.structures import Category, Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.oks import COCO_SIGMAS
from mvision.weights import init_from, save_weights
from tests.keypoint_heads import make_categories
from tests.test_heads import make_features, total

SIZE = (96, 64)
MOST = 60
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "embed_dim": 16, "num_instances": MOST, "pixel_dim": 16, "map_dim": 8},
    "query": {"kind": "query", "embed_dim": 16, "num_queries": MOST, "num_layers": 2, "num_heads": 2, "ffn_dim": 32},
}


class Case(NamedTuple):
    """``points``: of each class. ``objects``: of each image. ``visible``: the labels' visibility."""

    points: tuple[int, ...]
    objects: tuple[int, ...] = (2, 1)
    visible: float = 2.0


CASES = {
    "1 point": Case((1,)),
    "17 points": Case((17,)),
    "133 points": Case((133,)),
    "4 and 9 points": Case((4, 9), (3, 2)),
    "60 objects": Case((17,), (MOST, 1)),
    "no object": Case((17,), (0, 0)),
    "no visible point": Case((3,), visible=0.0),
    "beside a class without points": Case((0, 4, 0), (4, 0)),
}


def make_head(kind: str, categories: list[Category]) -> PoseResults:
    torch.manual_seed(0)
    cls: Any = {"dense": KeypointHead, "query": QueryPoseHead}[kind]
    return cls(cls.Config(**KINDS[kind]), [16] * 3, [8, 16, 32], categories)


def make_targets(case: Case) -> list[Targets]:
    """Objects of all classes in turn in rows, the first at the bottom: above it is room for its label."""
    random = torch.Generator().manual_seed(3)
    targets = []
    for count in case.objects:
        number = torch.arange(count)
        labels = number % len(case.points)
        place = torch.stack((number % 8, 7 - number // 8), -1)
        boxes = torch.cat(((place + 0.5) / 8, torch.full((count, 2), 0.1)), -1)
        points = torch.zeros(count, max(case.points), 3)
        points[..., :2] = boxes[:, None, :2] + 0.08 * (torch.rand(*points.shape[:2], 2, generator=random) - 0.5)
        points[..., 2] = case.visible
        points *= (torch.arange(max(case.points)) < torch.tensor(case.points)[labels, None])[..., None]
        points *= points[..., 2:] > 0
        targets.append(Targets(boxes, labels, torch.full((count,), 0.008), keypoints=points, size=SIZE))
    return targets


def as_instances(target: Targets, categories: list[Category]) -> Instances:
    """The labels as a prediction of them, without objects of classes that have no points."""
    assert target.keypoints is not None
    keep = [bool(categories[label].keypoints) for label in target.labels.tolist()]
    height, width = SIZE
    found = Instances(
        boxes=(cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])).numpy(),
        scores=np.linspace(0.9, 0.5, len(target), dtype=np.float32),
        labels=target.labels.numpy(),
        size=SIZE,
        categories=categories,
        keypoints=(target.keypoints * torch.tensor([width, height, 0.5])).numpy(),
    )
    return found.filter(np.array(keep, dtype=bool))


def as_coco(targets: list[Targets], categories: list[Category]) -> dict[str, Any]:
    annotations = []
    for image, target in enumerate(targets):
        assert target.keypoints is not None
        points = target.keypoints * torch.tensor([SIZE[1], SIZE[0], 1])
        for box, label, own in zip(target.boxes, target.labels.tolist(), points):
            x, y, w, h = (box * torch.tensor([SIZE[1], SIZE[0]] * 2)).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": categories[label].id,
                    "bbox": [x - w / 2, y - h / 2, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "keypoints": own[: len(categories[label].keypoints)].flatten().tolist(),
                }
            )
    return {
        "images": [{"id": image, "height": SIZE[0], "width": SIZE[1]} for image in range(len(targets))],
        "categories": [{"id": c.id, "name": c.name, "keypoints": c.keypoints} for c in categories],
        "annotations": annotations,
    }


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_a_prediction(kind: str, case: Case) -> None:
    categories = make_categories(*case.points)
    head, targets = make_head(kind, categories), make_targets(case)
    maps = make_features(2, *SIZE)
    terms = head.loss(head(maps, targets=targets), targets)
    total(terms).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    learned = any(name.startswith("oks") and value > 0 for name, value in terms.items())
    assert learned == (sum(case.objects) > 0 and case.visible > 0)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-4)
    optimizer.step()
    with torch.no_grad():
        outputs = head.eval()(maps)
    for found in head.postprocess(outputs, [SIZE] * 2, threshold=0.0):
        assert len(found) == min(MOST, 126)  # of 12 x 8 + 6 x 4 + 3 x 2 tokens
        assert found.keypoints is not None
        assert found.keypoints.shape == (MOST, max(case.points), 3)
        assert np.isfinite(found.keypoints).all()
        exists = np.arange(max(case.points)) < np.array(case.points)[found.labels][:, None]
        assert exists.any(axis=1).all(), "a class without points"
        assert not found.keypoints[~exists].any()
        assert (found.keypoints[exists][:, 2] > 0).all()
        lengths = [len(entry["keypoints"]) for entry in found.to_coco(1)]
        assert lengths == [3 * case.points[label] for label in found.labels]
        draw_instances(np.zeros((*SIZE, 3), np.uint8), found)


def test_exact_predictions_have_an_ap_of_one(case: Case) -> None:
    categories, targets = make_categories(*case.points), make_targets(case)
    metric = KeypointMetric(as_coco(targets, categories), categories, backend="pycocotools")
    for image, target in enumerate(targets):
        metric.update(as_instances(target, categories).to_coco(image), [image])
    figures = metric.compute()
    nothing = sum(case.objects) == 0 or case.visible == 0
    assert figures["AP"] == pytest.approx(-1 if nothing else 1)
    for category in categories:
        assert figures[f"AP/{category.name}"] == pytest.approx(-1 if nothing or not category.keypoints else 1)
    assert any(f"{MOST} results" in note for note in metric.notes) == (MOST in case.objects)


def test_visible_points_are_drawn_and_no_others(case: Case) -> None:
    categories, target = make_categories(*case.points), make_targets(case)[0]
    found, plain = as_instances(target, categories).resized((960, 640)), np.zeros((960, 640, 3), np.uint8)
    assert found.keypoints is not None
    for index in range(min(3, len(found))):  # one at a time: labels could hide points of others
        one = found.filter(np.array([index]))
        without = replace(one, keypoints=np.zeros_like(found.keypoints[:1]))
        changed = (draw_instances(plain, one) != draw_instances(plain, without)).any(-1)
        points = found.keypoints[index][found.keypoints[index, :, 2] > 0]
        x, y = points[:, :2].round().astype(int).T
        assert changed[y, x].all()
        # Nothing else: neither in the corner, where points are that a class does not have, nor anywhere.
        left, top, right, bottom = one.boxes[0].round().astype(int)
        changed[top - 8 : bottom + 8, left - 8 : right + 8] = False
        assert not changed.any()
    every = draw_instances(plain, found)
    assert every.any() == bool(len(found))


def keypoint_model(kind: str, *categories: Category, **settings: int) -> Model:
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "test_resnet"},
        "neck": {"embed_dim": 16, "num_heads": 2, "ffn_dim": 16, "depth": 1},
        "heads": {"keypoints": {**KINDS[kind], **settings}},
        "categories": [category.model_dump() for category in categories],
        "image_size": [64, 64],
    }
    return Model(parse_model_config(config))


def randomize(model: Model) -> Model:
    """Numbers everywhere: rows that start at zero cannot be told apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_points_of_the_same_name_keep_their_numbers(kind: str, tmp_path: Path) -> None:
    """COCO's 17 points to another skeleton: both points that it has too predict what they predicted before."""
    source = randomize(keypoint_model(kind, Category(id=1, name="person", keypoints=list(COCO_SIGMAS))))
    save_weights(source, tmp_path / "a.safetensors")
    model = keypoint_model(kind, Category(id=1, name="person", keypoints=["tail", "Left wrist", "paw", "nose"]))
    line = init_from(model, tmp_path / "a.safetensors")
    assert "2 of 4 points matched by name (not in these weights: tail, paw)" in line
    assert "in part" not in line
    there, here = source.state_dict(), model.state_dict()
    left_wrist = list(COCO_SIGMAS).index("left_wrist")
    if kind == "dense":
        for name in ("one.points.weight", "one.points.bias", "many.points.weight", "many.points.bias"):
            old, new = there[f"heads.keypoints.{name}"], here[f"heads.keypoints.{name}"]
            assert torch.equal(new[[2, 3, 6, 7]], old[[2 * left_wrist, 2 * left_wrist + 1, 0, 1]]), name
            assert torch.equal(new[[9, 11]], old[[34 + left_wrist, 34]]), name
            torch.testing.assert_close(new[0], old[:34:2].mean(0))
        old, new = (x["heads.keypoints.maps.embed.weight"] for x in (there, here))
        assert torch.equal(new.view(4, 9, -1)[[1, 3]], old.view(17, 9, -1)[[left_wrist, 0]])
    else:
        old, new = (x["heads.keypoints.decoder.point_tokens"] for x in (there, here))
        assert torch.equal(new[[1, 3]], old[[left_wrist, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_points_in_another_order_predict_the_same(kind: str, tmp_path: Path) -> None:
    names = [f"p{index}" for index in range(5)]
    source = randomize(keypoint_model(kind, Category(id=1, name="person", keypoints=names)))
    save_weights(source, tmp_path / "a.safetensors")
    model = keypoint_model(kind, Category(id=1, name="person", keypoints=names[::-1]))
    init_from(model, tmp_path / "a.safetensors")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        before, after = (each.eval()(images)["keypoints"] for each in (source, model))
    for name in ("keypoints", "visibility"):
        torch.testing.assert_close(after[name], before[name].flip(2), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not has_packed_convolutions(), reason="not a build of PyTorch with oneDNN's operators")
@pytest.mark.parametrize("points", [(1,), (4, 33)], ids=str)
def test_poses_from_queries_are_the_same_from_packed_layers(points: tuple[int, ...]) -> None:
    model = keypoint_model("query", *make_categories(*points), embed_dim=64, ffn_dim=64)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in model.head("keypoints").parameters():  # new layers end in zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(images.float())
        ready = prepare(copy.deepcopy(model.eval()))
        found, where = difference(model(images), ready(images))
    assert found < 1e-4, where
    packed = {name for name, module in ready.named_modules() if isinstance(module, PackedLinear)}
    layers = ("memory_proj.0", "memory_points.layers.1", "layers.0.within.q_proj", "layers.1.across.out_proj")
    assert {f"heads.keypoints.decoder.{name}" for name in layers} <= packed
    # ``predict`` makes its own prepared copy.
    pictures = [picture.permute(1, 2, 0).numpy() for picture in images]
    for one, raw in zip(model.predict(pictures, threshold=0.0, precision="fp32"), _results(model, images)):
        np.testing.assert_allclose(one.keypoints, raw.keypoints, atol=1e-2)  # of 64 pixels


def _results(model: Model, images: torch.Tensor) -> list[Instances]:
    head = model.head("keypoints")
    with torch.no_grad():
        outputs = head.best_class_only(model(images)["keypoints"])
    return head.postprocess(outputs, [(64, 64)] * len(images), 0.0)

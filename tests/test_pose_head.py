"""Poses from queries as a head: what every head has to do, and classes with any numbers of points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvision.heads import head_class
from mvision.heads.poses import PoseConfig, QueryPoseHead
from mvision.structures import Category, Targets
from tests import test_heads
from tests.test_keypoints_minimal import conformance_cases

# test_export_forms.py exports it, for any batch too.
CASES = [case for case in conformance_cases() if case[0] is not test_heads.test_export_with_a_free_batch]
SMALL: dict[str, Any] = {"embed_dim": 16, "num_queries": 12, "num_layers": 2, "num_heads": 4, "ffn_dim": 32}
HAND = Category(id=1, name="hand", keypoints=["wrist", "tip", "thumb"])


def make_head(categories: list[Category], **settings: Any) -> QueryPoseHead:
    torch.manual_seed(0)
    config = PoseConfig(**{**SMALL, **settings})
    return QueryPoseHead(config, [16] * 3, test_heads.STRIDES, categories)


@pytest.mark.parametrize(("check", "more"), CASES, ids=[f"{check.__name__}-{more}" for check, more in CASES])
def test_conformance(check: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_heads, "make_head", lambda task: make_head(test_heads.CATEGORIES))
    check("keypoints", **more)


def test_the_kind_chooses_the_class() -> None:
    assert head_class("keypoints", {"kind": "query"}) is QueryPoseHead


def make_target(head: QueryPoseHead, *numbers: int) -> Targets:
    """An image with one object, whose points lie on a circle, for each of these labels."""
    points = torch.zeros(len(numbers), head.num_points, 3)
    for row, label in enumerate(numbers):
        count = len(head.categories[label].keypoints)
        angle = 2 * torch.pi * torch.arange(count) / count + row
        own = points[row, :count]
        own[:] = torch.stack((angle.cos(), angle.sin(), torch.full((count,), 2.0)), -1)
        own[:, :2] = 0.25 + row * 0.4 + 0.12 * own[:, :2]
    place = 0.25 + 0.4 * torch.arange(len(numbers))[:, None]
    boxes = torch.cat((place, place, torch.full((len(numbers), 2), 0.26)), -1)
    labels = torch.tensor(numbers, dtype=torch.int64)
    return Targets(boxes=boxes, labels=labels, areas=boxes[:, 2] * boxes[:, 3], keypoints=points)


def train(head: QueryPoseHead, targets: list[Targets], steps: int) -> list[Tensor]:
    """Returns the maps that it was trained on."""
    maps = test_heads.make_features(len(targets))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        test_heads.total(head.loss(head(maps, targets=targets), targets)).backward()
        optimizer.step()
    return maps


@pytest.mark.parametrize("points", [1, 17, 133])
def test_any_number_of_points(points: int) -> None:
    person = Category(id=1, name="person", keypoints=[f"p{index}" for index in range(points)], sigmas=[0.05] * points)
    head = make_head([person])
    targets = [make_target(head, 0, 0), make_target(head)]
    maps = train(head, targets, 2)
    with torch.no_grad():
        outputs = head.eval()(maps)
    found = head.postprocess(outputs, [(100, 50)] * 2, 0.0)[0]
    assert found.keypoints is not None
    assert found.keypoints.shape == (12, points, 3)
    assert np.isfinite(found.keypoints).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()  # a single point has a box too


def test_two_classes_with_different_points_are_learned() -> None:
    head = make_head([HAND, Category(id=2, name="leaf"), Category(id=3, name="owl", keypoints=["beak"])])
    target = make_target(head, 0, 2)
    maps = train(head, [target], 100)
    with torch.no_grad():
        outputs = head.eval()(maps)
    found = head.postprocess(head.best_class_only(outputs), [(200, 100)], 0.0)[0]
    best = [int(np.flatnonzero(found.labels == label)[0]) for label in (0, 2)]
    assert set(best) == {0, 1}
    assert found.keypoints is not None
    assert target.keypoints is not None
    expected = target.keypoints.numpy() * (100, 200, 1)
    np.testing.assert_allclose(found.keypoints[best][..., :2], expected[..., :2], atol=10)
    assert (found.keypoints[best[1], 1:] == 0).all()  # points that an owl does not have
    assert (found.keypoints[best[0], :, 2] > 0.5).all()


def test_without_a_layer_for_visibility_all_points_are_visible() -> None:
    head = make_head([HAND], visibility=False).eval()
    assert not [name for name in head.state_dict() if ".visible." in name]
    with torch.no_grad():
        found = head.postprocess(head(test_heads.make_features(1)), [(8, 8)], 0.0)[0]
    assert found.keypoints is not None
    assert (found.keypoints[..., 2] == 1).all()


def test_classes_do_not_choose_the_points_of_other_classes_for_their_box() -> None:
    head = make_head([HAND, Category(id=3, name="owl", keypoints=["beak"])]).eval()
    points = torch.tensor([[[[[0.2, 0.3], [0.6, 0.5], [0.4, 0.4]], [[0.2, 0.3], [0.9, 0.9], [0.9, 0.9]]]]])
    logits = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    boxes = head.decoder._boxes(torch.zeros(1, 1, 2, 16), points, logits)
    expected = torch.tensor([[0.4, 0.4, 0.48, 0.24], [0.2, 0.3, 0.02, 0.02]])
    torch.testing.assert_close(boxes[0, 0], expected)


def test_learned_queries_do_not_depend_on_the_image() -> None:
    head = make_head([HAND], learned_queries=True)
    selected = head.decoder._select(torch.randn(1, 24 * 16, 16), [(24, 16)], False)
    tokens, _, _ = head.decoder._start(selected, None, False)
    again = head.decoder._select(torch.randn(1, 24 * 16, 16), [(24, 16)], False)
    torch.testing.assert_close(head.decoder._start(again, None, False)[0], tokens)
    assert head.decoder.query_embed is not None
    torch.testing.assert_close(tokens[0, :, 1], head.decoder.query_embed + head.decoder.point_tokens[0])


def test_fewer_tokens_than_queries() -> None:
    head = make_head([HAND], num_queries=60, learned_queries=True)
    target = make_target(head, 0)
    terms = head.loss(head(test_heads.make_features(1, 32, 32), targets=[target]), [target])
    assert all(value.isfinite() for value in terms.values())
    with torch.no_grad():
        assert head.eval()(test_heads.make_features(1, 32, 32))["logits"].shape == (1, 21, 1)


def test_prediction_is_one_graph() -> None:
    head = make_head([HAND]).eval()
    maps = test_heads.make_features(1)
    with torch.no_grad():
        found = torch.compile(head, fullgraph=True, backend="eager")(maps)
        for name, value in head(maps).items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)

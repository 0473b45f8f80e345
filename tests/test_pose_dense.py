"""Supervision of all tokens in the head for query poses, and scores that are taught a power of the OKS."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvision.heads.poses import PoseConfig
from mvision.heads.poses.losses import dense_terms, pose_terms
from mvision.heads.poses.outputs import DensePoses
from mvision.heads.query.anchors import make_anchors
from mvision.heads.query.matching import anchor_assignment
from tests.pose_labels import LIKE, collect, make_labels, predictions
from tests.test_heads import make_features, total
from tests.test_pose_head import HAND, make_head, make_target

SHAPES = [(8, 12), (4, 6)]
TOKENS = 8 * 12 + 4 * 6
WEIGHTS = {"dense_weight": 0.5, "class_weight": 2.0, "point_weight": 3.0, "oks_weight": 4.0}
CONFIG = PoseConfig(class_loss="mal", gamma=1.5, **WEIGHTS)


def make_dense(images: int, classes: int = 1) -> DensePoses:
    random = torch.Generator().manual_seed(0)
    anchors = make_anchors(SHAPES, LIKE.device, LIKE.dtype)[0][0].sigmoid()
    logits = torch.randn(images, TOKENS, classes, generator=random, dtype=LIKE.dtype)
    points = torch.rand(images, TOKENS, 3, 2, generator=random, dtype=LIKE.dtype)
    return DensePoses(logits.requires_grad_(), points.requires_grad_(), anchors)


def test_terms_are_those_of_a_loop_over_images_and_tokens() -> None:
    labels = [make_labels(2), make_labels(0), make_labels(1, seed=1)]
    labels[0].keypoints[1, 0, 2] = 0
    targets, dense = collect(labels), make_dense(3)
    pairs = anchor_assignment(dense.anchors, targets.boxes, targets.valid)
    owner = {
        (int(image), int(token)): int(gt)
        for image, token, gt, counted in zip(pairs.image, pairs.query, pairs.object, pairs.counted)
        if counted
    }
    assert len(owner) > 12
    expected = dict.fromkeys(("class_dense", "point_dense", "oks_dense"), 0.0)
    for image in range(3):
        for token in range(TOKENS):
            probability = dense.logits[image, token, 0].sigmoid()
            gt = owner.get((image, token))
            if gt is None:
                expected["class_dense"] -= probability**1.5 * (1 - probability).log()
                continue
            expected["class_dense"] -= probability.log()
            points, sigmas = targets.points[image, gt], targets.sigmas[image, gt]
            visible = points[:, 2] > 0
            apart = dense.points[image, token] - points[:, :2]
            expected["point_dense"] += apart[visible].abs().sum()
            squares = (apart * targets.scale[image]).square().sum(-1)
            similar = (-squares / (2 * targets.areas[image, gt] * (2 * sigmas) ** 2)).exp()
            expected["oks_dense"] += 1 - similar[visible].mean()
    terms = dense_terms(dense, targets, CONFIG)
    for name, weight in (("class", 2.0), ("point", 3.0), ("oks", 4.0)):
        torch.testing.assert_close(terms[f"{name}_dense"], 0.5 * weight * expected[f"{name}_dense"] / len(owner))


def test_ignored_regions_have_no_negatives_but_keep_their_positives() -> None:
    targets, dense = collect([make_labels(1)]), make_dense(1)
    everywhere = torch.tensor([[[-1.0, -1.0, 2.0, 2.0]]], dtype=LIKE.dtype)
    pairs = anchor_assignment(dense.anchors, targets.boxes, targets.valid)
    assert pairs.counted is not None
    dense_terms(dense, replace(targets, ignored=everywhere), CONFIG)["class_dense"].backward()
    assert dense.logits.grad is not None
    taught = dense.logits.grad[0, :, 0].nonzero().flatten()
    assert taught.tolist() == sorted(set(pairs.query[pairs.counted].tolist()))


def test_a_batch_without_poses() -> None:
    terms = dense_terms(make_dense(2), collect([make_labels(0), make_labels(0)]), CONFIG)
    assert terms["point_dense"] == terms["oks_dense"] == 0
    assert terms["class_dense"] > 0


def test_selected_tokens_predict_what_they_predict_among_all() -> None:
    head = make_head([HAND], dense_weight=1.0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    targets = [make_target(head, 0), make_target(head)]
    outputs = head(make_features(), targets=targets)
    decoded = outputs.decoded
    assert decoded.dense is not None
    every = decoded.dense.points.flatten(2)
    for image, points in enumerate(decoded.encoder_points.flatten(2)):
        assert (points[:, None] - every[image]).abs().amax(-1).amin(1).max() < 1e-6
    assert {"class_dense", "point_dense", "oks_dense"} <= head.loss(
        head(make_features(), targets=targets), targets
    ).keys()


@pytest.mark.parametrize("settings", [{}, {"dense_weight": 1.0, "queries": "shared"}])
def test_without_it_there_are_no_parameters_for_it(settings: dict) -> None:
    head = make_head([HAND], **settings)
    assert not [name for name in head.state_dict() if "dense" in name]


def test_scores_are_taught_a_power_of_the_oks() -> None:
    targets = collect([make_labels(2), make_labels(1, seed=1)])
    found = predictions(targets)
    plain, lenient = (pose_terms(found, targets, PoseConfig(num_layers=3, quality_power=p)) for p in (1.0, 0.25))
    changed = {name for name, value in plain.items() if not torch.equal(value, lenient[name])}
    assert changed == {name for name in plain if name.startswith("class")}


@pytest.mark.parametrize("objects", [(0, 0), ()])
def test_every_parameter_gets_a_gradient(objects: tuple[int, ...]) -> None:
    """Distributed training needs one, also from a batch without objects."""
    head = make_head([HAND], dense_weight=1.0)
    targets = [make_target(head, *objects), make_target(head)]
    total(head.loss(head(make_features(), targets=targets), targets)).backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []

"""Poses from queries on a GPU: the same losses and results as on the CPU, and no wait but those of the design."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvision import Model
from mvision.config import parse_model_config
from mvision.fast.prepare import prepare
from mvision.heads.poses import QueryPoseHead
from mvision.structures import Category
from tests.test_cuda_graphs_gpu import check_against_eager, with_statistics
from tests.test_heads import make_features, total
from tests.test_joint import CATEGORIES, QUERIES
from tests.test_keypoints_gpu import check_captured, no_wait
from tests.test_pose_head import HAND, SMALL, make_head, make_target

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> QueryPoseHead:
    """Two classes with different numbers of points, and last layers that predict something of their own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head = make_head([HAND, Category(id=2, name="pair", keypoints=["a", "b"])])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return head


def terms_of(head: QueryPoseHead, maps: list[torch.Tensor], targets: Any) -> dict[str, torch.Tensor]:
    """With the same denoising on every device: its random numbers are drawn on the CPU."""
    torch.manual_seed(3)
    return head.loss(head(maps, targets=targets), targets)


def test_a_training_step_gives_the_same_losses_and_waits_for_the_matching_alone(head: QueryPoseHead) -> None:
    targets = [make_target(head, 0, 1), make_target(head), make_target(head, 1)]
    features = make_features(3)
    expected = terms_of(head, features, targets)
    head.cuda()
    moved = [x.cuda() for x in features]
    terms_of(head, moved, targets)  # tables of a new size are made once, and waited for
    torch.cuda.synchronize()
    with no_wait():
        terms = terms_of(head, moved, targets)
        total(terms).backward()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].cpu(), value, rtol=2e-3, atol=2e-4)


def test_a_prediction_is_captured_in_a_graph_and_gives_the_same_results(head: QueryPoseHead) -> None:
    check_captured(head)


@pytest.mark.parametrize("queries", ["own", "shared"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_a_joint_model_by_a_graph(queries: str, precision: Any) -> None:
    check_against_eager(prepare(with_statistics(joint(queries)), precision), [2, 1], precision)


def joint(queries: str) -> Model:
    torch.manual_seed(0)
    heads = {"detection": QUERIES, "keypoints": {**SMALL, "embed_dim": 32, "kind": "query", "queries": queries}}
    return Model(
        parse_model_config({
            "backbone": {"name": "test_resnet"},
            "neck": {"embed_dim": 32, "num_heads": 4, "ffn_dim": 32, "depth": 1},
            "heads": heads,
            "categories": [category.model_dump() for category in CATEGORIES],
            "image_size": [64, 96],
        })
    )  # fmt: skip

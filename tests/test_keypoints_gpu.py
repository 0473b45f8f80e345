"""Keypoint heads on a GPU: the same losses and results as on the CPU, and no wait but those of the design."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from mvision.heads.keypoints import losses as losses_module
from mvision.heads.keypoints.base import BaseKeypointHead
from tests.keypoint_heads import dense_head, make_objects, minimal_head
from tests.test_heads import make_features, total

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HEADS = {"dense": lambda: dense_head(5, 3), "minimal": lambda: minimal_head(5)}


@contextmanager
def no_wait() -> Iterator[None]:
    """PyTorch raises where an operator makes the CPU wait; waiting for an event, as ``start_to_host`` does, is none."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> BaseKeypointHead:
    """With last layers that predict something of their own everywhere."""
    head = HEADS[request.param]()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith(("one.", "many.")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return head


def test_a_training_step_gives_the_same_losses_and_waits_for_the_matching_alone(
    head: BaseKeypointHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # Random numbers differ between devices.
    monkeypatch.setattr(losses_module, "PRIOR_NOISE", 0.0)
    monkeypatch.setattr(losses_module, "WINDOW_NOISE", 0.0)
    targets = [make_objects(head, 3), make_objects(head, 0), make_objects(head, 2)]
    targets[0].keypoints[1, :, 2] = 0
    features = make_features(3)
    expected = head.loss(head(features, targets=targets), targets)
    head.cuda()
    moved = [x.cuda() for x in features]
    head(moved, targets=targets)  # the grid of a new size is made once, and waited for
    torch.cuda.synchronize()
    with no_wait():
        terms = head.loss(head(moved, targets=targets), targets)
        total(terms).backward()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].cpu(), value, rtol=2e-3, atol=2e-4)


def test_a_prediction_is_captured_in_a_graph_and_gives_the_same_results(
    head: BaseKeypointHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_captured(head)


@torch.no_grad()
def check_captured(head: Any) -> None:
    """A CUDA graph of the head gives the results of the CPU."""
    head.eval()
    features = make_features()
    sizes = [(96, 64)] * len(features[0])
    expected = head.postprocess(head(features), sizes, 0.0)
    head.cuda()
    moved = [x.cuda() for x in features]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        head(moved)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = head(moved)
    graph.replay()
    for found, wanted in zip(head.postprocess(outputs, sizes, 0.0), expected):
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=5e-3, atol=1e-4)
        assert found.keypoints is not None
        assert found.keypoints.shape == wanted.keypoints.shape

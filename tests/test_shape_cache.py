"""Tensors that depend on shapes alone are computed once for each shape, and never kept where that would be wrong."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

from mvision.neck import HybridEncoder
from mvision.neck.aifi import SincosPosition
from mvision.neck.cached import LIMIT, ShapeCache, cached_tensors


class Counted:
    """A computation that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.full((2,), float(self.calls))


def test_a_result_is_computed_once_for_each_key() -> None:
    cache, compute = ShapeCache(), Counted()
    first = cache.get(1, compute)
    assert cache.get(1, compute) is first
    assert cache.get(2, compute) is not first
    assert compute.calls == 2


def test_the_result_that_was_not_used_longest_goes() -> None:
    cache, compute = ShapeCache(), Counted()
    for key in range(LIMIT):
        cache.get(key, compute)
    cache.get(0, compute)
    cache.get(LIMIT, compute)
    assert len(cache.tensors()) == LIMIT
    cache.get(0, compute)
    assert compute.calls == LIMIT + 1
    cache.get(1, compute)
    assert compute.calls == LIMIT + 2


def test_copies_and_pickles_start_empty() -> None:
    cache = ShapeCache()
    cache.get(1, Counted())
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.tensors() == []
        other.get(1, Counted())
    assert len(cache.tensors()) == 1


def test_what_inference_mode_computed_can_be_trained_with() -> None:
    position, weight = SincosPosition(8), nn.Parameter(torch.ones(8))
    with torch.inference_mode():
        position(torch.rand(1, 8, 4, 4))
    (position(torch.rand(1, 8, 4, 4)) * weight).sum().backward()
    assert weight.grad is not None


def test_tracers_leave_nothing_behind() -> None:
    position = SincosPosition(8)
    x = torch.rand(1, 8, 4, 4)
    torch.jit.trace(position, (x,), check_trace=False)
    torch.export.export(position, (x,))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        position(torch.empty(1, 8, 4, 4))
    assert cached_tensors(position) == []
    assert position(x).isfinite().all()


def test_positions_and_windows_of_the_neck_are_kept_by_size_and_type() -> None:
    neck = HybridEncoder([4, 4], [16, 32], 16, num_heads=2, ffn_dim=16, depth=0, attention="window", window_size=2)
    neck = neck.eval()
    with torch.no_grad():
        for side in (4, 6, 4):
            neck([torch.rand(1, 4, 2 * side, 2 * side), torch.rand(1, 4, side, side)])
    assert len(cached_tensors(neck)) == 2 * (1 + 3)  # a table, and three tensors of indices
    assert "position" not in "".join(neck.state_dict())
    assert neck.double().position(torch.rand(1, 16, 4, 4).double()).dtype == torch.float64

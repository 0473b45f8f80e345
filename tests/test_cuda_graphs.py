"""Which predictions replay a CUDA graph, and that a replay gives what the forward pass gives.

The bookkeeping is tested on the CPU, where a class that computes takes the place of a captured graph.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision.fast import cuda_graphs
from mvision.fast.cuda_graphs import GRAPHS, copy_of, replay_graphs


class Net(nn.Module):
    """Takes images like a model, and counts how often it really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.runs = 0

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Any]:
        self.runs += 1
        out = images.float() * self.weight
        return {"task": {"a": out, "same": out, "sum": out.sum((1, 2, 3))}}


class Recorded:
    """A captured graph that computes when it is replayed, always into the same memory, from the weights it has seen."""

    made = 0
    error: Exception | None = None

    def __init__(self, model: nn.Module, forward: Any, images: Tensor, pool: Any) -> None:
        if Recorded.error is not None:
            raise Recorded.error
        Recorded.made += 1
        self.weight = next(model.parameters())
        self.forward, self.outputs = forward, forward(images)
        self.busy = False

    def __call__(self, images: Tensor) -> Any:
        assert not self.busy
        self.busy = True
        out = images.float() * self.weight
        self.outputs["task"]["a"].copy_(out)
        self.outputs["task"]["sum"].copy_(out.sum((1, 2, 3)))
        copies = copy_of(self.outputs)
        self.busy = False
        return copies


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A network whose predictions on the CPU are treated as those on a GPU."""
    monkeypatch.setattr(cuda_graphs, "Captured", Recorded)
    monkeypatch.setattr(cuda_graphs, "can_replay", lambda model, images: True)
    Recorded.made, Recorded.error = 0, None
    made = Net().eval().requires_grad_(False)
    replay_graphs(made)
    return made


def images(batch: int, size: int = 4) -> Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def test_a_shape_is_captured_when_it_comes_again(net: Net) -> None:
    for number in range(4):
        x = images(2)
        torch.testing.assert_close(net(x)["task"]["a"], x.float())
        assert Recorded.made == (number > 0)
    assert net.runs == 2  # the first time, and inside the capture
    net(images(1))  # the last batch of a folder
    assert (Recorded.made, net.runs) == (1, 3)


def test_outputs_belong_to_the_caller(net: Net) -> None:
    for _ in range(2):
        net(images(2))
    x = images(2)
    first = net(x)["task"]
    kept = first["a"].clone()
    net(images(2))
    assert torch.equal(first["a"], kept)
    assert first["a"] is first["same"]
    torch.testing.assert_close(first["sum"], x.float().sum((1, 2, 3)))


def test_the_graph_that_was_not_used_longest_goes(net: Net) -> None:
    for batch in range(1, GRAPHS + 1):
        for _ in range(2):
            net(images(batch))
    net(images(1))
    for _ in range(2):
        net(images(GRAPHS + 1))
    assert len(net._replays) == GRAPHS
    runs = net.runs
    net(images(1))
    assert net.runs == runs
    net(images(2))  # gone
    assert net.runs == runs + 1


def test_more_shapes_in_turn_than_graphs_are_captured_more_and_more_rarely(net: Net) -> None:
    for _ in range(64):
        for batch in range(1, GRAPHS + 2):
            net(images(batch))
    assert Recorded.made < 8 * (GRAPHS + 1)


def test_training_labels_and_tracing_run_the_model_itself(net: Net) -> None:
    for _ in range(3):
        net(images(2), [])
        net.train()(images(2))
        net.eval()
    traced = torch.jit.trace(lambda x: net(x)["task"]["a"], (images(2),), check_trace=False)
    x = images(2)
    torch.testing.assert_close(traced(x), x.float())
    assert Recorded.made == 0


def test_weights_changed_in_place_take_effect_and_moved_ones_drop_the_graphs(net: Net) -> None:
    for _ in range(2):
        net(images(2))
    net.weight.copy_(torch.tensor([3.0]))
    x = images(2)
    torch.testing.assert_close(net(x)["task"]["a"], 3 * x.float())
    net.load_state_dict({"weight": torch.tensor([4.0])})
    torch.testing.assert_close(net(x)["task"]["a"], 4 * x.float())
    assert len(net._replays) == 1
    net.load_state_dict({"weight": torch.tensor([5.0])}, assign=True)
    assert len(net._replays) == 0
    torch.testing.assert_close(net(x)["task"]["a"], 5 * x.float())
    for _ in range(2):
        net(x)
    assert len(net._replays) == 1
    net.double()
    assert len(net._replays) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_no_graphs_and_make_their_own(net: Net, duplicate: Any) -> None:
    for _ in range(2):
        net(images(2))
    other = duplicate(net)
    assert isinstance(other, Net)
    assert not other.training
    x = images(2)
    for _ in range(3):
        torch.testing.assert_close(other(x)["task"]["a"], x.float())
    assert Recorded.made == (1 if duplicate is copy.copy else 2)
    assert len(net._replays) == 1


def test_a_failed_capture_is_told_once_and_the_model_runs_on(net: Net) -> None:
    try:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("capture ended")  # as the end of a broken capture does
    except RuntimeError as error:
        Recorded.error = error
    net(images(2))
    with pytest.warns(UserWarning, match="cannot be captured.*operation not permitted when stream is capturing[)]$"):
        net(images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = images(3)
        for _ in range(3):
            torch.testing.assert_close(net(x)["task"]["a"], x.float())


def test_a_shape_that_does_not_fit_is_predicted_without_a_graph_and_others_with(net: Net) -> None:
    net(images(4))
    Recorded.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(UserWarning, match=r"\(4, 3, 4, 4\) are predicted without .*too little GPU memory"):
        net(images(4))
    Recorded.error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            net(images(4))
            net(images(1))
    assert Recorded.made == 1


def test_several_threads_share_the_graphs(net: Net) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for number in range(40):
            x = images(1 + (seed + number) % 3)
            if not torch.equal(net(x)["task"]["a"], x.float()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert Recorded.made == 3


def test_compiled_models_tell_how_long_that_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    made = Net().eval().requires_grad_(False)
    replay_graphs(made, compiles=True)
    with pytest.warns(UserWarning, match=r"torch.compile took 0 s for images of \(2, 3, 4, 4\)"):
        made(images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(images(2))
    assert isinstance(copy.deepcopy(made), Net)

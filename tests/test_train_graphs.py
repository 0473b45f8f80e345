"""Backbone and neck by CUDA graphs in training: the same gradients, running means and losses as without."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvision import Model, create_model
from mvision.engine.graphs import RecordedFeatures, _Passes, _Replay, record_features
from mvision.structures import Targets

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Stub:
    """A recording on the CPU of ``weight * images`` and of its gradient, as a graph would write them."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.images, self.parameters = torch.zeros(3), [weight]
        self.outputs, self.output_gradients = [torch.zeros(3), torch.zeros(3)], [torch.zeros(3), torch.ones(3)]
        self.gradients: list[Tensor | None] = [torch.zeros(())]
        self.forward_graph = types.SimpleNamespace(replay=self._forward)
        self.backward_graph = types.SimpleNamespace(replay=self._backward)

    def _forward(self) -> None:
        self.outputs[0].copy_(self.parameters[0].detach() * self.images)
        self.outputs[1].copy_(3 * self.parameters[0].detach() * self.images)

    def _backward(self) -> None:
        assert self.gradients[0] is not None
        first, second = self.output_gradients
        self.gradients[0].copy_((first * self.images + 3 * second * self.images).sum())


def test_a_replay_is_one_operator_with_the_recorded_gradients() -> None:
    weight = nn.Parameter(torch.tensor(2.0))
    for images, uses_second in ((torch.tensor([1.0, 2.0, 3.0]), False), (torch.tensor([4.0, 0.0, 1.0]), True)):
        weight.grad = None
        first, second = _Replay.apply(Stub(weight), images, weight)
        assert torch.equal(first, 2 * images)
        loss = first.square().sum() + (second.sum() if uses_second else 0)
        loss.backward()
        expected = (2 * first.detach() * images).sum() + (3 * images.sum() if uses_second else 0)
        assert weight.grad is not None
        assert torch.equal(weight.grad, expected)


def test_passes_give_the_gradients_of_the_model_and_leave_its_own_alone() -> None:
    torch.manual_seed(0)
    model = create_model("tiny", tasks=["instance-seg"], num_classes=2, image_size=64).train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = copy.deepcopy(model).features(images)  # type: ignore[operator]
    passes = _Passes(model, images)
    outputs = passes.forward()
    expected = [*features.maps, *features.laterals.values()]
    assert passes.laterals == list(features.laterals) == [4]
    assert all(map(torch.equal, outputs, expected))
    given = [torch.randn_like(output) for output in outputs]
    found = passes.backward(outputs, given)
    own = [p for part in (model.backbone, model.neck) for p in part.parameters() if p.requires_grad]
    again = Model.features(model, images)
    true = torch.autograd.grad([*again.maps, *again.laterals.values()], own, given, allow_unused=True)
    assert len(found) == len(true) == len(passes.parameters)
    for value, other in zip(found, true):
        assert (value is None) == (other is None)
        assert value is None or torch.allclose(value, other, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        own[0].mul_(2)
    assert not torch.equal(passes.forward()[0], outputs[0])  # weights that an optimiser changes are seen


def test_on_a_cpu_nothing_is_recorded_and_copies_are_plain() -> None:
    model = create_model("tiny", num_classes=2, image_size=64).train()
    images, plain = torch.rand(2, 3, 64, 64), copy.deepcopy(model)
    record_features(model)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        assert torch.equal(one.features(images).maps[0], copy.deepcopy(plain).features(images).maps[0])
    assert isinstance(model.features, RecordedFeatures)
    assert copied.features.__self__ is copied  # type: ignore[attr-defined]
    assert model.state_dict().keys() == plain.state_dict().keys()


def targets(count: int, generator: torch.Generator) -> list[Targets]:
    """``count`` images with two objects each."""
    return [
        Targets(
            boxes=0.2 + 0.3 * torch.rand(2, 4, generator=generator),
            labels=torch.tensor([0, 1]),
            areas=torch.full((2,), 0.1),
            size=(64, 64),
        )
        for _ in range(count)
    ]


def gradients(model: Model, steps: int, sizes: list[int], autocast: bool) -> list[Tensor]:
    """The gradients of all parameters in one row, of every step, in turn on these sizes; the weights stay as they are.

    Steps that change the weights would not do: rounding of 1e-4 in the convolutions becomes 40 % in some gradients
    within nine steps from random weights, as much as a fault.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(steps):
        torch.manual_seed(step)
        size = sizes[step % len(sizes)]
        images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator).cuda()
        labels = targets(4, generator)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            outputs = model(images, labels)
        torch.stack([value.float() for value in model.loss(outputs, labels).values()]).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        alive = outputs  # noqa: F841 - the autograd graph of one step lives on in the next, as in the training loop
    return found


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_training_by_graphs_on_a_gpu(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = create_model("tiny", num_classes=2, image_size=64).cuda().train()
    recorded = copy.deepcopy(model)
    record_features(recorded)
    expected = gradients(model, 9, [64, 96, 64], autocast)
    found = gradients(recorded, 9, [64, 96, 64], autocast)
    features: Any = recorded.features
    assert len(features._recorded) == 2
    for own, by_graph in zip(expected, found):
        assert (own - by_graph).norm() < (0.5 if autocast else 0.03) * own.norm()
    for (name, buffer), (_, other) in zip(model.named_buffers(), recorded.named_buffers()):
        assert torch.allclose(buffer.float(), other.float(), rtol=0.05, atol=0.02), name


@needs_gpu
def test_a_failed_recording_is_told_and_leaves_random_numbers_on_a_gpu() -> None:
    model = create_model("tiny", num_classes=2, image_size=64).cuda().train()
    forward: Callable[[Tensor], Any] = model.backbone.forward

    def waits(images: Tensor) -> Any:
        images.float().sum().item()
        return forward(images)

    model.backbone.forward = waits  # type: ignore[method-assign]
    record_features(model)
    with pytest.warns(UserWarning, match="trains without CUDA graphs"):
        assert len(gradients(model, 3, [64], autocast=False)) == 3
    assert torch.rand(3, device="cuda").isfinite().all()

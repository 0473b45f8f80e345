"""Muon in few operations: all weight matrices of one shape are orthogonalised together.

PyTorch's and timm's Muon go through the matrices one by one. For a small network that is thousands of small operations
a step, and starting them on a GPU takes longer than the forward and the backward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvision.compat import add_all, copy_all, multiply_all
from mvision.structures.transfer import to_host

COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))
"""(a, b, c) of the three Newton-Schulz steps X <- a X + (b A + c A A) X with A = X X^T. They are the first three of the
five in https://leloykun.github.io/ponder/muon-opt-coeffs/ (timm's preset ``quintic``). The last two cost time, and the
model learned no better with them (AP 0.216 with five, 0.220 with three after 300 steps on the built-in data set)."""
MOMENTUM = 0.95
EPSILON = 1e-7
RMS = 0.2
"""Orthogonalised matrices are multiplied by this and by the square root of their longer side, so that the root mean
square of a change is about that of AdamW's, whose learning rates then fit (Liu et al., "Muon is Scalable for LLM
Training", 2025, section 2.2)."""

WASTE = {"cpu": 2**20, "gpu": 2**28}
"""See ``_stacks``: what takes about as long as the operations that another stack would need."""


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices, AdamW with Nesterov momentum for other parameters.

    The same training as timm's ``Muon(nesterov=True, ns_steps=3)``, and the same state for every parameter. The kernels
    of convolutions are matrices with a row for each output channel.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    Args:
        groups: of parameters, each with ``params``, ``lr``, ``weight_decay`` and ``use_muon``.
        betas: of AdamW.
        dtype: of the Newton-Schulz steps, which need no high precision.

    Attributes:
        found_inf: set from outside: a () float tensor that is 1 where the gradient is not finite; ``step`` then changes
            nothing. It is read on the device, so nobody waits for it. ``torch.amp.GradScaler`` sets it too.
    """

    _step_supports_amp_scaling = True  # the name by which GradScaler knows that step reads found_inf

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(groups, {"betas": betas})
        self.dtype = dtype
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None  # of GradScaler, where the gradient is still scaled
        self._parts: list[_Matrices | _Others] = []
        self._parameters: list[nn.Parameter] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called with a state that is loaded: what is kept besides it is made anew in the next step."""
        super().__setstate__(state)
        self._parts, self._parameters = [], []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change all parameters that have a gradient."""
        assert closure is None
        assert getattr(self, "grad_scale", None) is None, "the gradient has to be unscaled"
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not _same(parameters, self._parameters):
            self._parts, self._parameters = list(self._new_parts()), parameters
        found_inf = getattr(self, "found_inf", None)  # GradScaler deletes it
        for part in self._parts:
            part.step(found_inf)

    def _new_parts(self) -> Iterator[_Matrices | _Others]:
        """The parameters that have a gradient, by what is done with them together."""
        matrices, others = _Members(), _Members()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (matrices if group["use_muon"] else others).append((parameter, group))
                    self.state[parameter]["use_muon"] = group["use_muon"]
        if matrices:
            yield _Matrices(matrices, self.state, self.dtype)
        # Parameters that were not in all steps before have another bias correction.
        steps = to_host({str(number): self.state[p].get("step", _ZERO) for number, (p, _) in enumerate(others)})
        by_step: dict[float, _Members] = {}
        for number, member in enumerate(others):
            by_step.setdefault(float(steps[str(number)]), _Members()).append(member)
        for taken, members in by_step.items():
            yield _Others(members, self.state, taken)


_ZERO = torch.zeros(())
_Members = list[tuple[nn.Parameter, dict[str, Any]]]
"""Parameters with their groups."""
_State = MutableMapping[Tensor, Any]
"""The state of the optimiser: by parameter, a dictionary."""


def _has_rows_in_order(parameter: Tensor) -> bool:
    """Whether its rows follow each other in memory, in plain or in channels_last order; matrices need that."""
    return parameter.ndim > 0 and parameter.stride(0) * len(parameter) == parameter.numel()


def _same(first: list[nn.Parameter], second: list[nn.Parameter]) -> bool:
    return len(first) == len(second) and all(one is other for one, other in zip(first, second))


class _Flat:
    """One block of memory with a place for each of some parameters, in the memory order of that parameter.

    Attributes:
        values: (N,) the block.
        places: views of it, each like its parameter.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        self.values = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        blocks = self.values.split([p.numel() for p in parameters])
        self.places = [
            block.as_strided(p.shape, p.stride()) if _has_rows_in_order(p) else block.view(p.shape)
            for block, p in zip(blocks, parameters)
        ]

    def load(self, state: _State, parameters: list[nn.Parameter], key: str) -> None:
        """Make the block the memory of a state of the optimiser, with the values that it has."""
        for place, parameter in zip(self.places, parameters):
            if key in state[parameter]:
                place.copy_(state[parameter][key])
            state[parameter][key] = place


class _Part:
    """Parameters that are changed together."""

    def __init__(self, members: _Members) -> None:
        self.parameters = [parameter for parameter, _ in members]
        self.gradient = _Flat(self.parameters)  # then the change, in the same memory
        self.groups: list[tuple[dict[str, Any], list[nn.Parameter], list[Tensor]]] = []
        for group in {id(group): group for _, group in members}.values():
            own = [number for number, (_, other) in enumerate(members) if other is group]
            places = [self.gradient.places[number] for number in own]
            self.groups.append((group, [self.parameters[number] for number in own], places))

    def collect(self, found_inf: Tensor | None) -> None:
        """Gather the gradients; where they are not finite, take zeros."""
        copy_all(self.gradient.places, [p.grad for p in self.parameters if p.grad is not None])
        if found_inf is not None:
            self.gradient.values.masked_fill_(found_inf.bool(), 0)

    def apply(self, found_inf: Tensor | None) -> None:
        """Subtract from every parameter p its change and its decay, lr * (change + weight_decay * p)."""
        for group, parameters, changes in self.groups:
            if group["weight_decay"]:
                add_all(changes, parameters, group["weight_decay"])
        if found_inf is not None:
            self.gradient.values.mul_(1 - found_inf)
        for group, parameters, changes in self.groups:
            add_all(parameters, changes, -group["lr"])


class _Others(_Part):
    """Parameters for AdamW with Nesterov momentum (Dozat, "Incorporating Nesterov Momentum into Adam", 2016).

    Args:
        taken: steps that these parameters were changed in before.
    """

    def __init__(self, members: _Members, state: _State, taken: float) -> None:
        super().__init__(members)
        self.first, self.second = _Flat(self.parameters), _Flat(self.parameters)
        self.first.load(state, self.parameters, "exp_avg")
        self.second.load(state, self.parameters, "exp_avg_sq")
        self.betas = members[0][1]["betas"]
        device = self.first.values.device
        self.taken = torch.tensor(taken, device=device)
        self.logarithms = torch.tensor([math.log(beta) for beta in self.betas], device=device)
        for parameter in self.parameters:
            state[parameter]["step"] = self.taken

    def step(self, found_inf: Tensor | None) -> None:
        """Where ``found_inf`` is 1 nothing changes."""
        self.collect(found_inf)
        (beta1, beta2), gradient = self.betas, self.gradient.values
        first, second = self.first.values, self.second.values
        keep: Any = 1.0 if found_inf is None else 1 - found_inf
        self.taken += keep
        first.lerp_(gradient, (1 - beta1) * keep)
        second.mul_(1 + (beta2 - 1) * keep).addcmul_(gradient, gradient, value=1 - beta2)
        # 1 - beta ** step, in the form that float32 is precise enough for.
        corrections = torch.expm1(self.taken.clamp(min=1) * self.logarithms).neg_()
        spread = second.div(corrections[1]).sqrt_().add_(EPSILON)
        gradient.lerp_(first, beta1).div_(spread).div_(corrections[0])
        self.apply(found_inf)


class _Matrices(_Part):
    """Weight matrices, which are changed by their orthogonalised momentum."""

    def __init__(self, members: _Members, state: _State, dtype: torch.dtype) -> None:
        members = sorted(members, key=lambda member: _rows_and_columns(member[0]))
        super().__init__(members)
        self.dtype = dtype
        self.momentum = _Flat(self.parameters)
        self.momentum.load(state, self.parameters, "momentum_buffer")
        shapes = [_rows_and_columns(parameter) for parameter in self.parameters]
        self.scales = [RMS * max(shape) ** 0.5 for shape in shapes]
        counts = Counter(shapes)
        blocks = self.gradient.values.split([count * math.prod(shape) for shape, count in counts.items()])
        wide = [block.view(-1, *shape) for block, shape in zip(blocks, counts)]
        wide = [block.mT if block.shape[1] > block.shape[2] else block for block in wide]
        self.stacks = _stacks(wide, WASTE["cpu" if self.gradient.values.device.type == "cpu" else "gpu"])

    def step(self, found_inf: Tensor | None) -> None:
        """Where ``found_inf`` is 1 nothing changes."""
        self.collect(found_inf)
        keep: Any = 1.0 if found_inf is None else 1 - found_inf
        self.momentum.values.lerp_(self.gradient.values, (1 - MOMENTUM) * keep)
        self.gradient.values.lerp_(self.momentum.values, MOMENTUM)
        for blocks in self.stacks:
            self._orthogonalize(blocks)
        multiply_all(self.gradient.places, self.scales)
        self.apply(found_inf)

    def _orthogonalize(self, blocks: list[Tensor]) -> None:
        """Orthogonalise blocks of matrices, each (n, rows, columns), in place; zeros bring them to one shape."""
        count, shape = sum(len(block) for block in blocks), blocks[0].shape[1:]
        whole = all(block.shape[1:] == shape for block in blocks)
        stack = (torch.empty if whole else torch.zeros)((count, *shape), dtype=self.dtype, device=blocks[0].device)
        for result in (False, True):
            start = 0
            for block in blocks:
                part = stack[start : start + len(block), : block.shape[1], : block.shape[2]]
                start += len(block)
                (block if result else part).copy_(part if result else block)
            if not result:
                stack = orthogonalize(stack)


def _rows_and_columns(parameter: Tensor) -> tuple[int, int]:
    return len(parameter), parameter.numel() // len(parameter)


def _stacks(blocks: list[Tensor], waste: int) -> list[list[Tensor]]:
    """Put blocks (n, rows, columns) together, the largest shape first, where that costs little more arithmetic.

    Args:
        waste: multiplications that the zeros of a block may cost, counted as rows * rows * columns.
    """
    stacks: list[list[Tensor]] = []
    for block in sorted(blocks, key=lambda block: _cost(block.shape[1:]), reverse=True):
        number, *shape = block.shape
        fitting = [
            stack
            for stack in stacks
            if all(own <= other for own, other in zip(shape, stack[0].shape[1:]))
            and number * (_cost(stack[0].shape[1:]) - _cost(shape)) <= waste
        ]
        if fitting:
            min(fitting, key=lambda stack: _cost(stack[0].shape[1:])).append(block)
        else:
            stacks.append([block])
    return stacks


def _cost(shape: Sequence[int]) -> int:
    return shape[0] * shape[0] * shape[1]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors, and singular values near 1 where they were not very small.

    Args:
        matrices: (n, rows, columns) with at most as many rows as columns; they are overwritten.
    """
    matrices.div_(matrices.norm(dim=(-2, -1), keepdim=True).clamp_(min=EPSILON))
    square = matrices.new_empty((*matrices.shape[:-1], matrices.shape[-2]))
    polynomial, result = torch.empty_like(square), torch.empty_like(matrices)
    for a, b, c in COEFFICIENTS:
        torch.bmm(matrices, matrices.mT, out=square)
        torch.baddbmm(square, square, square, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(matrices, polynomial, matrices, beta=a, out=result)
        matrices, result = result, matrices
    return matrices

"""Folding of norms into the convolutions before them, in networks of other libraries, whose structure one call shows.

Needs torch alone.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode


def fold_norms(net: nn.Module, call: Callable[[nn.Module], Any]) -> nn.Module:
    """Fold every BatchNorm2d with running statistics into its convolution, in place, if nothing else uses that output.

    Outputs in eval mode stay the same. The dropout and activation that timm's norm modules contain are kept.

    Args:
        call: calls a network with the structure of ``net`` on the meta device.
    """
    for name, follower in observe(net, call).followers.items():
        conv, norm = net.get_submodule(name), net.get_submodule(follower)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
        fused.requires_grad_(conv.weight.requires_grad)
        net.set_submodule(name, fused)
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        net.set_submodule(follower, nn.Sequential(*rest) if rest else nn.Identity())
    return net


@dataclass
class Observed:
    """What was observed of a network's convolutions and linear layers in one call, by their names.

    Attributes:
        followers: the name of the only module that uses a convolution's output. Contained are convolutions where both
            modules run once and nothing else uses the output or the weight (some networks standardise the weight
            first). ``nn.Identity`` does not count as a module.
        shapes: (B, C, H, W) of a convolution's input.
        after_sums: the name of the module that alone uses the sum of a convolution's output and another tensor of its
            shape, where nothing else uses that output. The convolution's bias can be added there as well.
        first: the name of the convolution that alone uses the network's input; empty if there is none.
        rows: by the name of a linear layer, how many rows its first input has. Contained are the layers whose weight is
            used by their own calls alone.
    """

    followers: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    after_sums: dict[str, str] = field(default_factory=dict)
    first: str = ""
    rows: dict[str, int] = field(default_factory=dict)


def observe(net: nn.Module, call: Callable[[nn.Module], Any]) -> Observed:
    """Call a copy of the network on the meta device; nothing is observed if it cannot run there."""
    watched = copy.deepcopy(net).to("meta").eval()
    leaves = _leaves(watched)
    runs: Counter[str] = Counter()  # calls of each module
    output_of: dict[str, int] = {}  # module -> id of its output
    inputs_of: dict[str, int] = {}  # module -> id of its first input
    readers_of: dict[int, list[str]] = {}  # id of a tensor -> modules that get it as input
    uses, observed = _Uses(), Observed()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            runs[name] += 1
            inputs_of.setdefault(name, id(inputs[0]) if inputs else 0)
            for tensor in _tensors(inputs):
                readers_of.setdefault(id(tensor), []).append(name)
                if isinstance(module, nn.Conv2d):
                    observed.shapes[name] = list(tensor.shape)
                elif type(module) is nn.Linear:
                    observed.rows.setdefault(name, math.prod(tensor.shape[:-1]))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                output_of[name] = id(uses.keep(output))

        return hook

    for name, module in leaves.items():
        if not isinstance(module, nn.Identity):
            module.register_forward_pre_hook(before(name))
            module.register_forward_hook(after(name))
    try:
        with torch.no_grad(), uses:
            results = call(watched)
    except (NotImplementedError, RuntimeError):
        return Observed()
    returned, first = {id(tensor) for tensor in _tensors([results])}, next(iter(inputs_of), "")
    if runs[first] == 1 and _takes_images(watched.get_submodule(first), inputs_of[first], uses, returned):
        observed.first = first
    for name in list(observed.rows):
        if uses.of(id(leaves[name].weight)) != ["linear"] * runs[name]:
            del observed.rows[name]
    for name, module in leaves.items():
        output = output_of.get(name, 0)
        if not isinstance(module, nn.Conv2d) or runs[name] != 1 or uses.of(id(module.weight)) != ["conv2d"]:
            continue
        total = uses.sums.get(output, 0)
        # An output that is added to in place is the sum itself: it is used by the addition and by the one that follows.
        in_place = total == output
        readers = readers_of.get(total or output, [])
        if len(readers) != 1 or runs[readers[0]] != 1 or not {output, total}.isdisjoint(returned):
            continue
        if not total and len(uses.of(output)) == 1:
            observed.followers[name] = readers[0]
        elif total and len(uses.of(output)) == 1 + in_place and len(uses.of(total)) == 1 + uses.in_place(total):
            observed.after_sums[name] = readers[0]
    return observed


def _leaves(net: nn.Module) -> dict[str, nn.Module]:
    """The modules that contain no other; timm's norms contain an activation, and such a module counts as one."""
    leaves = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) or not any(m.children())}
    for module in leaves.values():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # an output with the id of the input hides its readers
    return leaves


def _takes_images(module: nn.Module, image: int, uses: _Uses, returned: set[int]) -> bool:
    """Whether the module that was called first is a convolution that alone uses the network's input."""
    alone = uses.of(image) == ["conv2d"] and not uses.made(image) and image not in returned
    return isinstance(module, nn.Conv2d) and alone and uses.of(id(module.weight)) == ["conv2d"]


class _Uses(TorchFunctionMode):
    """Records, by the ``id`` of a tensor, the names of the torch functions that computed tensors from it.

    It keeps all tensors alive, so that no id is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, int] = {}  # id of a summand -> id of a sum of two tensors of the same shape
        self._names: dict[int, list[str]] = {}
        self._made: set[int] = set()
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors([result])):
            for tensor in _tensors([args, *(kwargs or {}).values()]):
                self._names.setdefault(id(self.keep(tensor)), []).append(func.__name__)
        self._made |= {id(tensor) for tensor in _tensors([result])}
        if func.__name__.strip("_") in ("add", "iadd") and not kwargs:
            summands = list(_tensors(args))
            if len(summands) == 2 and summands[0].shape == summands[1].shape == result.shape:
                self.sums |= {id(summand): id(self.keep(result)) for summand in summands}
        return result

    def in_place(self, key: int) -> bool:
        """Whether a sum has been written over one of its summands."""
        return self.sums.get(key) == key

    def made(self, key: int) -> bool:
        """Whether a torch function has returned this tensor."""
        return key in self._made

    def of(self, key: int) -> list[str]:
        return self._names.get(key, [])

    def keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())

"""Norms folded into the convolutions before them, in networks of other libraries: found by watching one call.

Needs torch alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode


def fold_norms(net: nn.Module, call: Callable[[nn.Module], Any]) -> nn.Module:
    """Fold every BatchNorm2d with running statistics that is all that reads a convolution into it, in place.

    Outputs in eval mode stay the same. What else the norm's module does (timm's have an activation) stays.

    Args:
        call: runs a module of this kind on inputs without data (the meta device).
    """
    for name, follower in watch(net, call).followers.items():
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
class Seen:
    """What a call shows of a network's convolutions, by their names.

    Attributes:
        followers: the name of the one module that reads it, where nothing else does. Either of them runs once, and the
            convolution's weights are used as they are (some networks standardise them first). Identities are looked
            through.
        shapes: of its input, (B, C, H, W).
    """

    followers: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)


def watch(net: nn.Module, call: Callable[[nn.Module], Any]) -> Seen:
    """What ``call`` shows of a copy of the network without data; nothing where it does not run without."""
    watched = copy.deepcopy(net).to("meta").eval()
    # timm's norms hold an activation, and are read from as a whole.
    leaves = {n: m for n, m in watched.named_modules() if isinstance(m, nn.BatchNorm2d) or not any(m.children())}
    runs: Counter[str] = Counter()
    made: dict[str, int] = {}
    read: dict[int, list[str]] = {}
    uses = _Uses()
    seen = Seen()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            runs[name] += 1
            for tensor in _tensors(inputs):
                read.setdefault(id(tensor), []).append(name)
                if isinstance(module, nn.Conv2d):
                    seen.shapes[name] = list(tensor.shape)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                made[name] = id(uses.keep(output))

        return hook

    for name, module in leaves.items():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # what is written into the input would hide who reads it
        if not isinstance(module, nn.Identity):
            module.register_forward_pre_hook(before(name))
            module.register_forward_hook(after(name))
    try:
        with torch.no_grad(), uses:
            results = call(watched)
    except (NotImplementedError, RuntimeError):
        return Seen()
    returned = {id(tensor) for tensor in _tensors([results])}
    for name, module in leaves.items():
        output = made.get(name, 0)
        readers = read.get(output, [])
        if not isinstance(module, nn.Conv2d) or len(readers) != 1 or output in returned:
            continue
        once = runs[name] == runs[readers[0]] == len(uses.of(output)) == 1
        if once and uses.of(id(module.weight)) == ["conv2d"]:
            seen.followers[name] = readers[0]
    return seen


class _Uses(TorchFunctionMode):
    """By the ``id`` of a tensor the names of the functions that made tensors of it.

    All tensors are kept, so that no id comes again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors([result])):
            for tensor in _tensors([args, *(kwargs or {}).values()]):
                self._names.setdefault(id(self.keep(tensor)), []).append(func.__name__)
        return result

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

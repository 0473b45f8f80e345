"""A pretended GPU: tensors that say they are on another device, compute on the CPU, and count what would wait or copy.

Tensors on the device ``meta`` hold a tensor on the CPU. What a real GPU refuses (two devices in one operator) is
refused here too, and what makes the CPU wait for a real GPU is counted, so that tests of it need none.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("meta")
# Operators whose result, or its size, depends on values, so that the CPU has to wait for them.
WAITS = (
    *("_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique", "_unique2"),
    *("unique_consecutive", "unique_dim_consecutive", "bincount", "is_nonzero", "equal", "argwhere", "_nested_tensor"),
)
# Operators that start no kernel, besides views.
FREE = frozenset({"detach", "alias", "_unsafe_view", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided"})


class OnDevice(Tensor):
    """A tensor of the pretended GPU; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a PretendedGpu")

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendedGpu(TorchDispatchMode):
    """Computes with tensors of the pretended GPU while it is active.

    Attributes:
        kernels: operators on the device by name, without views and allocations.
        waits: what would make the CPU wait for the device, or is a copy outside of ``mvision.structures.transfer``, as
            ``operator at file:line``.
        transfers: calls of ``to_device`` and ``start_to_host`` (or ``to_host``) with at least one tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        device = [value for value in tensors if isinstance(value, OnDevice)]
        target = kwargs.get("device")
        name = func._schema.name.removeprefix("aten::")
        if not device and (target is None or torch.device(target).type != DEVICE.type):
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0  # plain matrix products: the fused operators of CPU and GPU differ
        to_host = target is not None and torch.device(target).type == "cpu"
        self._count(func, name, args, tensors, device, to_host)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if to_host:
            return result.clone() if any(result is value.inner for value in device) else result
        return self._wrapped(result, device)

    def _count(self, func: Any, name: str, args: Any, tensors: list, device: list, to_host: bool) -> None:
        host = [value for value in tensors if not isinstance(value, OnDevice)]
        if name in WAITS or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self._wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._wait(f"{name} by bool")
            if any(not isinstance(index, OnDevice) for index in indices):
                self._wait(f"{name} by a tensor on the CPU")
        elif to_host or (name in ("_to_copy", "copy_", "lift_fresh", "lift") and host):
            self._wait(f"{name} between CPU and device")
        elif any(value.dim() for value in host):
            raise AssertionError(f"{func}: tensors on the CPU and on the device, {[tuple(t.shape) for t in tensors]}")
        if not _is_view(func) and name not in FREE:
            self.kernels[name] += 1

    def _wait(self, what: str) -> None:
        self.waits[f"{what} at {_place()}"] += 1

    def _wrapped(self, result: Any, device: list[OnDevice]) -> Any:
        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            same = [tensor for tensor in device if tensor.inner is value]
            return same[0] if same else OnDevice(value)

        return tree_map(wrap, result)

    @contextmanager
    def counted(self, monkeypatch: Any) -> Iterator[PretendedGpu]:
        """The mode, with the functions of ``mvision.structures.transfer`` moving tensors to and from this device."""
        import mvision.structures.transfer as transfer

        own = {"to_device": self.to_device, "start_to_host": self.start_to_host, "to_host": self.to_host}
        for name, function in own.items():
            original = getattr(transfer, name)
            for module in _modules_with(original, name):
                monkeypatch.setattr(module, name, function)
        monkeypatch.setattr("mvision.neck.cached.has_values", lambda tensor: True)
        enabled = torch.is_autocast_enabled  # it does not know the device
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: kind != DEVICE.type and enabled())
        with self:
            yield self

    def to_device(self, tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """See ``mvision.structures.transfer``."""
        if torch.device(device).type != DEVICE.type:
            raise AssertionError(f"to_device: {device} instead of the device of the model")
        self.transfers["to device"] += bool(tensors)
        return {name: value if isinstance(value, OnDevice) else OnDevice(value) for name, value in tensors.items()}

    def start_to_host(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See ``mvision.structures.transfer``."""
        self.transfers["to host"] += any(isinstance(value.detach(), OnDevice) for value in tensors.values())
        copies = {name: _inner(value.detach()).clone() for name, value in tensors.items()}
        return lambda: copies

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``mvision.structures.transfer``."""
        return self.start_to_host(tensors)()


def on_device(module: nn.Module) -> nn.Module:
    """Move a module to the pretended GPU, in place."""
    with PretendedGpu():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnDevice(buffer)
    return module


def _place() -> str:
    """The innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and any(part.alias_info is not None and not part.alias_info.is_write for part in returns)


def _modules_with(function: Any, name: str) -> list[Any]:
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is function]

"""Everything here uses a part of another library that the library does not promise to keep.

Each entry names the version it was checked with. ``tests/test_compat.py`` runs each of them: if a new version of a
library drops such a part, the test named after the entry fails.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader

ONNX_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch's ONNX exporter stores the modules that a node comes from, outermost first, as the
text of a Python list (torch 2.14.1)."""

OPENVINO_KEEP_FLOAT32 = (
    {"name": "precise", "version": "0"},
    {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"},
)
"""Attributes of a layer's ``rt_info`` in an OpenVINO XML file that keep the layer in float32 when the model computes in
bf16. The first is the name in older versions, the second the one that OpenVINO 2026.4.1 reads; each version ignores the
other's."""


@contextmanager
def albumentations_alone() -> Iterator[None]:
    """Import albumentations without what it only needs to fetch and store transforms (2.0.8).

    It asks the package index for a newer version, which takes seconds without a network, and imports huggingface_hub
    with its web client where that is installed: more than half of its own import, in every process that loads images.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    hub = "huggingface_hub"
    hidden = hub not in sys.modules
    if hidden:
        sys.modules[hub] = None  # type: ignore[assignment]  # its import fails, as where it is not installed
    try:
        yield
    finally:
        if hidden:
            del sys.modules[hub]


def shared_bytes(count: int) -> Tensor:
    """(count,) uint8 in memory that all processes share, reserved but not written (torch 2.14.1).

    ``share_memory_`` copies a tensor there, which takes five times as long where there is nothing to copy.
    """
    import torch

    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(torch.UntypedStorage._new_shared(count)) if count else empty.share_memory_()


def worker_sentinels(loader: DataLoader[Any]) -> list[int]:
    """Handles of a loader's running worker processes, for ``multiprocessing.connection.wait`` (torch 2.14.1)."""
    return [worker.sentinel for worker in getattr(loader._iterator, "_workers", [])]


def stop_workers(loader: DataLoader[Any]) -> None:
    """End the worker processes of a loader with ``persistent_workers`` before it is deleted (torch 2.14.1)."""
    # The iterator of a loader without workers has nothing to shut down.
    if loader.num_workers > 0 and loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
    loader._iterator = None


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of many small tensors into its partner, in a few calls instead of one for each (torch 2.14.1)."""
    import torch

    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def add_all(targets: Sequence[Tensor], sources: Sequence[Tensor], factor: float) -> None:
    """Add ``factor`` times its partner to each of many tensors, in a few calls, not one for each (torch 2.14.1)."""
    import torch

    if targets:
        torch._foreach_add_(list(targets), list(sources), alpha=factor)


def multiply_all(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply each of many tensors by its factor, in a few calls instead of one for each (torch 2.14.1)."""
    import torch

    if tensors:
        torch._foreach_mul_(list(tensors), list(factors))


def move_all_towards(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each of many tensors a part of the way to its partner, in a few calls, not one for each (torch 2.14.1)."""
    import torch

    if targets:
        torch._foreach_lerp_(list(targets), list(sources), weight)


def compilation_error() -> type[Exception]:
    """The base class of what ``torch.compile`` raises at the first call of what it cannot compile (torch 2.14.1)."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


@contextmanager
def room_for_graphs(number: int) -> Iterator[None]:
    """Inside this context ``torch.compile`` makes at least so many graphs of a module, one for each shape of its input.

    It stops at eight otherwise, and runs other shapes uncompiled (torch 2.14.1; torch 2.6 has the setting's old name).
    """
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: max(number, getattr(config, name))}):  # type: ignore[attr-defined]
        yield


def has_packed_convolutions() -> bool:
    """Whether this build of torch has the oneDNN convolutions that ``torch.compile`` uses on x86 (torch 2.14.1)."""
    import torch

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def pack_convolution_weight(weight: Tensor, settings: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """A convolution's weight in the memory order that oneDNN prefers for inputs of one shape (torch 2.14.1).

    Args:
        weight: (out, in / groups, h, w).
        settings: padding, stride and dilation (a list of two each) and groups.
        shape: (B, C, H, W) of the input.
    """
    import torch

    return torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, shape)


def packed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, settings: Sequence[Any], activation: str, limits: Sequence[float] = ()
) -> Tensor:
    """A convolution with a weight of ``pack_convolution_weight``, and the activation after it (torch 2.14.1).

    Args:
        activation: ``none``, ``relu``, ``swish``, ``hardswish``, or ``hardtanh``, which keeps results between the two
            ``limits``.
    """
    import torch

    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *settings, activation, list(limits), "")


def pack_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """A linear layer's weight (out, in) in the memory order that oneDNN prefers for inputs of so many rows (2.14.1)."""
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """A linear layer with a weight of ``pack_linear_weight``, and the activation after it (torch 2.14.1).

    Args:
        x: (..., in).
        activation: ``none``, ``relu``, ``swish``, ``hardswish`` or ``gelu``.
    """
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """Make a GPU usable again after the capture of a CUDA graph has failed (torch 2.11.0 on an H100).

    torch ends its own part of a capture only where the driver ended it without an error. Otherwise the generator of
    random numbers refuses to work outside a graph, and the allocator keeps blocks back that several streams have used.

    Args:
        pool: the memory that the graph was captured with.
    """
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # where nothing was being captured yet, or torch has ended it
        torch._C._cuda_endAllocateToPool(index, pool)
    # The end of a capture that succeeds is the only call that tells the generator.
    with torch.cuda.device(index), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.empty(1, device=f"cuda:{index}").zero_()


def reset_accelerate() -> None:
    """Let the next ``Accelerator`` of this process have other settings than the last one (accelerate 1.15.0).

    Accelerate shares one state among all of a process's Accelerators, and refuses a second one that differs from it.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@contextmanager
def hub_offline_unless(reachable: Callable[[str], bool]) -> Iterator[None]:
    """Inside this context the Hub's client reads its cache only, unless the Hub is reachable (huggingface_hub 2.4.0).

    The client reads the environment variable HF_HUB_OFFLINE once, when it is imported; where a user has set it, it
    stays in force.

    Args:
        reachable: gets the address of the Hub (or of the mirror that the environment names).
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

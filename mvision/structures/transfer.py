"""Several tensors between the CPU and a GPU in one copy.

Each copy costs a few microseconds of the CPU, however small it is, and one that the CPU waits for stops it from queuing
further work, so that the GPU falls idle. Heads move labels to the device and results back through these functions
alone; ``tests/test_operators.py`` counts their calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; vectorised kernels load up to this many at once


def to_device(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The same tensors on ``device``; from the CPU to a GPU by one copy that the CPU does not wait for.

    Results are views of one block of memory. Tensors that are on the device already are returned as they are.
    """
    device = torch.device(device)
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    starts, total = _places(tensors)
    packed = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    for name, tensor in tensors.items():
        _part(packed, starts[name], tensor).copy_(tensor)
    moved = packed.to(device, non_blocking=True)
    return {name: _part(moved, starts[name], tensor) for name, tensor in tensors.items()}


def start_to_host(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Start the copy of tensors to the CPU, and return a function that waits for it and gives the copies.

    Work that is queued between the two calls keeps the GPU busy meanwhile. Tensors on the CPU are given as they are.
    """
    if all(tensor.device.type != "cuda" for tensor in tensors.values()):
        return lambda: {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    starts, total = _places(tensors)
    device = next(tensor.device for tensor in tensors.values() if tensor.device.type == "cuda")
    packed = torch.empty(total, dtype=torch.uint8, device=device)
    for name, tensor in tensors.items():
        _part(packed, starts[name], tensor).copy_(tensor.detach())
    host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))

    def wait() -> dict[str, Tensor]:
        done.synchronize()
        return {name: _part(host, starts[name], tensor) for name, tensor in tensors.items()}

    return wait


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors on the CPU, by one copy, which is waited for."""
    return start_to_host(tensors)()


def _places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """The first byte of every tensor in a block of memory, and the size of the block."""
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        total += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
    return starts, total


def _part(block: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a block of bytes that holds a contiguous tensor like this one."""
    size = like.numel() * like.element_size()
    return block[start : start + size].view(like.dtype).view(like.shape)

"""Times that can be compared: everything in one run, in turn, medians; memory by a process of its own."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def alternate(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int, warmups: int = 2, seconds: float = math.inf
) -> list[list[float]]:
    """Seconds of every call, in turn, so that whatever slows the machine slows all of them.

    Args:
        repeats: rounds at most; at least three, else as many as fit into ``seconds``.
        warmups: rounds that do not count.
    """
    taken: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    for number in range(-warmups, repeats):
        if number >= 3 and time.perf_counter() - started > seconds:
            break
        for call, times in zip(calls, taken):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if number >= 0:
                times.append(time.perf_counter() - start)
    return taken


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of times that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(over, under))


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call takes at its peak beyond what was taken before; None where it cannot be told.

    On a CPU that is the resident memory of this process, which should be a fresh one: what earlier calls left in the
    allocator is used again.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        RESET.write_text("5", encoding="ascii")  # the peak starts anew from what is resident now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(key: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

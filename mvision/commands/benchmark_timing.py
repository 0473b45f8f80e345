"""Times that can be compared: all calls take turns in one process. Peak memory of a single call."""

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
    """Seconds of every call. The calls take turns, so that whatever slows the machine slows all of them.

    Args:
        repeats: most rounds; at least three are made, then as many as fit into ``seconds``.
        warmups: rounds before them that are not measured.
    """
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    for number in range(-warmups, repeats):
        if number >= 3 and time.perf_counter() - started > seconds:
            break
        for call, of_call in zip(calls, times):
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if number >= 0:
                of_call.append(time.perf_counter() - start)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over all rounds of the ratio of two times of one round."""
    return statistics.median(a / b for a, b in zip(times, base))


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that a call allocates beyond what was allocated before it; None where that cannot be measured.

    On a CPU this is the resident memory of the process. The process should be a new one: memory that earlier calls
    freed is reused and would not be counted.
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
        RESET.write_text("5", encoding="ascii")  # resets the peak to the memory that is resident now
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

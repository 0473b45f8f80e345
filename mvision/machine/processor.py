"""What the system says of the processor."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cores() -> int:
    """The number of cores that this process may use; in a container it can be smaller than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_field(key: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is no such file or field."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def cpu_name() -> str:
    """The manufacturer's name of the processor, ``unknown`` if the system does not report it."""
    return cpu_field("model name") or platform.processor() or "unknown"


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products (AVX-512 BF16 or AMX)."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_field("flags").split())

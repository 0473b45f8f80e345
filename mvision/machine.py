"""What this machine is good at: device, precision, memory allocation."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mvision.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionOption = Literal["auto", "fp32", "bf16", "fp16"]
"""What a user may ask for."""
InferencePrecision = Literal["fp32", "bf16"]
InferencePrecisionOption = Literal["auto", "fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is; an unusable one is a UserError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({first}); try cpu, or leave the option out") from error
    return device


def resolve_precision(precision: PrecisionOption, device: torch.device) -> Precision:
    """``auto`` is bf16 where the hardware computes in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 BF16 or AMX)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def cores() -> int:
    """The cores this process may use, which a container limits."""
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
    """The processor's name as its maker gives it."""
    return cpu_field("model name") or platform.processor() or "unknown"


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks instead of returning them to the kernel.

    Every activation of a batch is a large block; giving it back costs a page fault per 4 KiB when the next layer asks
    for memory again, more than a third of the time of a training step on CPU. Returns whether it was possible.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


def channels_last_is_safe(model: nn.Module, device: torch.device) -> bool:
    """Whether training in channels_last memory works for every convolution of the model on this device.

    torch 2.14's CPU kernel for the weight gradient of a strided 1x1 convolution on a picture (RepVGG's and MobileOne's
    first layer) writes out of bounds in float32.
    """
    return device.type != "cpu" or not any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels <= 4
        for m in model.modules()
    )


def _has_mps() -> bool:
    return torch.backends.mps.is_available()

"""What this machine is good at: device, precision, memory allocation."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mvision.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


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


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
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

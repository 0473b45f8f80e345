"""Facts about the machine that the program runs on: device, precision, cores, names, memory allocation.

torch is imported inside the functions: the command line and the processes that draw the built-in data do without it.
"""

from __future__ import annotations

import ctypes
import platform
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, TypeVar

from mvision.errors import UserError
from mvision.machine.processor import cores as cores
from mvision.machine.processor import cpu_field as cpu_field
from mvision.machine.processor import cpu_has_bf16, cpu_name
from mvision.machine.selftest import bf16_is_faster

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionOption = Literal["auto", "fp32", "bf16", "fp16"]
"""``auto`` is resolved by ``resolve_precision``."""

Result = TypeVar("Result")

TRITON_IS_INSTALLED = find_spec("triton") is not None
_triton_fails = False


def resolve_device(name: str | None) -> torch.device:
    """The device of that name, or without a name the first GPU, else the CPU.

    Raises:
        UserError: the device cannot be used on this machine.
    """
    import torch

    if name is None:
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({first}); try cpu, or leave the option out") from error
    return device


def resolve_precision(precision: PrecisionOption, device: torch.device) -> Precision:
    """The precision that ``auto`` is: the same for training and prediction.

    On a CUDA GPU bf16 where the hardware computes in it, else fp16; on a CPU that computes in bf16, bf16 if it is
    faster there, as ``mvision.machine.selftest`` has measured; else fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if computes_in_bf16(device) else "fp16"
    return "bf16" if device.type == "cpu" and computes_in_bf16(device) and bf16_is_faster() else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of matrices in bf16.

    Without them PyTorch computes number by number: on a CPU with AVX2 alone a product of 256 x 256 numbers in bf16
    takes forty times as long as in fp32.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bf16()


def inference_precision(precision: PrecisionOption, device: torch.device) -> Precision:
    """``resolve_precision`` for prediction.

    Raises:
        UserError: a CPU on which this precision would be slower than fp32, or no precision.
    """
    if precision != "auto":
        torch_dtype(precision)
    if device.type == "cpu" and precision == "fp16":
        raise UserError("--precision fp16: CPUs do not compute in fp16 (it would be slower); use bf16, fp32 or auto")
    if device.type == "cpu" and precision == "bf16" and not cpu_has_bf16():
        raise UserError("--precision bf16: this CPU does not compute in bf16 (it would be slower); use fp32")
    return resolve_precision(precision, device)


def torch_dtype(precision: Precision) -> torch.dtype:
    """torch's type of a precision. Raises a ``UserError`` for another word."""
    import torch

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in types:
        raise UserError(f"precision {precision!r}: {', '.join(types)} or auto")
    return types[precision]


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks of memory for later use instead of returning them to the kernel.

    Every activation of a batch is such a block. Memory that comes from the kernel anew costs a page fault per 4 KiB:
    more than a third of the time of a training step on a CPU.

    Returns:
        Whether the setting was made; it exists with glibc on Linux only.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


def channels_last_is_safe(model: nn.Module, device: torch.device) -> bool:
    """Whether the model can be trained in channels_last memory on this device without a crash.

    On a CPU, torch 2.14 computes the weight gradient of a strided 1x1 convolution with at most 4 input channels (the
    first layer of RepVGG and MobileOne) with a float32 kernel that writes beyond the end of its memory.
    """
    from torch import nn

    return device.type != "cpu" or not any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels <= 4
        for m in model.modules()
    )


def has_triton() -> bool:
    """Whether kernels written in Triton are to be tried: it is installed, and none has failed in this process."""
    return TRITON_IS_INSTALLED and not _triton_fails


def with_triton(kernel: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
    """The result of ``kernel``, or of ``otherwise``, which does the same without Triton, where Triton does not work.

    Triton compiles a kernel when it is called for the first time, with a C compiler, which many containers lack, and
    not for every GPU. Its first failure is told in a warning, and no kernel is tried afterwards (triton 3.2 to 3.8).
    """
    global _triton_fails
    if has_triton():
        import torch

        try:
            return kernel()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Triton passes on what compilers, linkers and files raise
            _triton_fails = True
            reason = " ".join(str(error).split())[:300]
            warnings.warn(
                "Triton cannot compile kernels for this GPU, so slower operators of PyTorch do their work. It needs a "
                f"C compiler such as gcc and the headers of Python ({type(error).__name__}: {reason})",
                stacklevel=2,
            )
    return otherwise()

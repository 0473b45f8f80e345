"""Whether bf16 is faster than fp32 on this CPU: measured once for each machine, in about half a second.

The instructions that a processor has do not tell it: with AVX-512 BF16 alone bf16 takes half of fp32's time on one
processor and more than all of it on another, or with another version of torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mvision.compat import (
    has_packed_convolutions,
    pack_convolution_weight,
    pack_linear_weight,
    packed_convolution,
    packed_linear,
)
from mvision.errors import UserError
from mvision.machine.processor import cpu_name
from mvision.storage.atomic import write_text
from mvision.storage.cache import cache_dir

if TYPE_CHECKING:
    import torch

FASTER = 1.1
"""bf16 is taken where it is at least this many times as fast: less is within the noise of a busy machine, and fp32 is
exact."""
ROUNDS, FEWEST_ROUNDS, WARM_UP = 9, 4, 2
SECONDS = 0.8
"""After that no further round is made, on a slow or busy machine."""
UNDISTURBED = 0.8
"""Least ``processor_share`` of a measurement that is kept: it is 0.98 on an idle machine, 0.5 beside three programs on
two cores, where the ratio came out as 1.0 to 1.8 in place of 1.4."""
VERSION = 3  # of what is measured, or of how


@cache
def bf16_is_faster() -> bool:
    """Whether products in bf16 are faster than in fp32 on this CPU by a clear margin.

    The ratio is kept in a file of the cache folder, one for each processor, version of torch and number of threads.
    Where the file cannot be read or written, every process measures again. Within a process the first answer stands.
    """
    about = _about()
    path = _path(about)
    ratio = None if path is None else _stored(path, about)
    if ratio is not None:
        return ratio >= FASTER
    clocks = time.perf_counter(), time.process_time()
    ratios = measure()
    ratio = statistics.median(ratios)
    faster = ratio >= FASTER
    # Not kept for ever where other programs ran meanwhile, which changes the ratio, or where the rounds disagree.
    agree = sum((one >= FASTER) == faster for one in ratios) >= 0.75 * len(ratios)
    if path is not None and agree and processor_share(*clocks) >= UNDISTURBED:
        _store(path, {**about, "fp32_over_bf16": round(ratio, 4)})
    return faster


def measure() -> list[float]:
    """Time of a small piece of a model in fp32 by that in bf16, in alternating runs."""
    import torch

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        in_fp32, in_bf16 = block(torch.float32), block(torch.bfloat16)
        for _ in range(WARM_UP):
            in_fp32(), in_bf16()
        ratios: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(ratios) < FEWEST_ROUNDS or (len(ratios) < ROUNDS and time.perf_counter() < end):
            ratios.append(seconds(in_fp32) / seconds(in_bf16))
    return ratios


def processor_share(wall: float, processor: float) -> float:
    """Which share of the time of its threads this process was running, since ``perf_counter`` and ``process_time``."""
    import torch

    elapsed = (time.perf_counter() - wall) * torch.get_num_threads()
    return (time.process_time() - processor) / elapsed


def seconds(call: Callable[[], object]) -> float:
    """Duration of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def block(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """What a model for 640 x 640 pixels consists of, once: convolutions, attention, linear layers.

    Convolutions and linear layers are packed as in ``mvision.fast.packed``, where this build of torch can do that.
    """
    import torch
    import torch.nn.functional as F

    def numbers(*shape: int) -> torch.Tensor:  # no random ones: the caller's generator stays as it is
        values = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float32, device="cpu")
        return values.reshape(shape).to(dtype)

    channels, side, tokens = 128, 40, 400
    image = numbers(1, channels, side, side).to(memory_format=torch.channels_last)
    wide, narrow = numbers(channels, channels, 3, 3) / 64, numbers(channels, channels, 1, 1) / 8
    bias = numbers(channels)
    queries, up, down = numbers(1, 8, tokens, 32), numbers(1024, 256) / 16, numbers(256, 1024) / 32
    packed = has_packed_convolutions()

    def settings(weight: torch.Tensor) -> tuple[list[int], list[int], list[int], int]:
        return [weight.shape[2] // 2] * 2, [1, 1], [1, 1], 1

    def prepare(weight: torch.Tensor) -> torch.Tensor:
        if packed:
            return pack_convolution_weight(weight, settings(weight), image.shape)
        return weight.to(memory_format=torch.channels_last)

    def convolve(x: torch.Tensor, weight: torch.Tensor, kernel: int) -> torch.Tensor:
        if packed:
            return packed_convolution(x, weight, bias, ([kernel // 2] * 2, [1, 1], [1, 1], 1), "relu")
        return F.conv2d(x, weight, bias, padding=kernel // 2).relu_()

    first, second = prepare(wide), prepare(narrow)
    if packed:
        up, down = pack_linear_weight(up, tokens), pack_linear_weight(down, tokens)

    def run() -> torch.Tensor:
        convolve(convolve(image, first, 3), second, 1)
        attended = F.scaled_dot_product_attention(queries, queries, queries).transpose(1, 2).flatten(2)
        if packed:
            return packed_linear(packed_linear(attended, up, None, "gelu"), down, None, "none")
        return F.linear(F.gelu(F.linear(attended, up)), down)

    return run


def _about() -> dict[str, object]:
    """What a stored ratio holds for."""
    import torch

    return {"version": VERSION, "cpu": cpu_name(), "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def _path(about: dict[str, object]) -> Path | None:
    """The file that a ratio is kept in; None without a folder for it."""
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    try:
        return cache_dir() / f"bf16-{name}.json"
    except UserError:  # there is no home folder
        return None


def _stored(path: Path, about: dict[str, object]) -> float | None:
    """The ratio in a file; None where there is no file, or it is damaged or about something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or {key: content.get(key) for key in about} != about:
        return None
    ratio = content.get("fp32_over_bf16")
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < math.inf:
        return None
    return float(ratio)


def _store(path: Path, content: dict[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2) + "\n")
    except OSError:  # a read-only home folder or a full disk costs half a second in the next process
        return

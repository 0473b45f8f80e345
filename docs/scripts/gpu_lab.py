"""What the scripts about GPUs share: a line about the machine, medians, and how busy the GPU was."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision.machine import cores, device_name

INTERVAL = 0.05  # seconds between two readings


def describe(device: torch.device) -> str:
    """Device, cores and versions."""
    import timm
    import transformers

    versions = f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"
    return f"{device_name(device)}, {cores()} cores, Python {sys.version.split()[0]}, {versions}"


def milliseconds(times: Sequence[float]) -> str:
    """The median of times in seconds."""
    return f"{1000 * statistics.median(times):.2f}"


class Busy:
    """Share of the time inside the context in which the GPU ran at least one kernel, by the driver's own counter.

    Attributes:
        share: 0..1; None without a GPU or without the package nvidia-ml-py.
    """

    def __init__(self, device: torch.device) -> None:
        self.share: float | None = None
        self._readings: list[int] = []
        self._ended = threading.Event()
        self._handle = None
        if device.type == "cuda":
            try:
                import pynvml
            except ImportError:
                return
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)

    def __enter__(self) -> Busy:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        # The counter lags behind: the first readings are of the time before.
        settled = self._readings[len(self._readings) // 4 :]
        self.share = statistics.mean(settled) / 100 if settled else None

    def _read(self) -> None:
        if self._handle is None:
            return
        import pynvml

        while not self._ended.is_set():
            self._readings.append(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
            time.sleep(INTERVAL)

    def __str__(self) -> str:
        return "-" if self.share is None else f"{self.share:.0%}"

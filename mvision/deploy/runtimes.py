"""The choice of a runtime for prediction: the fastest one that this machine has for these weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from mvision.deploy.exported import ExportedModel, export_path, exported_config, is_exported
from mvision.deploy.fast import prepare
from mvision.errors import UserError
from mvision.evaluation import Evaluated
from mvision.machine import InferencePrecision, InferencePrecisionOption, cpu_has_bf16, resolve_precision
from mvision.storage.run_folder import BEST
from mvision.weights import load, read_weights


def open_fastest(
    source: str, tasks: Sequence[str], device: torch.device, precision: InferencePrecisionOption = "auto"
) -> tuple[Evaluated, str]:
    """A model that is ready to predict, and a line that names its runtime, device and precision.

    For a run folder on a CPU this is the OpenVINO export in it, if that is newer than the weights and has the tasks. A
    ``source`` that is a file is always opened itself.

    Args:
        source: any source of weights, or an exported model.
        tasks: the tasks to run; empty: all that the source has.
        device: for models in PyTorch; exported ones run on the CPU.
        precision: ``auto`` is bf16 where the hardware computes in it, else fp32. The difference in AP is in
            docs/measurements.md; coordinates stay in float32 in every runtime.

    Raises:
        UserError: the weights cannot be used, or their runtime does not have this precision.
    """
    exported = Path(source) if is_exported(source) else _export_in_run(source, tasks, device)
    if exported is not None:
        return _open_exported(exported, tasks, precision)
    chosen = _check_precision(precision, device)
    model = prepare(load(source, tasks=list(tasks) or None).to(device), chosen)
    hint = f"; faster after mvision export --weights {source} --format openvino" if _is_run(source, device) else ""
    return model, f"PyTorch on {device.type} in {chosen}{hint}"


def _open_exported(path: Path, tasks: Sequence[str], precision: InferencePrecisionOption) -> tuple[Evaluated, str]:
    if path.suffix.lower() == ".onnx":
        if precision == "bf16":
            raise UserError("--precision bf16: ONNX Runtime has fp32 only on a CPU; use an export for openvino")
        return ExportedModel(path, list(tasks) or None), f"ONNX Runtime on cpu in fp32: {path}"
    chosen = _check_precision(precision, torch.device("cpu"))
    return ExportedModel(path, list(tasks) or None, chosen), f"OpenVINO on cpu in {chosen}: {path}"


def _check_precision(precision: InferencePrecisionOption, device: torch.device) -> InferencePrecision:
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise UserError("--precision bf16: this CPU does not compute in bf16 (it would be slower); use fp32")
    return "bf16" if resolve_precision(precision, device) == "bf16" else "fp32"


def _export_in_run(source: str, tasks: Sequence[str], device: torch.device) -> Path | None:
    """The OpenVINO export in a run folder; None if it is older than the weights or lacks one of the tasks."""
    weights = Path(source) / BEST
    exported = export_path(weights, "openvino")
    if not _is_run(source, device) or not is_exported(exported) or find_spec("openvino") is None:
        return None
    if exported.stat().st_mtime < weights.stat().st_mtime:
        return None
    wanted = tasks or read_weights(weights).config.heads
    return exported if set(wanted) <= set(exported_config(exported).heads) else None


def _is_run(source: str, device: torch.device) -> bool:
    return device.type == "cpu" and (Path(source) / BEST).is_file()

"""Which way a model runs for prediction: the fastest that is there for this machine, and what it is, in a line."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from mvision.deploy.exported import ExportedModel, exported_config, is_exported, place_beside
from mvision.deploy.fast import prepare
from mvision.errors import UserError
from mvision.evaluation import Evaluated
from mvision.machine import cpu_has_bf16, resolve_precision
from mvision.storage.run_folder import BEST
from mvision.weights import load, read_weights

Chosen = Literal["auto", "fp32", "bf16"]


def open_fastest(
    source: str, tasks: Sequence[str], device: torch.device, precision: Chosen = "auto"
) -> tuple[Evaluated, str]:
    """A model that is ready to predict, and what it runs in.

    A run's folder that holds an OpenVINO export of its weights is run by that on a CPU; whoever names a file gets that
    file. bf16 is taken where the hardware computes in it; its price is in docs/measurements.md, 0.15 points of AP;
    coordinates stay in float32 in either runtime.

    Args:
        source: any source of weights, or an exported model.
        tasks: which of its tasks; none: all.
        device: for PyTorch's models.
        precision: ``auto`` is bf16 where the hardware has it, else fp32.

    Raises:
        UserError: anything wrong with the weights, or a precision that their runtime does not have.
    """
    exported = Path(source) if is_exported(source) else _export_of(source, tasks, device)
    if exported is not None:
        return _open_exported(exported, tasks, precision)
    chosen = _precision(precision, device)
    model = prepare(load(source, tasks=list(tasks) or None).to(device), chosen)
    hint = f"; faster after mvision export --weights {source} --format openvino" if _is_run(source, device) else ""
    return model, f"PyTorch on {device.type} in {chosen}{hint}"


def _open_exported(path: Path, tasks: Sequence[str], precision: Chosen) -> tuple[Evaluated, str]:
    if path.suffix.lower() == ".onnx":
        if precision == "bf16":
            raise UserError("--precision bf16: ONNX Runtime has fp32 alone on a CPU; use an export for openvino")
        return ExportedModel(path, list(tasks) or None), f"ONNX Runtime on cpu in fp32: {path}"
    chosen = _precision(precision, torch.device("cpu"))
    return ExportedModel(path, list(tasks) or None, chosen), f"OpenVINO on cpu in {chosen}: {path}"


def _precision(precision: Chosen, device: torch.device) -> Literal["fp32", "bf16"]:
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise UserError("--precision bf16: this CPU does not compute in bf16 (it would be slower); use fp32")
    return "bf16" if resolve_precision(precision, device) == "bf16" else "fp32"


def _export_of(source: str, tasks: Sequence[str], device: torch.device) -> Path | None:
    """The OpenVINO export in a run's folder, where it is of the newest weights and has the tasks."""
    best = Path(source) / BEST
    exported = place_beside(best, "openvino")
    if not _is_run(source, device) or not is_exported(exported) or importlib.util.find_spec("openvino") is None:
        return None
    if exported.stat().st_mtime < best.stat().st_mtime:
        return None
    wanted = tasks or read_weights(best).config.heads
    return exported if set(wanted) <= set(exported_config(exported).heads) else None


def _is_run(source: str, device: torch.device) -> bool:
    return device.type == "cpu" and (Path(source) / BEST).is_file()

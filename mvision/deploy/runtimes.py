"""The choice of a runtime for prediction: the fastest one that this machine has for these weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from mvision.deploy.exported import ExportedModel, export_path, exported_description, is_exported
from mvision.deploy.formats import runtime_of
from mvision.errors import UserError
from mvision.evaluation import Evaluated
from mvision.fast.prepare import prepare
from mvision.machine import PrecisionOption, inference_precision
from mvision.storage.run_folder import BEST
from mvision.weights import load, read_config
from mvision.weights.stored import digest


def open_fastest(
    source: str,
    tasks: Sequence[str],
    device: torch.device,
    precision: PrecisionOption = "auto",
    family: str | None = None,
) -> tuple[Evaluated, str]:
    """A model that is ready to predict, and a line that names its runtime, device, precision and image size.

    For a run folder on a CPU this is the OpenVINO export in it, if it gives what the weights give: it was made from
    exactly these weights at the image size of the run, is not quantised, and has the tasks. Otherwise the line says why
    it is not used. A ``source`` that is a file is always opened itself.

    Args:
        source: any source of weights, or an exported model.
        tasks: the tasks to run; empty: all that the source has.
        device: for models in PyTorch; exported ones run on the CPU.
        precision: ``auto`` is the fastest one of the device, see ``mvision.machine.resolve_precision``; what it
            measured in PyTorch decides for OpenVINO too, which has the same kernels. The difference in AP is in
            docs/measurements.md; coordinates stay in float32 in every runtime.
        family: of a ``.pth`` file of the authors, where its name does not tell it.

    Raises:
        UserError: the weights cannot be used, or their runtime does not have this precision.
    """
    if is_exported(source):
        return _open_exported(Path(source), tasks, precision)
    hint = ""
    if device.type == "cpu" and (Path(source) / BEST).is_file():
        exported = export_path(Path(source) / BEST, "openvino")
        obstacle = _obstacle(exported, Path(source) / BEST, tasks) if is_exported(exported) else ""
        if obstacle is None:
            return _open_exported(exported, tasks, precision)
        not_used = f"; {exported.name} is not used: {obstacle}" if obstacle else ""
        hint = f"{not_used}; faster after mvision export --weights {source} --format openvino"
    chosen = inference_precision(precision, device)
    model = prepare(load(source, list(tasks) or None, family=family).to(device), chosen)
    return model, f"PyTorch on {device.type} in {chosen}, {_size(model)}{hint}"


def _open_exported(path: Path, tasks: Sequence[str], precision: PrecisionOption) -> tuple[Evaluated, str]:
    runtime = runtime_of(path)
    if runtime is not None:
        if precision not in ("auto", "fp32"):
            raise UserError(f"--precision {precision}: {runtime} has fp32 only on a CPU; use an export for openvino")
        model = ExportedModel(path, list(tasks) or None)
        return model, f"{runtime} on cpu in fp32, {_size(model)}: {path}"
    chosen = inference_precision(precision, torch.device("cpu"))
    model = ExportedModel(path, list(tasks) or None, chosen)
    return model, f"OpenVINO on cpu in {chosen}, {_size(model)}: {path}"


def _size(model: Evaluated) -> str:
    return "image size {}x{}".format(*model.config.image_size)


def _obstacle(exported: Path, weights: Path, tasks: Sequence[str]) -> str | None:
    """Why the export beside a run's weights does not stand for them; None if it does."""
    if find_spec("openvino") is None:
        return "the package openvino is missing"
    try:
        description = exported_description(exported)
    except UserError as error:
        return str(error)
    config = read_config(weights)
    missing = [task for task in tasks or config.heads if task not in description.config.heads]
    if not description.weights:
        return "an older version wrote it, which did not store from which weights"
    if description.weights != digest(weights):
        return "it was made from other weights than the run has now"
    if description.config.image_size != config.image_size:
        (height, width), (h, w) = description.config.image_size, config.image_size
        return f"it was made for images of {height}x{width}, and the run is for {h}x{w}"
    if description.precision != "fp32":
        return f"its weights are in {description.precision}"
    return f"it lacks {', '.join(missing)}" if missing else None

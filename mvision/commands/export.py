"""``mvision export``: a model for another runtime, kept only if it gives what PyTorch gives."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mvision.config import parse_model_config
from mvision.deploy.export import FORMATS, compare_with_pytorch, write_export
from mvision.deploy.exported import export_path, is_exported, require
from mvision.deploy.quantise import Quantised, quantise
from mvision.errors import UserError, did_you_mean
from mvision.weights import load, resolve_weights


def export(
    weights: str,
    *,
    format: str = "onnx",
    tasks: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    int8: bool = False,
    data: str | None = None,
    output: Path | None = None,
    log: Callable[[str], None] = print,
) -> Quantised | None:
    """Write a model for another runtime and compare it with PyTorch; nothing is left of an export that differs.

    Args:
        weights: any source that ``mvision.load`` takes.
        format: ``onnx``, a file, or ``openvino``, a folder.
        tasks: the tasks to export; empty: all that the weights have.
        image_size: (height, width); None is the model's own.
        dynamic_size: accept images of any size in multiples of 32, not of one size only.
        int8: quantise the OpenVINO model, and measure the loss of AP.
        data: data folder to calibrate and measure INT8 with; None: the built-in data set.
        output: the file or folder; None: beside the weights, or in the working folder for weights from the Hub.
        log: is called with a line for each compared shape, each quantised candidate and the path that was written.

    Returns:
        The result of the quantisation; None without ``int8``.

    Raises:
        UserError: unknown weights or format, a missing package, a path that cannot be written, or different outputs.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: {did_you_mean(format, FORMATS)}")
    if int8 and format != "openvino":
        raise UserError(f"--int8 with --format {format}: INT8 is available for openvino only")
    require("onnxscript", "onnxruntime" if format == "onnx" else "openvino", *(["nncf"] if int8 else []))
    model = load(weights, tasks=list(tasks) or None)
    if image_size is not None:
        described = {**model.config.model_dump(), "image_size": image_size}
        model.config.image_size = parse_model_config(described).image_size
    model.fuse()
    target = output or _default_path(weights, f"{format}_int8" if int8 else format)
    if target.is_dir() and any(target.iterdir()) and not is_exported(target):
        raise UserError(f"--output {target}: a folder that holds something else; choose another")
    quantised = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as folder:
            path = Path(folder) / target.name
            write_export(model, path, format, dynamic_size)
            for line in compare_with_pytorch(model, path, dynamic_size):
                log(line)
            if int8:
                quantised = quantise(path, data, log)
                log(f"kept: {quantised.candidate}")
            _replace(path, target)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror or error}); choose another") from error
    log(f"{format}: {target}")
    return quantised


def _default_path(weights: str, format: str) -> Path:
    path = resolve_weights(weights)
    if path.is_file():
        return export_path(path, format)
    return export_path((path if Path(weights).is_dir() else Path()) / "model", format)


def _replace(path: Path, target: Path) -> None:
    """Move the export to its place; a large ONNX model has a second file, with the weights."""
    if path.is_dir():
        if target.exists():
            shutil.rmtree(target)
        path.replace(target)
        return
    for file in sorted(path.parent.glob(f"{path.name}*"), reverse=True):
        file.replace(target.with_name(file.name))

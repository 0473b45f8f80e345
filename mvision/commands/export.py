"""``mvision export``: a model for another runtime, kept only if it gives what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mvision.config import parse_model_config
from mvision.deploy.export import compare_with_pytorch, write_export
from mvision.deploy.exported import export_path, is_exported
from mvision.deploy.formats import FORMATS, MOBILE, NAMES, PACKAGES
from mvision.deploy.opset import LOWEST
from mvision.deploy.output import check_target, complete, place, scratch, writing
from mvision.deploy.quantise import Quantised, quantise
from mvision.deploy.sessions import require
from mvision.errors import UserError, did_you_mean
from mvision.model import Model
from mvision.weights import load, resolve_weights
from mvision.weights.stored import digest


def export(
    weights: str,
    *,
    format: str = "onnx",
    tasks: Sequence[str] = (),
    family: str | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    int8: bool = False,
    data: str | None = None,
    output: Path | None = None,
    log: Callable[[str], None] = print,
) -> Quantised | None:
    """Write a model for another runtime and compare it with PyTorch; nothing is left of an export that differs.

    Args:
        weights, family: any source that ``mvision.load`` takes, but an exported model.
        format: ``onnx``, ``executorch`` or ``litert``, a file, or ``openvino``, a folder.
        tasks: the tasks to export; empty: all that the weights have.
        image_size: (height, width); None is the model's own.
        dynamic_size: accept images of any size in multiples of 32; not for phones (``MOBILE``).
        opset: version of ONNX's operators, 17 or higher; None: torch's choice.
        int8: quantise the OpenVINO model, and measure the loss of AP.
        data: data folder to calibrate and measure INT8 with; None: the built-in data set.
        output: the file, which gets the ending of its format if it has none, or the folder. Only an earlier export of
            mvision is replaced. None: beside the weights, or in the working folder for weights from the Hub.
        log: is called with a line for each compared shape, each quantised candidate and the path that was written.

    Returns:
        The result of the quantisation; None without ``int8``.

    Raises:
        UserError: unknown weights or format, a missing package, a path that cannot be written or holds something else,
            an opset that is not available for this model, a format that lacks its operators, or different outputs.
    """
    _check_options(format, int8, opset, dynamic_size)
    require(*PACKAGES[format], *(["nncf"] if int8 else []))
    if is_exported(weights):
        raise UserError(f"--weights {weights}: is an exported model already; give the weights that it was made from")
    source = resolve_weights(weights)
    target = complete(output or _default_path(weights, source, f"{format}_int8" if int8 else format), format)
    with writing(target):
        check_target(target, format)  # also before the model is loaded and converted, which takes long
    made_from = digest(source)
    model = _load(weights, tasks, family, image_size)
    with scratch(target) as folder:
        path, quantised = folder / target.name, None
        with writing(target):
            write_export(model, path, format, dynamic_size, made_from, opset)
        for line in compare_with_pytorch(model, path, dynamic_size):
            log(line)
        if int8:
            quantised = quantise(path, data, log, target)
            log(f"kept: {quantised.candidate}")
        with writing(target):
            check_target(target, format)  # it may have been written meanwhile
            files = place(path, target)
    log(f"{format}: {', '.join(map(str, files))}")
    return quantised


def _load(weights: str, tasks: Sequence[str], family: str | None, image_size: tuple[int, int] | None) -> Model:
    """The fused model, for images of this size."""
    model = load(weights, list(tasks) or None, family=family)
    if image_size is not None:
        described = {**model.config.model_dump(), "image_size": image_size}
        model.config.image_size = parse_model_config(described).image_size
    return model.fuse()


def _check_options(format: str, int8: bool, opset: int | None, dynamic_size: bool) -> None:
    if format not in FORMATS:
        raise UserError(f"--format {format}: {did_you_mean(format, FORMATS)}")
    if int8 and format != "openvino":
        raise UserError(f"--int8 with --format {format}: INT8 is available for openvino only")
    if opset is not None and format != "onnx":
        raise UserError(f"--opset {opset} with --format {format}: opsets are versions of ONNX")
    if dynamic_size and format in MOBILE:
        raise UserError(
            f"--dynamic-size with --format {format}: {NAMES[format]} files have one size; --image-size sets it"
        )
    if opset is not None and opset < LOWEST:
        raise UserError(f"--opset {opset}: {LOWEST} is the lowest that can be written")


def _default_path(weights: str, source: Path, format: str) -> Path:
    """Beside the weights.

    Args:
        source: the file or folder that ``weights`` stands for.
    """
    if source.is_file():
        return export_path(source, format)
    return export_path((source if Path(weights).is_dir() else Path()) / "model", format)

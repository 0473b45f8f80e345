"""The version of ONNX's operators (opset) that an exported file uses.

torch writes opset 18 and newer ones. For older programs, opset 17 is made of 18 here: few of the operators that models
use changed between the two, and the converter that comes with onnx cannot do it.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvision.errors import UserError
from mvision.weights.stored import first_line

LOWEST = 17
TORCH_OPSET = 18  # the lowest that torch writes
# Operators whose axes are an attribute in opset 17, and an input from 18 on.
_REDUCE = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


def set_opset(model: Any, opset: int) -> None:
    """Make sure that an ``onnx_ir.Model`` uses this opset, and can be read by programs that know no newer one.

    Args:
        model: as torch wrote it for this opset, or for ``TORCH_OPSET`` where that is higher; changed in place.

    Raises:
        UserError: the installed versions of torch and onnxscript cannot write this model with this opset.
    """
    import onnx

    if opset == LOWEST and model.opset_imports.get("") == TORCH_OPSET:
        for node in model.graph.all_nodes():
            _to_17(node)
        model.opset_imports[""] = opset
    written = model.opset_imports.get("")
    if written != opset:
        versions = " and ".join(f"{package} {version(package)}" for package in ("torch", "onnxscript"))
        raise UserError(f"--opset {opset}: {versions} write opset {written} instead; choose another one")
    domains = [onnx.helper.make_opsetid(*entry) for entry in model.opset_imports.items()]
    model.ir_version = onnx.helper.find_min_ir_version_for(domains)


def check_file(file: Path, opset: int) -> None:
    """Raise a UserError unless a file is valid ONNX of this opset."""
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise _refusal(opset, first_line(error)) from error


def _to_17(node: Any) -> None:
    """Write one operator of opset 18 as it was in 17; what is left of 18 is found by ``check_file``."""
    import onnx_ir

    if node.domain:
        return
    if node.op_type in _REDUCE and len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = node.inputs[1].const_value
        if axes is None:
            raise _refusal(17, f"{node.op_type} over axes that are computed")
        node.attributes["axes"] = onnx_ir.AttrInt64s("axes", [int(axis) for axis in axes.numpy().ravel()])
        node.replace_input_with(1, None)
        node.resize_inputs(1)
    if node.op_type == "Split" and "num_outputs" in node.attributes and _splits_evenly(node):
        del node.attributes["num_outputs"]  # without sizes, opset 17 makes equal parts; in 18 the last can be smaller
    # New attributes, with the values that mean what opset 17 does.
    for operator, name, value in (
        *((kind, "noop_with_empty_axes", 0) for kind in _REDUCE),
        ("Resize", "antialias", 0),
        ("Resize", "keep_aspect_ratio_policy", "stretch"),
    ):
        if node.op_type == operator and name in node.attributes and node.attributes[name].value == value:
            del node.attributes[name]


def _splits_evenly(node: Any) -> bool:
    axis, shape = node.attributes["axis"].value if "axis" in node.attributes else 0, node.inputs[0].shape
    length = None if shape is None else shape[axis]
    return isinstance(length, int) and length % len(node.outputs) == 0


def _refusal(opset: int, reason: str) -> UserError:
    return UserError(f"--opset {opset}: this model cannot be written with it ({reason}); choose another one")

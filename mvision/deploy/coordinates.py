"""Coordinates of an OpenVINO model stay in float32, whatever precision the rest is computed in.

bf16 has eight bits: of a place in 0..1 it keeps two pixels at 640, and of the number of a cell less. In PyTorch the
types in the heads' code see to it; OpenVINO has one precision for a whole model, but leaves out operators with a mark.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

# Where values end and coordinates begin: products with weights.
PRODUCTS = frozenset({"MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention", "Interpolate"})
# The mark has had two names; a version ignores that of the other.
MARKS = (
    {"name": "precise", "version": "0"},
    {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"},
)


def coordinate_operators(model: Any) -> set[str]:
    """Names of the operators that compute with coordinates in an ``openvino.Model``.

    What is turned into a whole number is the place of a cell: all that leads to it, back to the products with weights
    that coordinates are corrected by, and what uses it next (how far a point is from its cell).
    """
    cells = [
        operator
        for operator in model.get_ordered_ops()
        if operator.get_type_name() == "Convert"
        and operator.get_input_element_type(0).is_real()
        and operator.get_output_element_type(0).is_integral_number()
    ]
    found: dict[str, Any] = {}
    waiting = [operator.input_value(0).get_node() for operator in cells]
    while waiting:
        operator = waiting.pop()
        name = operator.get_friendly_name()
        if name in found or operator.get_type_name() in PRODUCTS | {"Parameter", "Constant"}:
            continue
        if not operator.get_output_element_type(0).is_real():
            continue
        found[name] = operator
        waiting += [value.get_node() for value in operator.input_values()]
    for operator in list(found.values()):
        for output in operator.outputs():
            for following in output.get_target_inputs():
                node = following.get_node()
                if node.get_type_name() not in PRODUCTS | {"Result"} and node.get_output_element_type(0).is_real():
                    found[node.get_friendly_name()] = node
    return set(found) | {operator.get_friendly_name() for operator in cells}


def mark(xml: Path, operators: set[str]) -> None:
    """Mark operators in a saved model."""
    tree = ElementTree.parse(xml)
    for layer in tree.getroot().iterfind("layers/layer"):
        if layer.get("name") in operators and layer.get("type") != "Const":
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, info)
            for attributes in MARKS:
                if info.find(f"attribute[@name='{attributes['name']}']") is None:
                    ElementTree.SubElement(info, "attribute", attributes)
    tree.write(xml)

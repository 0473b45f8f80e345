"""Which operators of an OpenVINO model compute with coordinates, and a mark that keeps those in float32.

bf16 has eight significant bits. A coordinate in 0..1 is then exact to two pixels of 640 only, and the index of a token
or grid point is less exact still. In PyTorch the heads' code converts coordinates to float32 itself. OpenVINO has one
precision for a whole model, but leaves marked operators in float32.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from mvision.compat import OPENVINO_KEEP_FLOAT32

# The search for coordinates ends at these operators: their inputs and results are features, not coordinates.
FEATURE_OPERATORS = frozenset({"MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention", "Interpolate"})

OUTPUTS = frozenset({"boxes", "keypoints"})
"""The outputs of tasks that are coordinates; an output is called ``TASK.OUTPUT``."""


def coordinate_operators(model: Any) -> set[str]:
    """Names of the operators that compute with coordinates in an ``openvino.Model``.

    A real number that is converted to an integer is a position from which an index is made; others are outputs, see
    ``OUTPUTS``. Everything that these numbers are computed from is a coordinate, back to the matrix product or
    convolution that predicts a correction of it (of a box, or of the distribution that it is the mean of); so is what
    uses these results next, such as the distance of a sampling point from its pixel.
    """
    conversions = [
        operator
        for operator in model.get_ordered_ops()
        if operator.get_type_name() == "Convert"
        and operator.get_input_element_type(0).is_real()
        and operator.get_output_element_type(0).is_integral_number()
    ]
    coordinates: dict[str, Any] = {}
    results = [output.get_node() for output in model.outputs if _names_coordinates(output)]
    queue = [operator.input_value(0).get_node() for operator in (*conversions, *results)]
    while queue:
        operator = queue.pop()
        name = operator.get_friendly_name()
        if name in coordinates or operator.get_type_name() in FEATURE_OPERATORS | {"Parameter", "Constant"}:
            continue
        if not operator.get_output_element_type(0).is_real():
            continue
        coordinates[name] = operator
        queue += [value.get_node() for value in operator.input_values()]
    for operator in list(coordinates.values()):
        for output in operator.outputs():
            for user in output.get_target_inputs():
                node = user.get_node()
                is_feature = node.get_type_name() in FEATURE_OPERATORS | {"Result"}
                if not is_feature and node.get_output_element_type(0).is_real():
                    coordinates[node.get_friendly_name()] = node
    return set(coordinates) | {operator.get_friendly_name() for operator in conversions}


def _names_coordinates(output: Any) -> bool:
    return any(name.rpartition(".")[2] in OUTPUTS for name in output.get_names())


def mark(xml: Path, operators: set[str]) -> None:
    """Mark these operators of a saved model, so that OpenVINO computes them in float32."""
    tree = ElementTree.parse(xml)
    for layer in tree.getroot().iterfind("layers/layer"):
        if layer.get("name") in operators and layer.get("type") != "Const":
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, info)
            for attributes in OPENVINO_KEEP_FLOAT32:
                if info.find(f"attribute[@name='{attributes['name']}']") is None:
                    ElementTree.SubElement(info, "attribute", attributes)
    tree.write(xml)

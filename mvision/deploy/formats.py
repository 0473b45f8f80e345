"""The formats of exported models: what they are called, and how their files end."""

from __future__ import annotations

from pathlib import Path

MOBILE = ("executorch", "litert")
"""Formats for phones and small machines: one file, for one image at a time, of one size."""
FORMATS = ("onnx", "openvino", *MOBILE)
ENDINGS = {"onnx": ".onnx", "executorch": ".pte", "litert": ".tflite"}
"""Of the formats that are files; an OpenVINO export is a folder."""
NAMES = {"onnx": "ONNX", "openvino": "OpenVINO", "executorch": "ExecuTorch", "litert": "LiteRT"}
RUNTIMES = {".onnx": "ONNX Runtime", ".pte": "ExecuTorch", ".tflite": "LiteRT"}
"""The programs that run such files. All of them compute in fp32 on a CPU."""
PACKAGES = {
    "onnx": ("onnxscript", "onnxruntime"),
    "openvino": ("onnxscript", "openvino"),
    "executorch": ("executorch",),
    "litert": ("litert_torch", "ai_edge_litert"),
}
"""What ``mvision export`` imports, in the names of the modules."""


def runtime_of(path: Path) -> str | None:
    """What runs a file of this name; None for anything but an exported model in one file."""
    return RUNTIMES.get(path.suffix.lower())

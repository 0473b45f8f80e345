"""Opening exported files: what is in them is checked first, then their runtime runs their graph.

None is asked to load libraries of custom operators: an exported file cannot bring code of its own.
"""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mvision.config import ModelConfig, parse_model_config
from mvision.deploy.formats import ENDINGS, MOBILE, RUNTIMES
from mvision.deploy.mobile import batched, check_content, open_graph, read_description
from mvision.errors import UserError
from mvision.machine import Precision
from mvision.weights.stored import first_line, read_json

DESCRIPTION = "mvision"  # the metadata key of an exported file that holds the model's description
XML = "model.xml"  # in the folder of an OpenVINO export
BIN = "model.bin"

_MOBILE = tuple(ENDINGS[format] for format in MOBILE)

Run = Callable[[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Description:
    """What ``mvision export`` stores in a file.

    Attributes:
        version: of mvision.
        weights: SHA-256 of the weights file that it was made from; empty for other sources and in older exports.
        precision: ``fp32`` or ``int8``.
        outputs: of a file for phones, names of the graph's outputs in order; elsewhere the graph has them.
    """

    config: ModelConfig
    version: str = ""
    weights: str = ""
    precision: str = "fp32"
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """An open graph.

    Attributes:
        outputs: name (``TASK.OUTPUT``) -> shape, with None for sides of any length.
        images: shape of the input.
        run: the outputs in that order for images (B, 3, H, W) uint8; any number of threads may call it at once. The
            graph is compiled at the first call.
        runtime: name of the program that runs it, and the format.
    """

    description: Description
    outputs: dict[str, tuple[int | None, ...]]
    images: tuple[int | None, ...]
    run: Run
    runtime: str


EXTRAS = {"executorch": "executorch", "litert_torch": "litert", "ai_edge_litert": "litert"}
"""Package -> mvision's extra that has it; ``export`` has the others."""


def require(*packages: str) -> None:
    """Raise a UserError that says what to install if one of the packages is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name, extra = package.replace("_", "-"), EXTRAS.get(package, "export")
            raise UserError(f"the package {name} is missing: pip install {name} (mvision's extra [{extra}])")


@lru_cache(maxsize=1)
def openvino_core() -> Any:
    """The only ``openvino.Core`` of this process, never destroyed.

    On CPUs with AMX every ``Core`` replaces the stack of the process's signal handlers and restores the previous one
    when it is destroyed. If two are destroyed in the order in which they were created, the second restores a stack that
    was freed already, and the next signal (the end of a worker process) is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def open_session(path: Path, precision: Precision) -> Session:
    """Open a file of ONNX, ExecuTorch or LiteRT, or a folder of OpenVINO.

    Raises:
        UserError: there is none, it cannot be read, or it was not written by ``mvision export``.
    """
    try:
        if path.is_file():
            if not path.stat().st_size:
                raise UserError(f"weights {path}: this file is empty")
            return _open_mobile(path) if path.suffix.lower() in _MOBILE else _open_onnx(path)
        if (path / XML).is_file():
            return _open_openvino(path, precision)
        found = path.exists()
    except OSError as error:
        raise UserError(f"weights {path}: cannot be opened ({error.strerror or error})") from error
    problem = f"neither an ONNX file nor a folder with {XML}" if found else "no such file or folder"
    raise UserError(f"weights {path}: {problem}")


def parse_description(text: str | None, path: Path) -> Description:
    """The description in an exported file; raises UserError if it is of another program, or damaged."""
    if text is None:
        raise UserError(f"weights {path}: not exported by mvision (its metadata, with the classes, are missing)")
    damaged = f"weights {path}: the description of the model in it is damaged"
    described = read_json(text, damaged)
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        raise UserError(f"{damaged} (it has no section model)")
    try:
        config = parse_model_config(described["model"])
    except UserError as error:
        raise UserError(f"weights {path}: {error}") from error
    config.backbone.forget_weights()  # the weights are in the file: nothing has to be downloaded
    texts = {key: str(described[key]) for key in ("version", "weights", "precision") if described.get(key)}
    outputs = described.get("outputs", [])
    return Description(config, **texts, outputs=tuple(map(str, outputs)) if isinstance(outputs, list) else ())


def _open_mobile(path: Path) -> Session:
    text = read_description(path)
    description = parse_description(text, path)
    assert text is not None
    check_content(path, text)
    require("executorch" if path.suffix.lower() == ENDINGS["executorch"] else "ai_edge_litert")
    graph = open_graph(path)
    if len(description.outputs) != len(graph.outputs) or len(graph.images) != 4:
        raise UserError(f"weights {path}: its graph is another one than in its description")
    outputs = {name: (None, *shape[1:]) for name, shape in zip(description.outputs, graph.outputs)}
    return Session(description, outputs, (None, *graph.images[1:]), batched(graph, path), RUNTIMES[path.suffix.lower()])


def _open_onnx(path: Path) -> Session:
    require("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise UserError(f"weights {path}: ONNX Runtime cannot read it ({first_line(error)})") from error
    description = parse_description(session.get_modelmeta().custom_metadata_map.get(DESCRIPTION), path)
    outputs = {entry.name: _sides(entry.shape) for entry in session.get_outputs()}
    images = [entry for entry in session.get_inputs() if entry.name == "images"]

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(list(outputs), {"images": images})
        except Exception as error:
            raise UserError(f"{path}: does not run on images of shape {images.shape} ({first_line(error)})") from error

    return Session(description, outputs, _sides(images[0].shape) if images else (), run, "ONNX Runtime")


def _sides(shape: list[Any]) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in shape)


def _open_openvino(path: Path, precision: Precision) -> Session:
    require("openvino")
    core = openvino_core()
    _check_xml(path)
    try:
        model = core.read_model(path / XML)
        text = model.get_rt_info([DESCRIPTION]).astype(str) if model.has_rt_info([DESCRIPTION]) else None
        outputs = {output.get_any_name(): _partial(output.get_partial_shape()) for output in model.outputs}
        images = _partial(model.input("images").get_partial_shape()) if text is not None else ()
    except RuntimeError as error:
        raise UserError(f"weights {path}: OpenVINO cannot read it ({_reason(error)})") from error
    description = parse_description(text, path)
    # Without the hint OpenVINO computes in bf16 on every CPU that has it.
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiling = Lock()

    # A model compiled for one input shape is a quarter faster than one for any shape, and a run has few shapes.
    @lru_cache(maxsize=4)
    def requests(shape: tuple[int, ...]) -> _Requests:
        fixed = core.read_model(path / XML)
        fixed.reshape({"images": list(shape)})
        return _Requests(core.compile_model(fixed, "CPU", {"INFERENCE_PRECISION_HINT": hint}))

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            with compiling:
                found = requests(images.shape)
            return found.run(images, len(outputs))
        except RuntimeError as error:
            raise UserError(f"{path}: does not run on images of shape {images.shape} ({_reason(error)})") from error

    return Session(description, outputs, images, run, "OpenVINO")


def _check_xml(path: Path) -> None:
    """Refuse a damaged file, which OpenVINO would hand to its readers of other formats; they write to stderr."""
    try:
        root = ElementTree.parse(path / XML).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: an odd encoding
        raise UserError(f"weights {path}: {XML} is damaged ({error})") from error
    if root.tag != "net" or not root.get("version", "").isdecimal():
        raise UserError(f"weights {path}: {XML} is no model of OpenVINO, or damaged")


def _partial(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if side.is_dynamic else side.get_length() for side in shape) if shape.rank.is_static else ()


class _Requests:
    """The inference requests of a compiled model: one for each call that runs at the same time.

    A request holds the memory of its inputs and outputs, so two threads must never share one.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: deque[Any] = deque()  # append and pop are atomic

    def run(self, images: np.ndarray, outputs: int) -> list[np.ndarray]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        results = request.infer({"images": images})
        values = [results[index].copy() for index in range(outputs)]
        self._idle.append(request)
        return values


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message with text in it: the lines before name places in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

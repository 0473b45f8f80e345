"""Exported models for prediction and evaluation: ONNX Runtime and OpenVINO behind the face of a ``Model``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mvision.config import ModelConfig, parse_model_config
from mvision.errors import UserError
from mvision.evaluation import Metric
from mvision.heads.base import Head
from mvision.model import Model
from mvision.structures import Category, Instances

DESCRIPTION = "mvision"  # key of the model's config in the file
XML = "model.xml"
PACKAGES = {"onnxruntime": "onnxruntime", "onnxscript": "onnx onnxscript", "openvino": "openvino", "nncf": "nncf"}

Run = Callable[[np.ndarray], list[np.ndarray]]


def is_exported(source: str | Path) -> bool:
    """Whether a source of weights is an ONNX file or an OpenVINO folder."""
    path = Path(source)
    return path.suffix.lower() == ".onnx" or path.suffix.lower() == ".xml" or (path / XML).is_file()


def place_beside(file: Path, format: str) -> Path:
    """Where the export of a weights file goes if nothing else is said: ``onnx``, ``openvino``, ``openvino_int8``."""
    return file.with_suffix(".onnx") if format == "onnx" else file.with_name(f"{file.stem}_{format}")


class ExportedModel(nn.Module):
    """An exported file, to be called as a ``Model`` is for prediction; the raw outputs are those of its graph.

    Args:
        path: an ONNX file, or a folder of OpenVINO.
        tasks: which of its tasks; None: all.
        precision: ``bf16`` lets OpenVINO compute in it; ONNX Runtime has fp32 alone on a CPU.

    Attributes:
        config: the model's description, from the file.

    Raises:
        UserError: no such file, another program's, without one of the tasks, or its runtime is not installed.
    """

    def __init__(
        self, path: str | Path, tasks: Sequence[str] | None = None, precision: Literal["fp32", "bf16"] = "fp32"
    ) -> None:
        super().__init__()
        path = Path(path)
        if path.suffix.lower() == ".xml":
            path = path.parent
        config, names, self._run = _open(path, precision)
        self._outputs = [name.partition(".")[::2] for name in names]
        missing = [task for task in tasks or () if task not in config.heads]
        if missing:
            raise UserError(f"weights {path}: there is no head '{', '.join(missing)}', only {', '.join(config.heads)}")
        if tasks is not None:
            config = config.model_copy(update={"heads": {task: config.heads[task] for task in tasks}})
        self.config = config
        # For its post-processing; its weights are not used.
        self._model = Model(config)
        self.eval()

    @property
    def categories(self) -> list[Category]:
        """The classes; labels index into this list."""
        return self._model.categories

    @property
    def tasks(self) -> list[str]:
        """What the model does."""
        return self._model.tasks

    @property
    def device(self) -> torch.device:
        """Where images are expected."""
        return torch.device("cpu")

    def head(self, task: str) -> Head:
        """The head that serves a task, for its post-processing."""
        return self._model.head(task)

    def evaluators(self, task: str) -> list[type[Metric]]:
        """As ``Model.evaluators``."""
        return self._model.evaluators(task)

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Raw outputs by task name, of (B, 3, H, W) uint8."""
        if images.dtype != torch.uint8:
            raise UserError(f"an exported model takes uint8 images, not {images.dtype}")
        found: dict[str, dict[str, Tensor]] = {}
        for (task, name), value in zip(self._outputs, self._run(images.cpu().contiguous().numpy())):
            if task in self.config.heads:
                found.setdefault(task, {})[name] = torch.from_numpy(np.asarray(value))
        return found

    def postprocess(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float = 0.5
    ) -> list[Instances]:
        """As ``Model.postprocess``."""
        return self._model.postprocess(outputs, sizes, threshold)

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float = 0.0
    ) -> dict[str, list[Instances]]:
        """As ``Model.results``."""
        return self._model.results(outputs, sizes, threshold)


def exported_config(path: Path) -> ModelConfig:
    """What an exported model is, without making it ready to run. Raises as ``ExportedModel`` does."""
    return _open(path, "fp32")[0]


def require(*packages: str) -> None:
    """UserError with what to install, where one of them is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this needs the package {package}: pip install {PACKAGES[package]}")


@lru_cache(maxsize=1)
def openvino_core() -> Any:
    """The one ``openvino.Core`` of this process, kept to its end.

    Each sets up a stack for signal handlers on CPUs with AMX, and puts back the one it found when it goes; of two that
    go in the order in which they came, the second puts back a stack that is no more, and the next signal (a loading
    process that ends) is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _open(path: Path, precision: Literal["fp32", "bf16"]) -> tuple[ModelConfig, list[str], Run]:
    """The model's description, the names of its outputs, and what runs it (compiled at the first call)."""
    if not path.exists():
        raise UserError(f"weights {path}: no such file or folder")
    description, names, run = _open_onnx(path) if path.is_file() else _open_openvino(path, precision)
    config = parse_model_config(json.loads(description)["model"])
    config.backbone.pretrained = False  # the weights are in the file: nothing is to be downloaded
    return config, names, run


def _open_onnx(path: Path) -> tuple[str, list[str], Run]:
    require("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise UserError(f"weights {path}: ONNX Runtime cannot read it ({_first_line(error)})") from error
    description = session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
    if description is None:
        raise UserError(f"weights {path}: not exported by mvision (mvision export writes the classes into the file)")
    names = [entry.name for entry in session.get_outputs()]

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(names, {"images": images})
        except Exception as error:
            raise UserError(f"{path}: does not run on images of shape {images.shape} ({_first_line(error)})") from error

    return description, names, run


def _open_openvino(path: Path, precision: Literal["fp32", "bf16"]) -> tuple[str, list[str], Run]:
    require("openvino")
    core = openvino_core()
    try:
        model = core.read_model(path / XML)
    except RuntimeError as error:
        raise UserError(f"weights {path}: OpenVINO cannot read it ({_first_line(error)})") from error
    if not model.has_rt_info([DESCRIPTION]):
        raise UserError(f"weights {path}: not exported by mvision (mvision export writes the classes into the file)")
    description = model.get_rt_info([DESCRIPTION]).astype(str)
    # Without the hint it computes in bf16 where the processor has it.
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    names = [output.get_any_name() for output in model.outputs]

    # With every size known beforehand it is a quarter faster; the shapes of a run are few.
    @lru_cache(maxsize=4)
    def request(shape: tuple[int, ...]) -> Any:
        fixed = core.read_model(path / XML)
        fixed.reshape({"images": list(shape)})
        return core.compile_model(fixed, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            results: Any = request(images.shape).infer({"images": images})
        except RuntimeError as error:
            raise UserError(f"{path}: does not run on images of shape {images.shape} ({_first_line(error)})") from error
        return [results[index].copy() for index in range(len(names))]

    return description, names, run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

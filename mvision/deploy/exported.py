"""Exported models, run by ONNX Runtime or OpenVINO, for prediction and evaluation as a ``Model`` is used."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvision.config import ModelConfig, parse_model_config
from mvision.errors import UserError
from mvision.evaluation import Metric
from mvision.heads.base import Head
from mvision.inference.selection import Threshold
from mvision.machine import InferencePrecision
from mvision.model import Model
from mvision.structures import Instances

DESCRIPTION = "mvision"  # the metadata key of an exported file that holds the model's config
XML = "model.xml"  # in the folder of an OpenVINO export

Run = Callable[[np.ndarray], list[np.ndarray]]


def is_exported(source: str | Path) -> bool:
    """Whether a source of weights is an ONNX file or an OpenVINO folder."""
    path = Path(source)
    return path.suffix.lower() == ".onnx" or path.suffix.lower() == ".xml" or (path / XML).is_file()


def export_path(file: Path, format: str) -> Path:
    """The default path of a weights file's export; ``format`` is ``onnx``, ``openvino`` or ``openvino_int8``."""
    return file.with_suffix(".onnx") if format == "onnx" else file.with_name(f"{file.stem}_{format}")


class ExportedModel(nn.Module):
    """An exported model that predicts and is evaluated like a ``Model`` (see ``mvision.evaluation.Evaluated``).

    Args:
        path: an ONNX file, or a folder of OpenVINO.
        tasks: the tasks to run; None: all that the file has.
        precision: what OpenVINO computes in; ONNX Runtime has fp32 only on a CPU.

    Attributes:
        config: the description of the model, read from the file.

    Raises:
        UserError: no such file, a file of another program or without one of the tasks, or a missing package.
    """

    def __init__(
        self, path: str | Path, tasks: Sequence[str] | None = None, precision: InferencePrecision = "fp32"
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
        # For the post-processing of its heads, which needs no trained weights. It is built in 0.1 to 0.5 s.
        self._model = Model(config)
        del self._model.backbone, self._model.neck
        self.eval()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that the model performs."""
        return self._model.tasks

    @property
    def device(self) -> torch.device:
        """The device that images have to be on."""
        return torch.device("cpu")

    def head(self, task: str) -> Head:
        """As ``Model.head``; its weights are random."""
        return self._model.head(task)

    def evaluators(self, task: str) -> list[type[Metric]]:
        """As ``Model.evaluators``."""
        return self._model.evaluators(task)

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Raw outputs by task name, of (B, 3, H, W) uint8."""
        if images.dtype != torch.uint8:
            raise UserError(f"an exported model takes uint8 images, not {images.dtype}")
        outputs: dict[str, dict[str, Tensor]] = {}
        for (task, name), value in zip(self._outputs, self._run(images.cpu().contiguous().numpy())):
            if task in self.config.heads:
                outputs.setdefault(task, {})[name] = torch.from_numpy(np.asarray(value))
        return outputs

    def postprocess(
        self,
        outputs: dict[str, dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
        threshold: Threshold = 0.5,
        *,
        multi_label: bool = False,
        nms: float | None = None,
    ) -> list[Instances]:
        """As ``Model.postprocess``."""
        return self._model.postprocess(outputs, sizes, threshold, multi_label=multi_label, nms=nms)

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float = 0.0
    ) -> dict[str, list[Instances]]:
        """As ``Model.results``."""
        return self._model.results(outputs, sizes, threshold)


def exported_config(path: Path) -> ModelConfig:
    """The config in an exported file. Raises the same errors as ``ExportedModel``."""
    return _open(path, "fp32")[0]


def require(*packages: str) -> None:
    """Raise a UserError that says what to install if one of the packages is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is missing: pip install {package}")


@lru_cache(maxsize=1)
def openvino_core() -> Any:
    """The only ``openvino.Core`` of this process, never destroyed.

    On CPUs with AMX every ``Core`` replaces the stack of the process's signal handlers and restores the previous one
    when it is destroyed. If two are destroyed in the order in which they were created, the second restores a stack that
    was freed already, and the next signal (the end of a worker process) is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _open(path: Path, precision: InferencePrecision) -> tuple[ModelConfig, list[str], Run]:
    """The model's config, the names of its outputs, and the function that runs it (compiled at its first call)."""
    if not path.exists():
        raise UserError(f"weights {path}: no such file or folder")
    description, names, run = _open_onnx(path) if path.is_file() else _open_openvino(path, precision)
    config = parse_model_config(json.loads(description)["model"])
    config.backbone.pretrained = False  # the weights are in the file: nothing has to be downloaded
    return config, names, run


def _open_onnx(path: Path) -> tuple[str, list[str], Run]:
    require("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise UserError(f"weights {path}: ONNX Runtime cannot read it ({_first_line(error)})") from error
    description = session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
    if description is None:
        raise UserError(f"weights {path}: not exported by mvision (its metadata, with the classes, are missing)")
    names = [entry.name for entry in session.get_outputs()]

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(names, {"images": images})
        except Exception as error:
            raise UserError(f"{path}: does not run on images of shape {images.shape} ({_first_line(error)})") from error

    return description, names, run


def _open_openvino(path: Path, precision: InferencePrecision) -> tuple[str, list[str], Run]:
    require("openvino")
    core = openvino_core()
    try:
        model = core.read_model(path / XML)
    except RuntimeError as error:
        raise UserError(f"weights {path}: OpenVINO cannot read it ({_first_line(error)})") from error
    if not model.has_rt_info([DESCRIPTION]):
        raise UserError(f"weights {path}: not exported by mvision (its metadata, with the classes, are missing)")
    description = model.get_rt_info([DESCRIPTION]).astype(str)
    # Without the hint OpenVINO computes in bf16 on every CPU that has it.
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    names = [output.get_any_name() for output in model.outputs]

    # A model compiled for one input shape is a quarter faster than one for any shape, and a run has few shapes.
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

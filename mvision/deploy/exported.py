"""Exported models, run outside PyTorch, for prediction and evaluation as a ``Model`` is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from mvision.deploy.formats import ENDINGS, runtime_of
from mvision.deploy.output import restore
from mvision.deploy.sessions import BIN, XML, Description, Session, open_session
from mvision.errors import UserError
from mvision.machine import Precision, PrecisionOption, resolve_device
from mvision.model import Features, Model
from mvision.weights.stored import first_line, without_data

SLACK = 2**26  # numbers that a model can have besides those that its file has bytes for


def is_exported(source: str | Path) -> bool:
    """Whether a source of weights is a file of ONNX, ExecuTorch or LiteRT, or an OpenVINO folder."""
    path = Path(source)
    if runtime_of(path) is not None or path.suffix.lower() == ".xml":
        return True
    try:
        restore(path)
        return (path / XML).is_file()
    except (OSError, ValueError):  # a name that no file can have, or a folder without permission
        return False


def export_path(file: Path, format: str) -> Path:
    """The default path of a weights file's export; ``format`` is one of ``FORMATS``, or ``openvino_int8``."""
    return file.with_suffix(ENDINGS[format]) if format in ENDINGS else file.with_name(f"{file.stem}_{format}")


class ExportedModel(Model):
    """An exported model: it predicts and is evaluated like a ``Model``, and cannot be trained, fused, moved or saved.

    Args:
        path: a file of ONNX, ExecuTorch or LiteRT, or a folder of OpenVINO.
        tasks: the tasks to run, or the name of one; None: all that the file has.
        precision: what OpenVINO computes in; the others have fp32 only.

    Attributes:
        path: as given.
        session: the open graph, and what is described in the file.
        heads: for the post-processing; they have random weights.

    Raises:
        UserError: no such file, a file of another program or without one of the tasks, one whose description does not
            fit its graph, or a missing package.
    """

    def __init__(self, path: str | Path, tasks: Sequence[str] | None = None, precision: Precision = "fp32") -> None:
        path = Path(path)
        session = _open(path, precision)
        config = session.description.config
        tasks = [tasks] if isinstance(tasks, str) else tasks
        missing = [task for task in tasks or () if task not in config.heads]
        if missing:
            raise UserError(f"weights {path}: there is no head '{', '.join(missing)}', only {', '.join(config.heads)}")
        if tasks is not None:
            config = config.model_copy(update={"heads": {task: config.heads[task] for task in tasks}})
        try:
            described = without_data(lambda: Model(config)).eval()
        except Exception as error:  # constructors of timm's networks raise what they like
            reason = first_line(error)
            raise UserError(f"weights {path}: the model in its description cannot be built ({reason})") from error
        _check_graph(described, session, path)
        nn.Module.__init__(self)  # not Model's, which makes a backbone and a neck
        self.config = config
        # Post-processing uses tensors that the heads compute when they are built.
        self.heads = nn.ModuleDict({task: described.new_head(task, config.categories) for task in described.heads})
        self.takes_queries_of = described.takes_queries_of
        self.path, self.session = path, session
        self._process, self._arguments = os.getpid(), (path, tasks, precision)
        super().train(False)

    @property
    def device(self) -> torch.device:
        """The device that images have to be on."""
        return torch.device("cpu")

    @property
    def own_threads(self) -> bool:
        """Those of the runtime compute, not PyTorch's."""
        return True

    @property
    def files(self) -> list[Path]:
        """The graph, and the weights where they are in a file of their own."""
        return export_files(self.path)

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, dict[str, Tensor]]:
        """Raw outputs by task name, of (B, 3, H, W) uint8; any number of threads may call it at once."""
        if targets is not None:
            self._refuse("trained")
        if images.dtype != torch.uint8:
            raise UserError(f"an exported model takes uint8 images, not {images.dtype}")
        if os.getpid() != self._process:
            raise UserError(
                f"{self.path}: was opened in another process, and its threads do not exist in this one; open it here, "
                "or start processes with multiprocessing's 'spawn'"
            )
        outputs: dict[str, dict[str, Tensor]] = {}
        for output, value in zip(self.session.outputs, self.session.run(images.cpu().contiguous().numpy())):
            task, _, name = output.partition(".")
            if task in self.config.heads:
                outputs.setdefault(task, {})[name] = torch.from_numpy(np.asarray(value))
        return outputs

    def features(self, images: Tensor) -> Features:
        """Refused: the graph returns outputs alone."""
        self._refuse("asked for its features")

    def run_head(self, task: str, features: Features, targets: Any = None, **more: Any) -> Any:
        """Refused: the graph runs as a whole."""
        self._refuse("run in parts")

    def loss(self, outputs: dict[str, Any], targets: Any) -> dict[str, Tensor]:
        """Refused: training needs the weights in PyTorch."""
        self._refuse("trained")

    def fuse(self) -> Model:
        """Refused: it was fused before it was exported."""
        self._refuse("fused again")

    def train(self, mode: bool = True) -> Any:
        """Only ``train(False)``, which changes nothing."""
        if mode:
            self._refuse("trained")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Refused: the weights are in the graph."""
        self._refuse("saved as weights")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the weights are in the graph."""
        self._refuse("given other weights")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``cuda``, ``half`` and others call; only what would change nothing is accepted."""
        before = torch.zeros(1)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            self._refuse("moved or converted")
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or the model in another process, opens the file again."""
        return ExportedModel, self._arguments

    def _for_prediction(self, precision: PrecisionOption, device: str | torch.device | None) -> Model:
        """This model, as it was opened."""
        if device is not None and resolve_device(str(device)).type != "cpu":
            self._refuse(f"run on {device}")
        if precision not in ("auto", self._arguments[2]):
            self._refuse(f"run in {precision}: it was opened in {self._arguments[2]}")
        return self

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(
            f"{self.path}: an exported model only predicts, on the CPU, and cannot be {what}; use the weights that it "
            "was made from"
        )


def exported_description(path: Path) -> Description:
    """The description in an exported file. Raises the same errors as ``ExportedModel``."""
    return _open(path, "fp32").description


def _open(path: Path, precision: Precision) -> Session:
    if path.suffix.lower() == ".xml":
        if path.name != XML:
            raise UserError(f"weights {path}: exported OpenVINO models are called {XML}; name the folder that it is in")
        path = path.parent
    return open_session(path, precision)


def _check_graph(model: Model, session: Session, path: Path) -> None:
    """Compare the description with the graph and the size of the file, before memory is taken for the heads.

    Args:
        model: without data, except for networks that can be built with data only.

    Raises:
        UserError: the outputs have other names or shapes, or the heads are larger than the file.
    """
    numbers = sum(parameter.numel() for parameter in model.heads.parameters())
    size = sum(file.stat().st_size for file in export_files(path))
    if numbers > size + SLACK:
        raise UserError(
            f"weights {path}: its description asks for heads of {numbers:,} numbers, and the file has {size:,} bytes"
        )
    parameter = next(model.parameters())
    images = torch.zeros(1, 3, *model.config.image_size, dtype=torch.uint8, device=parameter.device)
    try:
        with torch.no_grad():
            outputs = model(images)
    except (NotImplementedError, RuntimeError):  # some operators of timm's networks need data
        return
    for task, values in outputs.items():
        for name, value in values.items():
            found = session.outputs.get(f"{task}.{name}")
            expected = tuple(value.shape)[1:]
            if found is None or len(found) != value.ndim:
                raise UserError(f"weights {path}: its graph has no output {task}.{name} as in its description")
            for side, wanted in zip(found[1:], expected):
                if side not in (None, wanted):
                    raise UserError(
                        f"weights {path}: its output {task}.{name} has shape {list(found)[1:]}, and the described "
                        f"model {list(expected)}"
                    )


def export_files(path: Path) -> list[Path]:
    """The files of an exported model: the graph, and the weights where they are in a file of their own."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.suffix.lower() == ".xml":
        return [file for file in (folder / XML, folder / BIN) if file.is_file()]
    return [path, *sorted(path.parent.glob(f"{path.name}.*data"))]

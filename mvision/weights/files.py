"""Saving a model in one file, loading it, and initialising a model from the weights of another one.

A weights file is a safetensors file whose header holds the whole ``ModelConfig``. A source of weights is one of these:
a run's folder, a ``.safetensors`` file that mvision wrote, a folder with a published model in Hugging Face's format,
the id of such a folder or file on the Hugging Face Hub, its address, the short name of a published model (``zoo``), or
the authors' own file of one of these (``originals``, ``paddle``). No code in a file is ever run.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import mvision
from mvision.backbone import Backbone
from mvision.config import ModelConfig, parse_model_config
from mvision.errors import UserError
from mvision.fast.copies import say
from mvision.heads import serving_task
from mvision.machine import resolve_device
from mvision.model import Model
from mvision.neck.layers import ConvNorm
from mvision.storage.atomic import whole_file
from mvision.storage.hub_model import Source
from mvision.storage.run_folder import BEST
from mvision.weights.readers import read_any, refuse_family
from mvision.weights.sources import PUBLISHED, described, fetch, tell_of_shadow
from mvision.weights.stored import (
    Stored,
    check_finite,
    check_fit,
    read_header,
    read_json,
    read_tensors,
    stored,
)
from mvision.weights.transfer import Transferred, transfer
from mvision.weights.zoo import could_be_name, suggestion

ORIGINALS = {".pth", ".pt", ".pdparams"}
PICKLES = {".bin", ".ckpt", ".pkl", ".pickle", ".tar"}
EXPORTS = {".onnx", ".xml", ".pte", ".tflite"}
SUFFIXES = {".safetensors", *ORIGINALS, *PICKLES, *EXPORTS}
FORMS = (
    "a run's folder, a .safetensors file, a folder with config.json and model.safetensors, a name from "
    "'mvision models', its authors' .pth or .pdparams file, or a Hub id"
)


@dataclass
class Weights:
    """The content of a source of weights.

    Attributes:
        tensors: by mvision's names, as in ``Model.state_dict()``.
        fused: whether the model was fused for inference (``Model.fuse``).
        notes: what a reader chose or left out, for the user to know; each is a part of a line.
        path: the file or folder that they were read from.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    fused: bool = False
    notes: list[str] = field(default_factory=list)
    path: Path | None = None


def save_weights(
    model: Model, path: str | Path, extra: dict[str, Any] | None = None, config: ModelConfig | None = None
) -> None:
    """Write the weights and, in the file's header, everything that is needed to build the model.

    Args:
        model: its weights are stored in their own precision.
        path: a ``.safetensors`` file; its folder is created.
        extra: anything that JSON can represent, such as the epoch and its metrics; stored in the header too.
        config: what the header says in place of the model's own config, such as one without the paths of a machine.

    Raises:
        UserError: the file cannot be written, or only a part of the model is fused; a file that was at ``path`` before
            is unchanged.
    """
    path = Path(path)
    header = {
        **(extra or {}),
        "version": mvision.__version__,
        "fused": _is_fused(model, path),
        "model": (config or model.config).model_dump(mode="json"),
    }
    # Copied, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "mvision": json.dumps(header)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: cannot be written ({error}); nothing was changed there") from error


def load(
    source: str | Path,
    tasks: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
) -> Model:
    """Build a model from a source of weights, in eval mode, and say what a reader chose or left out.

    Args:
        source: a run's folder, a ``.safetensors`` file, a folder in Hugging Face's format, a short name of the zoo, a
            Hub id, or a ``.pth`` or ``.pdparams`` file of the authors.
        tasks: the tasks that the model keeps, or the name of one; None keeps all.
        family: of a ``.pth`` file, see ``read_original``.

    Raises:
        UserError: no such source, no weights in it, damaged, or without one of the tasks; a device that cannot be used.
    """
    on = resolve_device(str(device))  # said before a large file is read
    weights = read_weights(source, family)
    if weights.notes:
        say(f"weights {source}: {'; '.join(weights.notes)}")
    model = built(weights, tasks, source)
    if weights.path is not None:
        model.source = Source(weights.path, None if Path(source).exists() else str(source))
    return model.to(on).eval()


def built(weights: Weights, tasks: Sequence[str] | None, source: str | Path) -> Model:
    """The model of weights that have been read; ``tasks`` and errors as in ``load``."""
    if tasks is not None:
        weights = _keep_tasks(weights, [tasks] if isinstance(tasks, str) else tasks, source)
    model = Model(weights.config)
    if weights.fused:
        model.fuse()
    if tasks is not None:
        # The head of a task that included another one can have more tensors than the other task's own head.
        names = model.state_dict().keys()
        weights.tensors = {name: tensor for name, tensor in weights.tensors.items() if name in names}
    model.load_state_dict(weights.tensors, strict=False)  # counters of batches may be missing, see ``check_fit``
    return model


def init_from(model: Model, source: str | Path, parts: Collection[str] | None = None, family: str | None = None) -> str:
    """Copy into a model all weights of a source that fit it, see ``mvision.weights.transfer``.

    Args:
        parts: only these parts of the model, ``backbone`` and ``neck``; None: all.
        family: of a ``.pth`` file, see ``read_original``.

    Returns:
        A text in one line: which parts were loaded, and which keep the weights that they had.

    Raises:
        UserError: no such source, nothing in it fits, or it was fused for inference.
    """
    return starting_from(source, parts, family)(model)


@dataclass
class Start:
    """The weights of a source, read, to be copied into a model.

    Attributes:
        source: as it was given.
        parts: of the model that are copied; None: all.
        transferred: what the last model took over.
    """

    source: str
    weights: Weights
    parts: Collection[str] | None = None
    transferred: Transferred | None = None

    def __call__(self, model: Model) -> str:
        """Copy all that fits; returns a line that says what did."""
        weights = self.weights
        self.transferred = transfer(model, weights.config, weights.tensors, self.source, self.parts)
        return f"weights {described(self.source)}: {'; '.join([*weights.notes, self.transferred.text])}"


def starting_from(source: str | Path, parts: Collection[str] | None = None, family: str | None = None) -> Start:
    """Read the weights of a source, to copy them into a model.

    Reading and copying raise the errors of ``init_from``, which does one after the other.
    """
    weights = read_weights(source, family)
    if weights.fused:
        raise UserError(
            f"weights {source}: fused for inference, so that no training can start from them; use the unfused weights"
        )
    return Start(str(source), weights, parts)


def read_weights(source: str | Path, family: str | None = None) -> Weights:
    """Config and tensors of any source.

    Args:
        family: of a ``.pth`` file, see ``read_original``.

    Raises:
        UserError: as ``load``: also where the tensors are not those of the model that the config describes, or have NaN
            or infinity in them.
    """
    path = resolve_weights(source)
    if _is_foreign(path):
        published = read_any(path, family)
        weights = Weights(published.config, published.tensors, notes=published.notes, path=path)
        check_fit(weights.config, False, {name: stored(tensor) for name, tensor in weights.tensors.items()}, path)
    else:
        refuse_family(path, family)
        config, fused, tensors = _describe(path)
        check_fit(config, fused, tensors, path)
        weights = Weights(config, read_tensors(path), fused, path=path)
    check_finite(weights.tensors, path)
    return weights


def read_config(source: str | Path, family: str | None = None) -> ModelConfig:
    """The config of any source; of a file of mvision only the header is read. Raises UserError as ``load``."""
    path = resolve_weights(source)
    if _is_foreign(path):
        return read_any(path, family).config
    refuse_family(path, family)
    return _describe(path)[0]


def _is_foreign(path: Path) -> bool:
    """Whether a resolved source was not written by mvision."""
    return path.is_dir() or path.suffix.lower() in ORIGINALS


def _describe(path: Path) -> tuple[ModelConfig, bool, dict[str, Stored]]:
    """What the header of a weights file says: the config, whether the model was fused, and the tensors."""
    header = read_header(path)
    described = _description(path, header.metadata)
    try:
        config = parse_model_config(described["model"])
    except UserError as error:
        raise UserError(f"weights {path}: {error}") from error
    config.backbone.forget_weights()  # the backbone's weights are in the file: nothing has to be downloaded
    return config, described.get("fused") is True, header.tensors


def resolve_weights(source: str | Path) -> Path:
    """The path of a source: mvision's own weights file, the authors' own, or a folder in Hugging Face's format.

    Raises:
        UserError: neither can be found, or the file's format can run code when it is opened.
    """
    path = Path(source)
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = 0
    except (OSError, ValueError) as error:  # a folder without permission, a name too long or with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"weights {_one_line(source)}: cannot be opened ({reason}); give {FORMS}") from error
    if kind:
        tell_of_shadow(str(source))
    if kind == stat.S_IFDIR:
        return _in_folder(path)
    if kind == stat.S_IFREG:
        return _own_file(path)
    if kind:
        raise UserError(f"weights {path}: not a file but a device, pipe or socket; give {FORMS}")
    if "://" in str(source) or path.suffix.lower() not in SUFFIXES:
        fetched = fetch(str(source))
        if fetched is not None:
            return _in_folder(fetched) if fetched.is_dir() else _own_file(fetched)
    unknown = "no such file or folder"
    if could_be_name(str(source)):
        unknown += ", and no published model has this name"
    near = f"{suggestion(str(source))} Else " if suggestion(str(source)) else ""
    raise UserError(f"weights {_one_line(source)}: {unknown}; {near}give {FORMS}")


def _own_file(path: Path) -> Path:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"weights {path}: {path.suffix} files can run code when opened and are never read; give {FORMS}"
        )
    if suffix in EXPORTS:
        raise UserError(f"weights {path}: an exported model, which only predicts; here give {FORMS}")
    return path.parent if path.name == PUBLISHED and _is_published(path.parent) else path


def _one_line(source: str | Path) -> str:
    return str(source).replace("\0", "\\0")[:300]


def _in_folder(folder: Path) -> Path:
    """The weights file in a run's folder, or the folder itself if it is in Hugging Face's format."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"weights {folder}: this folder cannot be read (permission denied)")
    for name in (BEST, PUBLISHED):
        if (folder / name).is_file():
            return folder if name == PUBLISHED and _is_published(folder) else folder / name
    # Not deeper than runs/TASK/N: any folder of the disk may have been named.
    nested = (file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(f"{depth}/{BEST}"))
    runs = sorted(nested, key=lambda file: file.stat().st_mtime)
    if runs:
        raise UserError(f"weights {folder}: there are several runs in it; name one, such as {runs[-1].parent}")
    if (folder / "config.yaml").is_file() or (folder / "last").is_dir():
        raise UserError(f"weights {folder}: this run has no {BEST} yet: it is written after the first evaluation")
    if (folder / "model.xml").is_file():
        raise UserError(f"weights {folder}: an OpenVINO export, which only predicts; here give {FORMS}")
    others = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    content = f"only {', '.join(others)}" if others else "no weights file"
    raise UserError(f"weights {folder}: there is {content} in this folder; give {FORMS}")


def _is_published(folder: Path) -> bool:
    """Whether a folder is in Hugging Face's format: ``model.safetensors``, not by mvision, and ``config.json``."""
    file = folder / PUBLISHED
    return (folder / "config.json").is_file() and file.is_file() and "mvision" not in read_header(file).metadata


def _description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The part of a file's header that ``save_weights`` wrote."""
    if "mvision" not in metadata:
        raise UserError(
            f"weights {path}: not written by mvision, and there is no config.json beside a {PUBLISHED}; give {FORMS}"
        )
    damaged = f"weights {path}: the description of the model in its header is damaged"
    described = read_json(metadata["mvision"], damaged)
    if not isinstance(described, dict):
        raise UserError(f"{damaged} (it is no JSON object)")
    return {"model": {}, **described}


def _keep_tasks(weights: Weights, tasks: Sequence[str], source: str | Path) -> Weights:
    """The weights of a model with these tasks alone.

    A task without a head of its own can need one without the task that includes it: the tensors of the head that served
    both are then renamed.
    """
    heads = weights.config.heads
    missing = [task for task in tasks if task not in heads]
    if missing:
        raise UserError(f"weights {source}: there is no head '{', '.join(missing)}', only {', '.join(heads)}")
    config = weights.config.model_copy(update={"heads": {task: heads[task] for task in tasks}})
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("heads.")}
    for task in tasks:
        old, new = f"heads.{serving_task(task, heads)}.", f"heads.{serving_task(task, tasks)}."
        tensors |= {
            new + name.removeprefix(old): tensor for name, tensor in weights.tensors.items() if name.startswith(old)
        }
    return Weights(config, tensors, weights.fused)


def _is_fused(model: Model, path: Path) -> bool:
    """Whether the whole model is fused. Raises a ``UserError`` if only a part of it is, which nobody could load."""
    if model.fused:
        return True
    parts = [name for name, part in model.named_children() if any(map(_was_fused, part.modules()))]
    if parts:
        raise UserError(
            f"weights {path}: not written, because only a part of this model is fused ({', '.join(parts)}): call "
            "model.fuse(), or load it again"
        )
    return False


def _was_fused(module: nn.Module) -> bool:
    if isinstance(module, Backbone):
        return module.fused
    return isinstance(module, ConvNorm) and isinstance(module.norm, nn.Identity)

"""Weights: saving a model so that one file is enough, loading it back, and starting a model from other weights.

A weights file is a safetensors file whose header holds the whole ``ModelConfig``. Everywhere a source of weights can be
named, these forms are understood: the folder of a run, a ``.safetensors`` file of ours, a folder in Hugging Face's
format of a published RT-DETR, and the id of either on the Hugging Face Hub. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mvision
from mvision.config import ModelConfig, parse_model_config
from mvision.errors import UserError
from mvision.heads import serving_task
from mvision.model import Model
from mvision.neck.layers import ConvNorm
from mvision.storage.atomic import whole_file
from mvision.storage.hub import cache_only_if_unreachable, download_problem
from mvision.weights.rtdetr import read_published
from mvision.weights.transfer import transfer

BEST = "best.safetensors"
PUBLISHED = "model.safetensors"
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar"}
FORMS = "a run's folder, a .safetensors file, a folder with config.json and model.safetensors, or a Hub id"


@dataclass
class Weights:
    """What a source holds: a model's description and its tensors, by our names."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    fused: bool = False


def save_weights(model: Model, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a file that is complete or not there: weights and, in the header, everything needed to build the model.

    Args:
        model: its weights are stored in their own precision.
        path: a ``.safetensors`` file; its folder is made.
        extra: anything that JSON can hold, stored beside the config (such as the epoch and its metrics).

    Raises:
        UserError: the file cannot be written; one that was there before is left as it was.
    """
    path = Path(path)
    described = {
        **(extra or {}),
        "version": mvision.__version__,
        "fused": _is_fused(model),
        "model": model.config.model_dump(mode="json"),
    }
    # Copies: safetensors refuses tensors that share memory, as views and tied weights do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "mvision": json.dumps(described)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: cannot be written ({error}); nothing was changed there") from error


def load(source: str | Path, tasks: Sequence[str] | None = None, device: str | torch.device = "cpu") -> Model:
    """The model that a source of weights describes, with its weights, in eval mode.

    Args:
        source: a run's folder, a ``.safetensors`` file of ours, a folder in Hugging Face's format, or a Hub id.
        tasks: the heads to keep; None keeps all.

    Raises:
        UserError: no such source, not a weights file, broken, or without one of the tasks.
    """
    weights = read_weights(source)
    config, tensors = weights.config, weights.tensors
    if tasks is not None:
        missing = [task for task in tasks if task not in config.heads]
        if missing or not tasks:
            raise UserError(
                f"weights {source}: there is no head '{', '.join(missing)}', only {', '.join(config.heads)}"
            )
        config = config.model_copy(update={"heads": {task: config.heads[task] for task in tasks}})
        tensors = _of_tasks(weights, tasks, source)
    model = Model(config)
    if tasks is not None:
        # A head that served two tasks has more than the one needs that is left.
        known = model.state_dict()
        tensors = {name: tensor for name, tensor in tensors.items() if name in known}
    if weights.fused:
        model.fuse()
    _fill(model, tensors, source)
    return model.to(device).eval()


def init_from(model: Model, source: str | Path, parts: Collection[str] | None = None) -> str:
    """Start a model from other weights: everything whose name and shape fit, classes by their names.

    ``parts``: only these of it, ``backbone`` or ``neck``.

    Returns:
        One line that says what was taken and what stays new.

    Raises:
        UserError: no such source, or nothing in it fits.
    """
    weights = read_weights(source)
    if weights.fused:
        raise UserError(
            f"weights {source}: fused for inference, no training can start from them; take the unfused ones"
        )
    return f"weights {source}: {transfer(model, weights.config, weights.tensors, str(source), parts)}"


def read_weights(source: str | Path) -> Weights:
    """Config and tensors of any source, without building a model."""
    path = resolve_weights(source)
    if path.is_dir():
        return Weights(*read_published(path))
    described = _header(path)
    try:
        config = parse_model_config(described["model"])
    except UserError as error:
        raise UserError(f"weights {path}: {error}") from error
    config.backbone.pretrained = False  # the weights are in the file: nothing is to be downloaded
    return Weights(config, _read(path), described.get("fused", False))


def resolve_weights(source: str | Path) -> Path:
    """The weights file of ours, or the folder in Hugging Face's format, that a source stands for.

    Raises:
        UserError: neither can be found, or it is a format that can run code when it is opened.
    """
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise UserError(
                f"weights {path}: {path.suffix} files can run code when opened and are never read; give {FORMS}"
            )
        return path.parent if _is_published(path.parent) and path.name == PUBLISHED else path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) and path.suffix.lower() not in {
        ".safetensors",
        *PICKLES,
    }:
        return _in_folder(_from_hub(str(source)))
    raise UserError(f"weights {source}: no such file or folder; give {FORMS}")


def _in_folder(folder: Path) -> Path:
    for name in (BEST, PUBLISHED):
        if (folder / name).is_file():
            return folder if name == PUBLISHED and _is_published(folder) else folder / name
    # Not deeper than runs/TASK/N: the folder may be anybody's.
    nested = (file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(f"{depth}/{BEST}"))
    runs = sorted(nested, key=lambda file: file.stat().st_mtime)
    if runs:
        raise UserError(f"weights {folder}: holds several runs; name one, such as {runs[-1].parent}")
    if (folder / "config.yaml").is_file() or (folder / "last").is_dir():
        raise UserError(f"weights {folder}: this run has no {BEST} yet: it is written after the first evaluation")
    others = sorted(file.name for file in folder.iterdir() if file.suffix in {".safetensors", *PICKLES})
    found = f"only {', '.join(others)}" if others else "no weights"
    raise UserError(f"weights {folder}: there is {found} in this folder; give {FORMS}")


def _is_published(folder: Path) -> bool:
    """Whether its ``model.safetensors`` is described by a ``config.json`` and not by its own header."""
    file = folder / PUBLISHED
    return (folder / "config.json").is_file() and file.is_file() and "mvision" not in _metadata(file)


def _from_hub(name: str) -> Path:
    """The local copy of a repository on the Hub: from the cache where it is complete there."""
    from huggingface_hub import snapshot_download

    files = ["config.json", "preprocessor_config.json", PUBLISHED, BEST]
    try:
        with cache_only_if_unreachable():
            return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the client has no common base for what networks, hosts, caches and disks can do
        raise UserError(
            f"weights {name}: no such file or folder here, and no download ({download_problem(error)}); on a machine "
            f"with network, download config.json and {PUBLISHED} of {name} into a folder, and give that folder's path"
        ) from error


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: not a safetensors file, or damaged ({error})") from error


def _header(path: Path) -> dict[str, Any]:
    """What ``save_weights`` wrote into the header."""
    metadata = _metadata(path)
    if "mvision" not in metadata:
        raise UserError(
            f"weights {path}: not written by mvision, and there is no config.json beside a {PUBLISHED}; give {FORMS}"
        )
    try:
        return {"model": {}, **json.loads(metadata["mvision"])}
    except (TypeError, ValueError) as error:
        raise UserError(f"weights {path}: the description of the model in its header is damaged ({error})") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: damaged ({error})") from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict that has to fit, apart from counters that frozen norms do not keep."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"weights {source}: do not fit the model that they describe: {problem}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    for kind, names in (("lack", missing), ("have an unknown", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"weights {source}: they {kind} {names[0]}{more}")


def _of_tasks(weights: Weights, tasks: Sequence[str], source: str | Path) -> dict[str, Tensor]:
    """The tensors of backbone, neck and the heads that serve these tasks, by their names without the rest."""
    kept = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("heads.")}
    for task in tasks:
        before, after = serving_task(task, weights.config.heads), serving_task(task, tasks)
        start = f"heads.{before}."
        kept |= {
            f"heads.{after}.{name.removeprefix(start)}": tensor
            for name, tensor in weights.tensors.items()
            if name.startswith(start)
        }
    return kept


def _is_fused(model: nn.Module) -> bool:
    return any(isinstance(module, ConvNorm) and isinstance(module.norm, nn.Identity) for module in model.modules())

"""The best thresholds of the classes in a weights file: they are known only once its weights have been evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from mvision.errors import UserError
from mvision.storage.atomic import whole_file
from mvision.weights.files import resolve_weights
from mvision.weights.stored import read_header, read_json, read_tensors

SUFFIX = ".safetensors"


def thresholds_file(source: str | Path) -> Path:
    """The file of a source of weights that thresholds can be written into.

    Raises:
        UserError: it is none that mvision wrote, or there is no such source.
    """
    path = resolve_weights(source)
    if path.is_dir() or path.suffix.lower() != SUFFIX or "mvision" not in read_header(path).metadata:
        raise UserError(
            f"weights {source}: thresholds can be written into a run's folder or a {SUFFIX} file of mvision alone; "
            "give those of a training"
        )
    return path


def write_thresholds(path: Path, thresholds: Mapping[str, Mapping[str, float]]) -> None:
    """Put the thresholds, by task and class, into the description of the model; all else stays as it is.

    Args:
        path: of ``thresholds_file``.

    Raises:
        UserError: the file cannot be read or written; it is then unchanged.
    """
    metadata = read_header(path).metadata
    described = read_json(metadata["mvision"], f"weights {path}: the description of the model in its header is damaged")
    described["model"]["thresholds"] = {**described["model"].get("thresholds", {}), **thresholds}
    tensors = read_tensors(path)
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, {**metadata, "mvision": json.dumps(described)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: the thresholds cannot be written ({error}); nothing was changed") from error

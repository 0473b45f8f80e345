"""What is checked of a safetensors file before memory is taken for a model: its header, and whether the tensors in it
are those of the model that it describes.

The header has names, types and shapes. A model of the same description is built on torch's ``meta`` device, where
tensors have shapes but no content, and compared with it. A description that asks for more than the file holds is
refused there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mvision.config import ModelConfig
from mvision.errors import UserError
from mvision.model import Model

MAX_HEADER = 32 * 2**20  # bytes; the description of a model with 100,000 classes takes 12 MB
T = TypeVar("T")
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


class Stored(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    is_floating: bool


class Header(NamedTuple):
    """``metadata``: texts by name; ``tensors``: shape and kind of every tensor."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Its tensors are not read.

    Raises:
        UserError: it cannot be opened, is damaged, of another format, or has a header of more than ``MAX_HEADER``.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not size:
            raise UserError(f"weights {path}: not a safetensors file, or damaged (it is empty)")
        if MAX_HEADER < length < size:
            raise UserError(f"weights {path}: its header takes {length:,} bytes, and {MAX_HEADER:,} are allowed")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            tensors = {
                name: Stored(tuple(part.get_shape()), part.get_dtype() in _FLOATING) for name, part in slices.items()
            }
            return Header(file.metadata() or {}, tensors)
    except OSError as error:
        raise UserError(f"weights {path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"weights {path}: not a safetensors file, or damaged ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises UserError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: damaged ({error})") from error


def digest(source: str | Path) -> str:
    """SHA-256 of a weights file (of a folder in Hugging Face's format: its file with the tensors)."""
    path = Path(source)
    with (path / "model.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored(tensor: Tensor) -> Stored:
    """Shape and kind of a tensor."""
    return Stored(tuple(tensor.shape), tensor.is_floating_point())


def read_json(text: str, where: str) -> Any:
    """Parse JSON that was not necessarily written by mvision.

    Args:
        where: begins the message of the error.

    Raises:
        UserError: it is not JSON, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} (nested too deeply)") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} ({error})") from error


def check_fit(config: ModelConfig, fused: bool, tensors: Mapping[str, Stored], source: str | Path) -> None:
    """Check that these are the tensors of the model that ``config`` describes, without taking memory for it.

    Counters of batches may be missing, as frozen norms have none.

    Args:
        fused: the model was fused for inference, see ``Model.fuse``.
        source: name of the weights in messages.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or has integers in place of real numbers or the other
            way round; or there is no such model.
    """
    expected = _expected(config, fused, source)
    missing = [name for name in expected if name not in tensors and not name.endswith("num_batches_tracked")]
    unknown = [name for name in tensors if name not in expected]
    for problem, names in (("a tensor is missing", missing), ("a tensor is unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"weights {source}: do not fit the model that they describe: {problem}: {names[0]}{more}")
    for name, found in tensors.items():
        wanted = stored(expected[name])
        if found != wanted:
            problem = "type" if found.shape == wanted.shape else "size"
            raise UserError(
                f"weights {source}: do not fit the model that they describe: {problem} mismatch for {name}: "
                f"{_described(found)} in the file, {_described(wanted)} in the model"
            )


def _expected(config: ModelConfig, fused: bool, source: str | Path) -> dict[str, Tensor]:
    """The state dict of the described model, without data."""

    def build() -> dict[str, Tensor]:
        model = Model(config)
        return (model.fuse() if fused else model).state_dict()

    try:
        return without_data(build)
    except Exception as error:  # constructors of timm's networks raise what they like
        reason = first_line(error)
        raise UserError(f"weights {source}: the model in its description cannot be built ({reason})") from error


def without_data(build: Callable[[], T]) -> T:
    """Call a function that builds a model, on the meta device: its tensors have shapes but take no memory."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError) as error:
        if "meta tensor" not in str(error):
            raise
        # A few networks of timm read numbers from tensors while they are built; they have to be built with data.
        return build()


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _described(tensor: Stored) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'one'} {'real numbers' if tensor.is_floating else 'integers'}"


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that have NaN or infinity in them."""
    # A sum is finite only if every term is, and costs a fifth of asking each of them. It can overflow, so ask then.
    return [
        name
        for name, tensor in tensors
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise a UserError that names the first tensor with NaN or infinity in it."""
    bad = not_finite(tensors.items())
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise UserError(
            f"weights {source}: not finite: {bad[0]}{more} contains NaN or infinity, so that nothing can be predicted "
            "or trained from it; use weights of an earlier epoch or of another run"
        )

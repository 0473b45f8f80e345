"""Reading tensors from a file of ``torch.save`` without running any code that is in it.

Such a file is a zip archive with a pickle, which names the tensors, and one member per tensor. A pickle can call any
function when it is opened. ``torch.load(weights_only=True)`` knows the few that tensors need and refuses all others.
What it does not look at is checked here: members that are compressed, and so can be of any size, and tensors that claim
more numbers than the file has.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mvision.errors import UserError

MAX_PICKLE = 32 * 2**20  # bytes; that of a model with 10,000 tensors takes 2 MB
MAX_MEMBERS = 200_000


def load_pickle(path: Path) -> Any:
    """What is in a file of ``torch.save``; its tensors are on the CPU and mapped from the file, not read yet.

    Raises:
        UserError: not such a file, damaged, too large, or a pickle that would run code.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(f"weights {path}: {_refused(error)}") from error
    except OSError as error:
        raise UserError(f"weights {path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"weights {path}: damaged, or not a file of torch.save ({reason[:200]})") from error
    except (EOFError, RecursionError, OverflowError, MemoryError, AssertionError) as error:
        raise UserError(f"weights {path}: damaged ({type(error).__name__} in its pickle)") from error


def _check_archive(path: Path) -> None:
    """Raise UserError unless the file is a zip archive whose members together are no larger than it is."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        empty = "it is empty" if not start else "it is no zip archive"
        raise UserError(
            f"weights {path}: not a file of torch.save, or damaged ({empty}); pickles of any other kind can run code "
            "when opened and are never read"
        )
    if not zipfile.is_zipfile(path):
        raise UserError(f"weights {path}: damaged: its end is missing, so it was not copied or downloaded to the end")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise UserError(f"weights {path}: {len(members):,} parts, and {MAX_MEMBERS:,} are allowed")
    compressed = next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise UserError(
            f"weights {path}: its part {compressed.filename[:100]!r} is compressed, as torch.save never does"
        )
    total, size = sum(member.file_size for member in members), path.stat().st_size
    if total > size:
        raise UserError(f"weights {path}: its parts claim {total:,} bytes, more than the {size:,} of the file")
    pickle = next((member for member in members if Path(member.filename).name == "data.pkl"), None)
    if pickle is not None and pickle.file_size > MAX_PICKLE:
        raise UserError(f"weights {path}: its pickle takes {pickle.file_size:,} bytes; {MAX_PICKLE:,} are allowed")


def _refused(error: Exception) -> str:
    """Why ``torch.load`` refused a pickle, in one line: its own message is a page on how to load it nevertheless."""
    called = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S{1,100})", str(error))
    if called:
        return f"it would run code when opened ({called[1]}), so it is not read"
    return "its pickle has more in it than tensors, or is damaged, so it is not read"


def state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint: the averaged ones (EMA) if there are any, else those of the model.

    Args:
        content: ``{"ema": {"module": tensors}}``, ``{"model": tensors}``, or the tensors, by name.

    Returns:
        The tensors, and a note if there were several to choose from.

    Raises:
        UserError: none of these, or an entry that is no tensor of numbers which the file holds.
    """
    notes = []
    if not isinstance(content, Mapping):
        raise UserError(f"weights {path}: holds a {type(content).__name__}, not tensors by their names")
    ema, model = content.get("ema"), content.get("model")
    averaged = ema.get("module") if isinstance(ema, Mapping) else None
    if isinstance(averaged, Mapping):
        content = averaged
        if isinstance(model, Mapping):
            notes.append("the averaged weights (EMA) were taken, not those of the last step")
    elif isinstance(model, Mapping):
        content = model
    if not content:
        raise UserError(f"weights {path}: there are no tensors in it")
    limit, total = path.stat().st_size, 0
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"weights {path}: {str(name)[:100]!r} is a {type(tensor).__name__}, not a tensor")
        size = tensor.numel() * tensor.element_size()
        if tensor.layout != torch.strided or tensor.is_quantized or size > tensor.untyped_storage().nbytes():
            raise UserError(f"weights {path}: the tensor {name[:100]!r} is of a kind that weights never are")
        total += size
        if total > 2 * limit:  # a few tensors can share their numbers
            raise UserError(f"weights {path}: its tensors claim more than the {limit:,} bytes of the file")
        tensors[name.removeprefix("module.")] = tensor.detach()
    return tensors, notes

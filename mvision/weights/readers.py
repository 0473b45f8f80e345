"""The reader of a published model, by its format: a folder as transformers writes it, or a file of its authors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mvision.errors import UserError
from mvision.weights.dfine import MODEL_TYPE, read_dfine
from mvision.weights.originals import read_original
from mvision.weights.published import Published, read_object
from mvision.weights.rtdetr import read_published

_READERS: dict[str, Callable[[Path], Published]] = {
    "rt_detr": read_published,
    "rt_detr_v2": read_published,
    MODEL_TYPE: read_dfine,
}
"""``model_type`` of config.json -> reader."""


def read_any(path: Path, family: str | None = None) -> Published:
    """The model of a folder with ``config.json`` and ``model.safetensors``, or of a ``.pth`` file.

    Args:
        family: see ``read_original``; of a folder its description says it.

    Raises:
        UserError: it cannot be read, or is of a kind that mvision does not have.
    """
    if not path.is_dir():
        return read_original(path, family)
    refuse_family(path, family)
    kind = read_object(path / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        known = ", ".join(_READERS)
        raise UserError(f"{path / 'config.json'}: model_type is {str(kind)[:100]!r}; {known} can be read")
    return _READERS[kind](path)


def refuse_family(path: Path, family: str | None) -> None:
    """Raise UserError if a family was given for weights that say themselves what they are."""
    if family is not None:
        raise UserError(
            f"--family {family}: for the authors' .pth files alone; {path} says itself what it is, so leave it out"
        )

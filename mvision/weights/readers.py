"""The reader of a published model, by its format: a folder as on the Hub, or a file of its authors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mvision.errors import UserError, did_you_mean
from mvision.storage.pickles import load_pickle, state_dict
from mvision.weights import edgecrafter, zoo
from mvision.weights.detrpose import FAMILY, is_detrpose, read_detrpose
from mvision.weights.dfine import MODEL_TYPE, read_dfine
from mvision.weights.originals import read_original
from mvision.weights.paddle import FAMILY as PADDLE
from mvision.weights.paddle import SUFFIX, read_paddle
from mvision.weights.published import Published, read_object
from mvision.weights.rtdetr import read_published

_READERS: dict[str, Callable[[Path], Published]] = {
    "rt_detr": read_published,
    "rt_detr_v2": read_published,
    MODEL_TYPE: read_dfine,
}
"""``model_type`` of config.json -> reader."""


def read_any(path: Path, family: str | None = None) -> Published:
    """The model of a folder with ``config.json`` and ``model.safetensors``, or of a ``.pth`` or ``.pdparams`` file.

    Args:
        family: of a file, a key of ``zoo.FAMILIES``: see ``read_original``; of a folder its description says it.

    Raises:
        UserError: it cannot be read, or is of a kind that mvision does not have.
    """
    if not path.is_dir():
        return _read_file(path, family)
    refuse_family(path, family)
    described = read_object(path / "config.json")
    if edgecrafter.is_description(described):
        return edgecrafter.read_folder(path)
    kind = described.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        known = ", ".join(_READERS)
        raise UserError(
            f"{path / 'config.json'}: model_type is {str(kind)[:100]!r}; {known}, and EdgeCrafter's models, which have "
            "none, can be read"
        )
    return _READERS[kind](path)


def _read_file(path: Path, family: str | None) -> Published:
    if family is not None and family not in zoo.FAMILIES:
        raise UserError(f"--family {family}: {did_you_mean(family, zoo.FAMILIES)}")
    if path.suffix.lower() == SUFFIX:
        _check_family(path, PADDLE, family)
        return read_paddle(path)
    loaded, notes = state_dict(load_pickle(path), path)
    told = FAMILY if is_detrpose(loaded) else edgecrafter.family_of(loaded)
    if told is None:
        return read_original(loaded, notes, path, family)
    _check_family(path, told, family)
    return read_detrpose(loaded, notes, path) if told == FAMILY else edgecrafter.read_edgecrafter(loaded, notes, path)


def _check_family(path: Path, told: str, given: str | None) -> None:
    """Raise UserError if a family that tensors tell is not the given one, or that of which the file has the name."""
    known = zoo.of_file(path.name)
    title = zoo.FAMILIES[told].title
    if given is not None and given != told:
        raise UserError(f"weights {path}: --family is {given}, but its tensors are those of {title}: leave it out")
    if known is not None and known.family != told:
        raise UserError(
            f"weights {path}: its name is that of {known.of.title}'s files, but its tensors are those of {title}; "
            "rename the file"
        )


def refuse_family(path: Path, family: str | None) -> None:
    """Raise UserError if a family was given for weights that say themselves what they are."""
    if family is not None:
        raise UserError(
            f"--family {family}: for the authors' .pth files alone; {path} says itself what it is, so leave it out"
        )

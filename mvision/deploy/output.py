"""Where an export is written: what it may replace, and how it gets there so that a kill leaves a whole one.

Only an earlier export is replaced, which is recognised by its content. The name of a folder or file says nothing: a
run's folder with all its weights was once given as ``--output``.
"""

from __future__ import annotations

import os
import re
import secrets
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mvision.deploy.formats import ENDINGS, NAMES, runtime_of
from mvision.deploy.mobile import read_description
from mvision.deploy.sessions import BIN, DESCRIPTION, XML
from mvision.errors import UserError
from mvision.storage.atomic import scratch_folder
from mvision.weights.files import SUFFIXES

_DATA = re.compile(r"\.[0-9a-f]{8}\.data")


def complete(output: Path, format: str) -> Path:
    """The path with the ending of its format: ``model`` becomes ``model.onnx`` or ``model.pte``.

    Raises:
        UserError: it has the ending of another kind of file, or is a folder where a file is needed.
    """
    if output.name in ("", ".."):  # "." and the like have no name of their own
        output = output.resolve()
    suffix = output.suffix.lower()
    ending = ENDINGS.get(format)
    if ending is not None:
        if suffix in SUFFIXES - {ending}:
            kind = f"{'a' if format == 'litert' else 'an'} {NAMES[format]} file"
            raise UserError(f"--output {output}: {kind} ends in {ending}; choose another name")
        if output.is_dir():
            raise UserError(f"--output {output}: is a folder; give a file, such as {output / f'model{ending}'}")
        return output if suffix == ending else output.with_name(f"{output.name}{ending}")
    if suffix in SUFFIXES:
        raise UserError(f"--output {output}: an OpenVINO export is a folder with two files; give the name of a folder")
    return output


def check_target(target: Path, format: str) -> None:
    """Refuse a target at which there is anything but an earlier export (or, for OpenVINO, an empty folder).

    Raises:
        UserError: one line that names what is there.
        OSError: it cannot be read.
    """
    if format in ENDINGS:
        if os.path.lexists(target) and not _is_own_file(target):
            raise UserError(f"--output {target}: is there already and no export of mvision; choose another name")
        return
    restore(target)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"--output {target}: is a file, and an OpenVINO export is a folder; choose another name")
    files = sorted(file.name for file in target.iterdir())
    if files and not _is_own_folder(target):
        others = [name for name in files if name not in (XML, BIN)] or files
        raise UserError(
            f"--output {target}: this folder holds something else than an earlier export ({others[0]}"
            f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}); choose another"
        )


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Errors of the disk inside this block become a UserError that names ``--output``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror or error}); choose another") from error


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yields a new folder beside the target to write the export in; it is removed at the end. Raises UserError."""
    with ExitStack() as stack:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch_folder(target))
        yield folder


def place(fresh: Path, target: Path) -> list[Path]:
    """Move a finished export to its target; returns its files or its folder there.

    After a kill at any moment either the earlier or the new export is there, as a whole: at the target, or for a folder
    under the name from which ``restore`` brings it back.

    Args:
        fresh: a folder, or a file; that of ONNX can have a second file with the weights beside it. It lies in a scratch
            folder, to which the earlier folder is moved.
    """
    if fresh.is_dir():
        for file in fresh.iterdir():
            _flush(file)
        _replace_folder(fresh, target)
        return [target]
    # The second file has a name that no earlier export has, so that the earlier graph never reads the new weights.
    earlier = {target.with_name(name) for name in _second_files(target)}
    data = [file.replace(target.with_name(file.name)) for file in _data_files(fresh)]
    _flush(fresh, *data)
    fresh.replace(target)
    for file in {*earlier, *_data_files(target)} - set(data):
        file.unlink(missing_ok=True)
    return [target, *data]


def data_name(file: Path) -> str:
    """A new name for the second file of a large ONNX model, which holds its weights."""
    return f"{file.name}.{secrets.token_hex(4)}.data"


def _data_files(path: Path) -> list[Path]:
    """The second files beside an ONNX file: that of the model, and what was left by exports that were killed."""
    return sorted(file for file in path.parent.iterdir() if _DATA.fullmatch(file.name.partition(path.name)[2]))


def restore(target: Path) -> None:
    """Bring back a folder that a kill has left under its second name, see ``place``."""
    old = _second_name(target)
    if old.is_dir() and not os.path.lexists(target):
        old.replace(target)


def _replace_folder(fresh: Path, target: Path) -> None:
    old = _second_name(target)
    _move_away(old, fresh.parent)
    if os.path.lexists(target):
        target.replace(old)
    fresh.replace(target)
    _move_away(old, fresh.parent)


def _second_name(target: Path) -> Path:
    return target.parent / f".{target.name}.earlier"


def _move_away(old: Path, scratch: Path) -> None:
    """Move an earlier export, and nothing else that may be there, into a folder that will be removed.

    It is not removed here: a kill would leave half of it, which nobody knows for an export.
    """
    if old.is_dir() and (_is_own_folder(old) or not any(old.iterdir())):
        old.replace(scratch / secrets.token_hex(4))


def _flush(*files: Path) -> None:
    """Wait until files are on the disk: a rename can be there before the content of what it renames."""
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _is_own_folder(folder: Path) -> bool:
    """Whether a folder holds exactly the files of an OpenVINO export that mvision wrote."""
    if {file.name for file in folder.iterdir()} != {XML, BIN} or not all(file.is_file() for file in folder.iterdir()):
        return False
    try:
        root = ElementTree.parse(folder / XML).getroot()
    except ElementTree.ParseError:
        return False
    return root.find(f"rt_info/{DESCRIPTION}") is not None


def _is_own_file(file: Path) -> bool:
    """Whether a file is an exported model that mvision wrote."""
    if runtime_of(file) is not None and not _is_onnx(file):
        return file.is_file() and read_description(file) is not None
    model = _read_graph(file)
    return model is not None and any(entry.key == DESCRIPTION for entry in model.metadata_props)


def _is_onnx(file: Path) -> bool:
    return file.suffix.lower() == ENDINGS["onnx"]


def _second_files(file: Path) -> set[str]:
    """The names of the files beside an ONNX model from which it reads its weights."""
    model = _read_graph(file)
    tensors = model.graph.initializer if model is not None else []
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return {name for name in names if name.startswith(file.name) and Path(name).name == name}


def _read_graph(file: Path) -> Any:
    """The content of an ONNX file without its second file; None if it is none."""
    if not _is_onnx(file) or not file.is_file():
        return None  # a device, a pipe, or a link that leads nowhere
    import onnx

    try:
        return onnx.load(file, load_external_data=False)
    except Exception:  # noqa: BLE001  # errors of protobuf and onnx have no common base; it is no export in any case
        return None

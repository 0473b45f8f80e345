"""Writing files so that a reader finds the whole new file or the whole old one, also after an error or a kill."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

MAX_NAME = 255
"""Bytes of a file's name on the usual file systems."""
PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; at the end of the block that file replaces the one at ``path``.

    The temporary file is hidden and lies in the same folder. It is created new and under a name that nobody can guess,
    so a link that someone has put there is never written through. It is flushed to the disk before it is renamed, and
    removed if the block raises. Where ``path`` is a link, the link is replaced and the file that it names stays as it
    was.

    Raises:
        OSError: the file cannot be written, or there is a folder or a device at ``path``; a file that was at ``path``
            before is unchanged.
    """
    if path.exists() and not path.is_file() and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, "is there and is not a file", str(path))
    temporary = path.with_name(_partial_name(path.name))
    try:
        # Without O_NOFOLLOW (Windows) O_EXCL still refuses a name that is taken.
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        os.close(os.open(temporary, flags, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 by ``whole_file``."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yields a new, hidden folder beside ``target`` in which something is made before it is moved there.

    It is removed at the end of the block; what killed processes have left there is removed at the beginning.

    Raises:
        OSError: the folder cannot be created.
    """
    remove_partial_files(target.parent)
    folder = target.with_name(_partial_name(target.name))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_partial_files(folder: Path, *, all_of_them: bool = False) -> int:
    """Remove what killed processes have left of ``whole_file`` and ``scratch_folder`` in a folder (not deeper inside).

    Only files of processes of this machine that have ended are removed: what another machine or container writes
    through a network disk cannot be told from a file that was left.

    Args:
        all_of_them: the caller knows that no other process writes into this folder, so nothing is in use. The files
            that safetensors writes on its own beside the one that it was given are removed as well.

    Returns:
        How many files and folders were removed.
    """
    removed = 0
    for file in folder.iterdir() if folder.is_dir() else ():
        match = _PARTIAL_NAME.fullmatch(file.name)
        left = match and match["place"] == _place() and not _is_running(int(match["process"]))
        if left or (all_of_them and (match or _OF_SAFETENSORS.fullmatch(file.name))):
            with suppress(OSError):  # another process was faster, or may and we may not
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
                removed += 1
    return removed


_PARTIAL_NAME = re.compile(r"\..+\.(?P<place>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{12}\.partial", re.DOTALL)

_OF_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # of its version 0.8; names do not tell which process writes them


def _partial_name(name: str) -> str:
    """A hidden name that tells which process of which machine writes the file; short enough for any file system."""
    end = f".{_place()}-{os.getpid()}-{secrets.token_hex(6)}{PARTIAL}"
    if len(os.fsencode(name)) + len(end) + 1 > MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}{end}"


@cache
def _place() -> str:
    """Eight digits for what numbers the processes: the machine, and on Linux the container in it."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end the process on Windows; the file stays
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True

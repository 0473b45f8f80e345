"""Files that are complete or not there: written under a hidden name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place at the end of the block, or vanishes after an error.

    The block writes a file there; it is on the disk before it gets its name. The temporary name is hidden, and no other
    process uses it.

    Raises:
        OSError: the file cannot be written; one that was at ``path`` before is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small text file, complete or not there."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

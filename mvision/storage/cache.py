"""The folder for files that are made once and used by every later run."""

from __future__ import annotations

import os
from pathlib import Path

from mvision.errors import UserError


def cache_dir() -> Path:
    """``$MVISION_CACHE``, or ``~/.cache/mvision``."""
    if folder := os.environ.get("MVISION_CACHE"):
        return Path(folder).expanduser()
    try:
        return Path.home() / ".cache" / "mvision"
    except RuntimeError as error:
        raise UserError(
            "No home folder to keep the built-in data set in: set MVISION_CACHE to a writable folder."
        ) from error

"""Folders and files behind URLs (``s3://``, ``gs://``, ...), through fsspec and the package that it wants for each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mvision.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def scheme_of(text: str) -> str:
    """The scheme of a URL in lower case; empty for a path."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else ""


def open_url(url: str, what: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Keys, regions and endpoints come from where the package of the file system looks for them: environment variables
    such as ``AWS_PROFILE`` and ``AWS_ENDPOINT_URL``, its configuration files, and fsspec's own.

    Args:
        url: of a file or a folder.
        what: the argument that it was given as, such as ``source``; errors begin with it.

    Raises:
        UserError: a scheme that fsspec does not know, or whose package is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = scheme_of(url)
    try:
        file_system, path = url_to_fs(url)
    except ImportError as error:
        package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
        cure = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise UserError(f"{what} {url}: the package for {scheme}:// is missing: {cure}") from error
    except Exception as error:  # the constructors of file systems raise what they like
        if scheme not in known_implementations:
            common = ("s3", "gs", "gcs", "az", "abfs", "hdfs", "sftp", "file", "memory", "http", "https")
            raise UserError(f"{what} {url}: unknown scheme '{scheme}': {did_you_mean(scheme, common)}") from error
        raise UserError(f"{what} {url}: cannot be opened ({reason_of(error)})") from error
    return file_system, str(path)


@contextmanager
def remote_errors(what: str, url: str) -> Iterator[None]:
    """Errors of a file system inside this block become one line: each package raises classes of its own.

    Raises:
        UserError: any error but one that is a ``UserError`` already.
    """
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{what} {url}: no permission ({reason_of(error)})") from error
    except FileNotFoundError as error:
        raise UserError(f"{what} {url}: not there ({reason_of(error)})") from error
    except Exception as error:
        raise UserError(f"{what} {url}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The message of an error as one line, with its class where it has none."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__

"""Downloading one file over https: with a progress bar, limits and a checksum, and never half of it."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from mvision.errors import UserError
from mvision.storage.atomic import whole_file

MAX_BYTES = 8 * 2**30
"""No download of weights may be larger."""
TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 2**20  # bytes


def download_file(url: str, target: Path, say: Callable[[str], None] = print, sha256: str | None = None) -> Path:
    """Download a file, unless it is there already; returns ``target``.

    Proxies of the environment are honoured. Redirections stay within https. An interrupted download starts anew.

    Args:
        url: https. A name and a password in it, and what follows ``?``, are not shown.
        target: where the file appears as a whole; its folder is created.
        say: is called with a line before the download: its size and where it goes.
        sha256: what the file has to have, in hexadecimal digits.

    Raises:
        UserError: another scheme, no answer, a web page in place of a file, too large, cut off, another checksum, or
            ``target`` cannot be written. Nothing is left at ``target`` then.
    """
    if target.is_file():
        return target
    shown = shown_url(url)
    if urlsplit(url).scheme != "https":
        raise UserError(
            f"weights {shown}: files are downloaded over https only; download it yourself, and give its path"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open(url) as answer, whole_file(target) as temporary:
            size = _size(answer, shown)
            say(f"downloading {shown}: {'unknown size' if size is None else megabytes(size)}, into {target.parent}")
            received, found = _copy(answer, temporary, size, shown)
            if size is not None and received != size:
                raise UserError(f"weights {shown}: cut off after {received} of {size} bytes; try again")
            if sha256 is not None and found != sha256:
                raise UserError(f"weights {shown}: another file than expected (SHA-256 {found}, not {sha256})")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            f"weights {shown}: cannot be downloaded ({' '.join(str(reason).split())[:120]}); on a machine with network "
            f"download the file, and give its path or save it as {target}"
        ) from error
    return target


def shown_url(url: str) -> str:
    """A URL for a message: without name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


def megabytes(size: int) -> str:
    """A size for a message: ``41.5 MB``."""
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _open(url: str) -> Any:
    request = urllib.request.Request(quote(url, safe="%/:=&?~+!$,;'@()*[]#"), headers={"User-Agent": "mvision"})
    return _opener().open(request, timeout=TIMEOUT)


def _opener() -> urllib.request.OpenerDirector:
    """Opens https and nothing else: urllib's usual opener would follow a redirection to http or ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _size(answer: Any, shown: str) -> int | None:
    """Bytes that are to come; None where the host does not say it."""
    if answer.headers.get_content_type() == "text/html":
        raise UserError(
            f"weights {shown}: a web page, not a file of weights; open it in a browser, download the file, and give "
            "its path"
        )
    length = answer.headers.get("Content-Length")
    size = int(length) if length is not None and length.isdecimal() else None
    _check_size(size or 0, shown)
    return size


def _check_size(size: int, shown: str) -> None:
    if size > MAX_BYTES:
        raise UserError(f"weights {shown}: {megabytes(size)} or more to download; {megabytes(MAX_BYTES)} is the limit")


def _copy(answer: Any, path: Path, size: int | None, shown: str) -> tuple[int, str]:
    """Write what comes; returns the number of bytes and their SHA-256."""
    from tqdm import tqdm

    received, found = 0, hashlib.sha256()
    name = Path(urlsplit(shown).path).name
    with path.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=name[:40], leave=False) as progress:
        while chunk := answer.read(_CHUNK):
            received += len(chunk)
            _check_size(received, shown)
            found.update(chunk)
            file.write(chunk)
            progress.update(len(chunk))
    return received, found.hexdigest()

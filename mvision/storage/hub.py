"""Downloads from the Hugging Face Hub fail at once where there is no network, not after a minute of retries."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from mvision.compat import hub_offline_unless


@contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Inside this context the Hub's client reads its local cache only, unless the Hub can be reached.

    The client repeats every failed request several times and prints each attempt; here one connection is tried.
    """
    with hub_offline_unless(_reachable):
        yield


def download_problem(error: Exception) -> str:
    """Why a download failed, in a few words for an error message."""
    from huggingface_hub.utils import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "not in the cache, and the Hub cannot be reached"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository on the Hub, or it is not public"
    return " ".join(str(error).split())[:120] or type(error).__name__


def _reachable(url: str, timeout: float = 5.0) -> bool:
    """Whether a connection to the host of ``url`` can be opened within ``timeout`` seconds."""
    address = urlsplit(url)
    if getproxies().get(address.scheme):
        return True  # the proxy resolves names and connects, which this machine may be unable to do itself
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=timeout):
            return True
    except OSError:
        return False

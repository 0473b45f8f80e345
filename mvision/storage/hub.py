"""Downloads from the Hugging Face Hub that fail at once, not after a minute of retries, where there is no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Inside this context the Hub's client works from the local cache alone, unless the Hub answers.

    The client repeats every failed request several times and prints each attempt; one connection tells the same.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def why_not(error: Exception) -> str:
    """What a failed download means, in a few words."""
    from huggingface_hub.utils import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "not in the cache, and the Hub cannot be reached"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository on the Hub, or it is not public"
    return " ".join(str(error).split())[:120] or type(error).__name__


def _reachable(url: str, timeout: float = 5.0) -> bool:
    address = urlsplit(url)
    if getproxies().get(address.scheme):
        return True  # the proxy looks up and connects, this machine may not be able to
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=timeout):
            return True
    except OSError:
        return False

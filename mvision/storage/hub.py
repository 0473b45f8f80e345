"""Downloads from the Hugging Face Hub: named before they start, checked after, given up at once without a network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from mvision.compat import hub_offline_unless
from mvision.errors import UserError
from mvision.storage.download import MAX_BYTES, megabytes, sha256_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


def download_repository(
    name: str,
    files: Sequence[str],
    is_complete: Callable[[Path], bool],
    revision: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """The folder with files of a repository, downloaded by the Hub's client or from its cache.

    A pinned revision that is in the cache is taken without asking the Hub. The client resumes a download that was
    interrupted, shows its progress, and honours proxies and ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN``.

    Args:
        files: names of the files that are wanted; those that the repository does not have are left out.
        is_complete: whether a folder has all that is needed.
        revision: a commit; None: the newest.
        say: is called once with a line before a download: its commit, its size and where it goes.

    Raises:
        UserError: it is too large, or damaged on arrival, and has been removed then.
        Exception: anything of the network, the Hub, the cache and the disk; see ``download_problem``.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    cached = _cached(name, files, revision, is_complete)
    if revision is not None and cached is not None:
        return cached
    with cache_only_if_unreachable():
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        except Exception:  # errors of network and Hub have no common base class
            if cached is None:
                raise
            return cached
        return _download(name, info, files, say)


def _download(name: str, info: ModelInfo, files: Sequence[str], say: Callable[[str], None]) -> Path:
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    wanted = [file for file in info.siblings or [] if file.rfilename in files]
    new = [
        file
        for file in wanted
        if not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    ]  # fmt: skip
    size = sum(file.size or 0 for file in new)
    if size > MAX_BYTES:
        raise UserError(f"weights {name}: {megabytes(size)} to download, and {megabytes(MAX_BYTES)} is the limit")
    if new:
        at = f"{constants.ENDPOINT}/{name} at {info.sha}"
        say(f"downloading {at}: {megabytes(size)}, into {constants.HF_HUB_CACHE}")
    folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=list(files)))
    for file in new:
        _verify(name, folder / file.rfilename, file)
    return folder


def _verify(name: str, path: Path, file: RepoSibling) -> None:
    """Compare a file with the checksum that the Hub has of it; one that differs is removed from the cache."""
    if file.lfs is None:  # small files are part of the commit itself
        return
    found = sha256_of(path)
    if found != file.lfs.sha256:
        for link in {path, Path(os.path.realpath(path))}:
            link.unlink(missing_ok=True)
        raise UserError(
            f"weights {name}: {file.rfilename} was damaged on the way (SHA-256 {found}, and the Hub has "
            f"{file.lfs.sha256}) and has been removed; try again"
        )


def _cached(
    name: str, files: Sequence[str], revision: str | None, is_complete: Callable[[Path], bool]
) -> Path | None:  # fmt: skip
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if is_complete(folder) else None


def cached_commit(name: str) -> str | None:
    """The commit of a repository that was downloaded last; None if there is none in the cache."""
    folder = _cached(name, (), None, lambda folder: True)
    return folder.name if folder is not None else None


@contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Inside this context the Hub's client reads its local cache only, unless the Hub can be reached.

    The client repeats every failed request several times and prints each attempt; here one connection is tried.
    """
    with hub_offline_unless(_reachable):
        yield


def download_problem(error: Exception) -> str:
    """Why a download failed, in a few words for an error message."""
    from huggingface_hub.utils import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "not in the cache, and the Hub cannot be reached"
    if isinstance(error, GatedRepoError):
        return "its owners ask for an agreement on the Hub first; then log in with 'hf auth login'"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository on the Hub, or it is not public"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub no longer has this revision"
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

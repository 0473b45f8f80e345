"""Downloads from the Hugging Face Hub: named before they start, checked after, given up at once without a network."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from mvision.compat import hub_offline_unless
from mvision.errors import UserError
from mvision.storage.download import MAX_BYTES, megabytes, sha256_of

_COMMIT = re.compile("[0-9a-f]{40}")

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


class Access(NamedTuple):
    """How a repository is read, by the names of ``snapshot_download``; see there."""

    token: str | bool | None = None
    cache_dir: str | None = None
    force_download: bool = False
    local_files_only: bool = False

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, as keyword arguments."""
        return {name: value for name, value in self._asdict().items() if value != Access._field_defaults[name]}

    @property
    def cache(self) -> dict[str, Any]:
        """The cache folder, as keyword arguments of functions that read nothing but it."""
        return {} if self.cache_dir is None else {"cache_dir": self.cache_dir}


EVERYBODY = Access()


def download_repository(
    name: str,
    files: Sequence[str],
    is_complete: Callable[[Path], bool],
    revision: str | None = None,
    say: Callable[[str], None] = print,
    access: Access = EVERYBODY,
) -> Path:
    """The folder with files of a repository, downloaded by the Hub's client or from its cache.

    A commit that is in the cache is taken without asking the Hub. The client resumes a download that was
    interrupted, shows its progress, and honours proxies and ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN``.

    Args:
        files: names of the files that are wanted; those that the repository does not have are left out.
        is_complete: whether a folder has all that is needed.
        revision: a commit, a branch or a tag; None: the newest of ``main``.
        say: is called once with a line before a download: its commit, its size and where it goes.
        access: the token, the cache folder, and what the cache is used for.

    Raises:
        UserError: it is too large, or damaged on arrival, and has been removed then.
        Exception: anything of the network, the Hub, the cache and the disk; see ``download_problem``.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import RevisionNotFoundError

    cached = None if access.force_download else _cached(name, files, revision, is_complete, access)
    if revision is not None and _COMMIT.fullmatch(revision) and cached is not None:
        return cached
    with cache_only_if_unreachable():
        if constants.HF_HUB_OFFLINE or access.local_files_only:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), **access.given()))
        try:
            api = HfApi() if access.token is None else HfApi(token=access.token)
            info = api.model_info(name, revision=revision, files_metadata=True)
        except RevisionNotFoundError:  # a branch that is gone: a copy of it in the cache is not what was asked for
            raise
        except Exception:  # errors of network and Hub have no common base class
            if cached is None:
                raise
            return cached
        return _download(name, info, revision, files, say, access)


def _download(
    name: str,
    info: ModelInfo,
    revision: str | None,
    files: Sequence[str],
    say: Callable[[str], None],
    access: Access,
) -> Path:
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    wanted = [file for file in info.siblings or [] if file.rfilename in files]
    new = [
        file
        for file in wanted
        if access.force_download
        or not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha, **access.cache), str)
    ]  # fmt: skip
    size = sum(file.size or 0 for file in new)
    if size > MAX_BYTES:
        raise UserError(f"weights {name}: {megabytes(size)} to download, and {megabytes(MAX_BYTES)} is the limit")
    if new:
        at = f"{constants.ENDPOINT}/{name} at {info.sha}"
        say(f"downloading {at}: {megabytes(size)}, into {access.cache_dir or constants.HF_HUB_CACHE}")
    # By the name of the branch: the client then notes the commit in its cache, where it is found without a network.
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files), **access.given()))
    if folder.name != info.sha and info.sha is not None and revision != info.sha:
        raise UserError(f"weights {name}: {revision or 'main'} has changed while it was downloaded; try again")
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
    name: str,
    files: Sequence[str],
    revision: str | None,
    is_complete: Callable[[Path], bool],
    access: Access = EVERYBODY,
) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(files), local_files_only=True, **access.cache
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if is_complete(folder) else None


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a repository, or of its branch or tag, that was downloaded last; None: none is in the cache."""
    folder = _cached(name, (), revision, lambda folder: True)
    return folder.name if folder is not None else None


@contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Inside this context the Hub's client reads its local cache only, unless the Hub can be reached.

    The client repeats every failed request several times and prints each attempt; here one connection is tried.
    """
    with hub_offline_unless(_reachable):
        yield


def hub_is_reachable() -> bool:
    """Whether a connection to the Hub, or to the mirror that the environment names, can be opened."""
    from huggingface_hub import constants

    return _reachable(constants.ENDPOINT)


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

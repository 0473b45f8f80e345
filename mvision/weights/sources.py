"""Weights that are not on this machine yet: by a short name of the zoo, by a Hub id, or by an address on the web."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

from mvision.errors import UserError
from mvision.fast.copies import say
from mvision.storage.download import download_file, sha256_of, shown_url
from mvision.storage.hub import EVERYBODY, Access, cached_commit, download_problem, download_repository
from mvision.storage.run_folder import BEST
from mvision.weights import zoo

PUBLISHED = "model.safetensors"
FILES = ("config.json", "preprocessor_config.json", PUBLISHED, BEST)
"""What is downloaded from a repository of the Hub: nothing that could run code."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_AT_REVISION = re.compile(rf"({_HUB_ID.pattern})(?:@([\w.][\w./-]*))?")


def fetch(source: str) -> Path | None:
    """The file or folder that a source stands for which is not on the disk, downloaded where necessary.

    Args:
        source: a short name of the zoo, a Hub id (``user/name``, or ``user/name@revision`` for a branch, a tag or a
            commit), the address of a repository of the Hub, or that of a file (https).

    Returns:
        None: it is none of these.

    Raises:
        UserError: it cannot be had, with the way to get it by hand.
    """
    if source in zoo.MODELS:
        return _from_zoo(zoo.MODELS[source])
    if re.match(r"\w+://", source):
        return _from_web(source)
    repository = _AT_REVISION.fullmatch(source)
    return fetch_repository(repository[1], repository[2]) if repository else None


def tell_of_shadow(source: str) -> None:
    """Say that a file or folder on the disk is taken, where a published model has that name too."""
    if source in zoo.MODELS:
        say(f"weights {source}: the file or folder of this name here, not the published model")


def described(source: str) -> str:
    """A source that has been read, for messages and records: with the repository, the commit and the licence."""
    model = zoo.MODELS.get(source)
    named = _AT_REVISION.fullmatch(source)
    if Path(source).exists() or not (model or named):
        return source
    if model is not None and (copy := zoo.own_copy(model)):
        return f"{source} ({copy}, {model.licence})"
    name, revision = named.groups() if named else (source, None)
    repository = model.hub if model is not None and model.hub else name
    commit = (model and model.revision) or cached_commit(repository, revision)
    facts = [repository if model else "", f"commit {commit}" if commit else "", model.licence if model else ""]
    known = ", ".join(filter(None, facts))
    return f"{source} ({known})" if known else source


def origin(source: str | None) -> str | None:
    """What the record of a run says about the weights that it started from: None of those that lay on the disk."""
    return None if source is None or Path(source).exists() else described(source)


def _from_zoo(model: zoo.ZooModel) -> Path:
    path = zoo.own_copy(model)
    if path is None and model.hub is None and model.is_download:
        assert model.url is not None
        return _from_web(model.url)
    if path is None and model.hub is None:
        raise UserError(
            f"weights {model.name}: {model.of.title} is not where mvision could download it; {zoo.by_hand(model)}"
        )
    if path is None:
        assert model.hub is not None
        try:
            path = download_repository(model.hub, FILES, _is_complete, model.revision, say)
        except UserError:
            raise
        except Exception as error:  # errors of network, host, cache and disk have no common base class
            raise UserError(
                f"weights {model.name}: no download of {model.hub} ({download_problem(error)}); {zoo.by_hand(model)}"
            ) from error
    if model.sha256 is not None and path.is_dir():
        found = sha256_of(path / PUBLISHED)
        if found != model.sha256:
            raise UserError(
                f"weights {model.name}: {path / PUBLISHED} is not the published file (SHA-256 {found}, not "
                f"{model.sha256}); remove it to download it again, or give its path as --weights if you trust it"
            )
    return path


def hub_id(source: str) -> str | None:
    """The repository of the Hub that a text names, without its revision; None: it is no such name."""
    named = _AT_REVISION.fullmatch(source)
    return named[1] if named else None


def is_repository(source: str) -> bool:
    """Whether a source can only be a repository of the Hub: an id with or without a revision, and no file or folder."""
    return not Path(source).exists() and source not in zoo.MODELS and bool(_AT_REVISION.fullmatch(source))


def fetch_repository(name: str, revision: str | None = None, access: Access = EVERYBODY) -> Path:
    """Download a repository of the Hub, or take it from the local cache; the path of its folder.

    Args:
        revision: a branch, a tag or a commit; None: ``main``.

    Raises:
        UserError: it cannot be had, with the way to get it by hand.
    """
    try:
        return download_repository(name, FILES, _is_complete, revision, say, access)
    except UserError:
        raise
    except Exception as error:  # errors of network, host, cache and disk have no common base class
        raise UserError(
            f"weights {name}: no such file or folder here, and no download ({download_problem(error)}); on a machine "
            f"with network, download config.json and {PUBLISHED} of {name} into a folder, and give that folder's path"
        ) from error


def _from_web(url: str) -> Path:
    """Download a file into the cache folder, where it is found the next time; a page of the Hub is its repository."""
    parts = urlsplit(url)
    repository = re.fullmatch(rf"/({_HUB_ID.pattern})(?:/tree/([\w.-]+))?/?", parts.path)
    if parts.hostname == "huggingface.co" and repository:
        return fetch_repository(repository[1], repository[2])
    name = re.sub(r"[^\w.()-]", "_", Path(parts.path).name)
    if not name.strip("._"):
        raise UserError(f"weights {shown_url(url)}: the address does not end with the name of a file")
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]  # two addresses may end with the same name
    return download_file(url, zoo.own_folder() / "downloads" / folder / name, say)


def _is_complete(folder: Path) -> bool:
    return (folder / BEST).is_file() or all((folder / name).is_file() for name in ("config.json", PUBLISHED))

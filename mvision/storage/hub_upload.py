"""Putting a folder into a repository of the Hugging Face Hub, in one commit, through the Hub's own client."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvision.errors import UserError
from mvision.storage.hub import hub_is_reachable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MODELS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".keras", ".msgpack", ".onnx", ".gguf", ".pdparams", ".pte",
    ".tflite",
)  # fmt: skip
_WAYS = "log in with 'hf auth login', or set the environment variable HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """What there is at a name on the Hub.

    Attributes:
        commit: the newest one of the branch, or of ``main`` where there is no such branch.
        has_branch: whether there is such a branch.
        files: names of all files.
        config: the content of ``config.json``; None: there is none, or it is no JSON object.
        card: the text of ``README.md``.
    """

    commit: str | None
    has_branch: bool
    is_private: bool
    files: list[str]
    config: dict[str, Any] | None
    card: str | None

    @property
    def models(self) -> list[str]:
        """The files with weights, and ``config.json``."""
        return [name for name in self.files if name == "config.json" or name.endswith(_MODELS)]


@dataclass(frozen=True)
class Pushed:
    """A commit: where it can be looked at, and whether anything was different from before."""

    url: str
    has_changed: bool


class Upload:
    """One push to the Hub; every method raises a UserError that says in one line why something cannot be done.

    Args:
        repo_id: ``user/name``; a name alone belongs to the user of the token.
        token: None: that of the environment, or of the login.
        branch: None: ``main``.
    """

    def __init__(self, repo_id: str, token: str | None = None, branch: str | None = None) -> None:
        self.repo_id, self.branch, self._given = check_name(repo_id), branch, token
        self._api: HfApi | None = None
        self._exists = False

    @property
    def api(self) -> HfApi:
        """The Hub's client, once it is known that there are a token and a connection."""
        from huggingface_hub import HfApi, constants, get_token

        if self._api is None:
            if constants.HF_HUB_OFFLINE:
                raise UserError(f"push {self.repo_id}: the environment variable HF_HUB_OFFLINE forbids it; unset it")
            if not (self._given or get_token()):
                raise UserError(f"push {self.repo_id}: there is no token for {constants.ENDPOINT}; {_WAYS}")
            if not hub_is_reachable():
                raise UserError(f"push {self.repo_id}: {constants.ENDPOINT} cannot be reached; nothing was pushed")
            self._api = HfApi(token=self._given, library_name="mvision")
            if "/" not in self.repo_id:
                with self._one_line("its user is unknown"):
                    self.repo_id = f"{self._api.whoami()['name']}/{self.repo_id}"
        return self._api

    def connect(self) -> str:
        """Check that there are a token and a connection; returns the whole name of the repository."""
        return self.repo_id if self.api else ""

    def look(self) -> Repository | None:
        """What there is at the name; None where there is nothing, or nothing that the token may see."""
        from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        api, has_branch = self.api, True
        with self._one_line("it cannot be looked at"):
            try:
                info = api.model_info(self.repo_id, revision=self.branch)
            except RevisionNotFoundError:
                info, has_branch = api.model_info(self.repo_id), False
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None
            self._exists = True
            files = [file.rfilename for file in info.siblings or []]
            config = self._read(info.sha, "config.json") if "config.json" in files else None
            card = self._read(info.sha, "README.md") if "README.md" in files else None
        return Repository(info.sha, has_branch, bool(info.private), files, _json_object(config), card)

    def create(self, private: bool | None) -> None:
        """Make a new repository."""
        with self._one_line("it cannot be created"):
            self.repo_id = self.api.create_repo(self.repo_id, private=private).repo_id

    def send(
        self, folder: Path, message: str, there: Repository | None, create_pr: bool = False, stale: Sequence[str] = ()
    ) -> Pushed:
        """Upload the files of a folder in one commit.

        Args:
            there: what was in the repository before; None: it is new.
            create_pr: as a pull request.
            stale: files that are deleted from the repository, unless the folder has them.
        """
        left = "" if there else f"; the repository {self.repo_id} was created and is empty, so push again"
        with self._one_line("nothing was pushed", left):
            if self.branch is not None and not (there and there.has_branch) and not create_pr:
                self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
            done = self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=message,
                revision=None if create_pr else self.branch,
                create_pr=create_pr,
                delete_patterns=[name for name in stale if there and name in there.files] or None,
            )
        return Pushed(getattr(done, "pr_url", None) or str(done.commit_url), there is None or done.oid != there.commit)

    def _read(self, commit: str | None, file: str) -> str:
        path = self.api.hf_hub_download(self.repo_id, file, revision=commit)
        return Path(path).read_text(encoding="utf-8", errors="replace")

    @contextmanager
    def _one_line(self, what: str, left: str = "") -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # errors of network, Hub, cache and disk have no common base class
            raise UserError(f"push {self.repo_id}: {what}: {self._reason(error)}{left}") from error

    def _reason(self, error: Exception) -> str:
        """Why the Hub refused, and what helps; see huggingface_hub's ``hf_raise_for_status``."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join((getattr(error, "server_message", None) or str(error)).split())[:300]
        if status == 401:
            return f"the token {self._named_token()} is not valid there; {_WAYS}"
        if status == 403:
            return (
                f"the token {self._named_token()} has no right to write there ({said}); choose a name of your own or a "
                f"token that may write{', or propose it as a pull request: --create-pr' if self._exists else ''}"
            )
        if status == 404:
            return f"there is no such repository or branch, or the token may not see it ({said})"
        if status == 409:
            return f"the name is taken ({said}); choose another"
        return said or type(error).__name__

    def _named_token(self) -> str:
        if self._given:
            return "that was given"
        set_here = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
        return f"in {set_here[0]}" if set_here else "of the login"


def check_name(repo_id: str) -> str:
    """The name of a repository, if it can be one; raises UserError."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"push {repo_id[:100]!r}: not the name of a repository ({reason}); give user/name") from error
    return repo_id


def _json_object(text: str | None) -> dict[str, Any] | None:
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None

"""What a model can do on the Hugging Face Hub, in the manner of huggingface_hub's own mixin.

Models lie below the files that they are written to and read from, so what reads and writes them (``HubFiles``) is given
to the class by ``mvision.weights.push``, which ``mvision.Model``, ``mvision.create_model`` and ``mvision.load`` import.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from huggingface_hub import ModelHubMixin

from mvision.errors import UserError
from mvision.storage.hub import Access

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from typing_extensions import Self


class Source(NamedTuple):
    """Where a model's weights were read from.

    ``path``: the file or folder on this machine. ``name``: of a published model or a repository of the Hub, as it was
    given; None for weights that lay on the disk.
    """

    path: Path
    name: str | None


class HubFiles(Protocol):
    """Saves a model in a folder, describes it in a card, pushes it and loads it; see ``mvision.weights.push``."""

    def save(self, model: Any, folder: Path, card: dict[str, Any]) -> None:
        """Write all files of a repository, the card included."""

    def card(self, model: Any, options: dict[str, Any]) -> ModelCard:
        """The model card."""

    def push(self, model: Any, repo_id: str, options: dict[str, Any], card: dict[str, Any]) -> str:
        """Create or update a repository; returns the address of the commit."""

    def load(self, source: str, tasks: Sequence[str] | None, device: Any, revision: str | None, access: Access) -> Any:
        """The model of a folder, a file or a repository."""


class HubModel(ModelHubMixin, library_name="mvision", tags=["mvision"]):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained``, with the arguments of huggingface_hub's mixin.

    Attributes:
        source: where the weights were read from; None for those of ``create_model``. The card has the figures of that
            run as long as the weights are still the same.
    """

    source: Source | None = None
    hub: ClassVar[HubFiles | None] = None

    @classmethod
    def _files(cls) -> HubFiles:
        if cls.hub is None:
            raise UserError(
                "a model on the Hub: 'import mvision.weights.push' first, or take the class as mvision.Model"
            )
        return cls.hub

    def save_pretrained(  # type: ignore[override]  # the config is the model's own
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write what ``push_to_hub`` would push into a folder; ``mvision.load`` reads it.

        Args:
            save_directory: is created; files of the same names are replaced.
            repo_id: None: the name of the folder, in the account of the token's user.
            push_to_hub: push as well; returns the address of the commit then.
            model_card_kwargs: see ``mvision.weights.card.CardOptions``.
            push_to_hub_kwargs: of ``push_to_hub``.

        Raises:
            UserError: the folder cannot be written, or as ``push_to_hub``.
        """
        if push_to_hub_kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained: {', '.join(push_to_hub_kwargs)} without push_to_hub=True")
        self._files().save(self, Path(save_directory), {"repo_id": repo_id, **(model_card_kwargs or {})})
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).absolute().name
        return self.push_to_hub(name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card, with metadata and text; keyword arguments: see ``mvision.weights.card.CardOptions``."""
        return self._files().card(self, kwargs)

    def push_to_hub(  # type: ignore[override]  # which files there are is mvision's matter, and the config is the model's
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Put the model into a repository of the Hub, in one commit; the repository is created where there is none.

        Args:
            repo_id: ``user/name`` or ``organisation/name``; a name alone is one of the token's user.
            commit_message: None: ``Push model with mvision`` and its version.
            private: whether a repository that is created can be read by its owners alone. An existing public one is
                refused with True.
            token: None: that of the environment variable ``HF_TOKEN``, or of ``hf auth login``.
            branch: None: ``main``. A new one is created from ``main``.
            create_pr: propose the commit as a pull request, for which no right to write is needed.
            model_card_kwargs: see ``mvision.weights.card.CardOptions``, such as ``{"license": "apache-2.0"}``.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            UserError: no token or a wrong one, no network, a bad name, a repository of somebody else or with another
                kind of model in it, or metadata that the Hub refuses. Nothing is changed on the Hub then, except that a
                new repository can be left empty where the upload fails; the message says so.
        """
        options = {
            "message": commit_message,
            "private": private,
            "token": token,
            "branch": branch,
            "create_pr": bool(create_pr),
        }
        return self._files().push(self, repo_id, options, model_card_kwargs or {})

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a misspelt keyword is an error here
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tasks: Sequence[str] | None = None,
        device: Any = "cpu",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """The model of a repository or of a folder, in eval mode; what ``mvision.load`` does, with more about the Hub.

        Args:
            pretrained_model_name_or_path: any source that ``mvision.load`` takes.
            tasks, device: see ``mvision.load``.
            force_download: download also what is in the cache.
            token: None: that of the environment variable ``HF_TOKEN``, or of ``hf auth login``; False: none.
            cache_dir: None: the Hub's own cache folder.
            local_files_only: use the cache alone.
            revision: a branch, a tag or a commit; None: ``main``.

        Raises:
            UserError: as ``mvision.load``; options for the Hub with a source that is not a repository.
        """
        access = Access(token, None if cache_dir is None else str(cache_dir), force_download, local_files_only)
        return cls._files().load(str(pretrained_model_name_or_path), tasks, device, revision, access)

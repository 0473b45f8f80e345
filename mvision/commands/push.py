"""``mvision push``: a run as a repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mvision.deploy.exported import is_exported
from mvision.errors import UserError
from mvision.storage.hub_upload import Upload
from mvision.weights.card import CardOptions
from mvision.weights.files import load
from mvision.weights.push import push as push_model


def push(
    run: str,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    example: Path | None = None,
    pictures: bool = True,
    log: Callable[[str], None] = print,
) -> None:
    """Push the weights of a run; options and errors: see ``Model.push_to_hub`` and ``CardOptions``."""
    upload = Upload(repo_id, branch=branch)
    if is_exported(run):
        raise UserError(f"push {run}: an exported model; push the weights that it was made from")
    model = load(run)
    name = upload.connect()
    log(f"push {run}: {', '.join(model.tasks)}, {len(model.categories)} classes, to {name}")
    pushed = push_model(
        model,
        name,
        CardOptions(license=license, datasets=datasets, example=example, pictures=pictures),
        message=message,
        private=private or None,
        branch=branch,
        create_pr=create_pr,
        log=log,
    )
    log(f"pushed: {pushed.url}" if pushed.has_changed else f"nothing has changed since {pushed.url}")
    if not create_pr:
        log(f'load it with mvision.load("{name}{f"@{branch}" if branch else ""}")')

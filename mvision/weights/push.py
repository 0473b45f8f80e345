"""Models on the Hugging Face Hub: the files of a repository, pushing them, and loading them again.

A repository has ``model.safetensors``, which is a weights file of mvision under the Hub's usual name, ``config.json``
(the same description for people, and for the Hub's counter of downloads), the model card, and of a run its figures,
settings and pictures.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mvision
from mvision.config import RUN_CONFIG
from mvision.errors import UserError
from mvision.fast.copies import say
from mvision.model import Model as Model
from mvision.model import create_model as create_model
from mvision.storage.atomic import write_text
from mvision.storage.hub import EVERYBODY, Access
from mvision.storage.hub_upload import Pushed, Repository, Upload
from mvision.structures.images import read_image, write_image
from mvision.weights.card import CardOptions, Example, make_card, merged, read_card, with_old
from mvision.weights.files import load, save_weights
from mvision.weights.run_facts import METRICS, PICTURES, RunFacts, facts_of
from mvision.weights.sources import PUBLISHED, fetch_repository, is_repository

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

LIBRARY = "mvision"
CONFIG, CARD = "config.json", "README.md"
EXAMPLE, DRAWN = "example.jpg", "example-result.jpg"
OPTIONAL = (*PICTURES, EXAMPLE, DRAWN, METRICS, RUN_CONFIG)
"""Files of a repository that an earlier push may have left, and that do not belong to a model without them."""


def push(
    model: Model,
    repo_id: str,
    options: CardOptions | None = None,
    *,
    message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    log: Callable[[str], None] = say,
) -> Pushed:
    """Put a model into a repository of the Hub, in one commit, and create the repository where there is none.

    Arguments and errors: see ``Model.push_to_hub``.

    Args:
        log: is called with the lines that a user has to know.
    """
    upload, options = Upload(repo_id, token, branch), options or CardOptions()
    if branch is not None and create_pr:
        raise UserError(f"push {repo_id}: a pull request is one to main; leave out either the branch {branch} or it")
    run, warning = facts_of(model)
    with tempfile.TemporaryDirectory(prefix="mvision-push-") as name:
        folder = Path(name)
        example = write(model, folder, run, options)
        options = replace(options, repo_id=upload.connect(), revision=None if create_pr else branch)
        there = upload.look()
        _check(upload.repo_id, there, private, create_pr)
        old = None if there is None or there.card is None else read_card(there.card, f"push {upload.repo_id}")
        card, is_kept = merged(make_card(model, run, with_old(options, old), example), old)
        card.save(folder / CARD)
        for line in _notes(upload.repo_id, card, run, options, warning, is_kept):
            log(line)
        if there is None:
            upload.create(private)
        message = message or f"Push model with mvision {mvision.__version__}"
        return upload.send(folder, message, there, create_pr, OPTIONAL)


def write(model: Model, folder: Path, run: RunFacts, options: CardOptions) -> Example | None:
    """Write all files but the card into a folder, which ``mvision.load`` reads.

    Paths of this machine, such as that of the backbone's first weights, are not written.
    """
    config = model.config.model_copy(deep=True)
    config.backbone.forget_weights()
    if run.file is not None and run.file_says == (config.model_dump(mode="json"), run.started_from):
        (folder / PUBLISHED).write_bytes(run.file.read_bytes())  # the same file, by its checksum too
    else:
        save_weights(model, folder / PUBLISHED, run.header, config)
    described = {
        "library_name": LIBRARY,
        "mvision_version": mvision.__version__,
        "tasks": model.tasks,
        "id2label": {str(label): category.name for label, category in enumerate(model.categories)},
        "model": config.model_dump(mode="json"),
    }
    write_text(folder / CONFIG, json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    if run.metrics:
        write_text(folder / METRICS, json.dumps(run.metrics, indent=2) + "\n")
    if run.config is not None:
        write_text(folder / RUN_CONFIG, run.config.to_yaml())
    for picture in run.pictures:
        if options.pictures or picture.name != PICTURES[0]:
            (folder / picture.name).write_bytes(picture.read_bytes())
    return None if options.example is None else _example(model, folder, options.example)


def _example(model: Model, folder: Path, picture: str | Path) -> Example:
    """A picture and what is found in it, written anew: what a camera notes in a file, such as the place, stays away."""
    pixels = read_image(picture, pixel_range=model.config.pixel_range)
    found = model.predict([pixels])[0]
    write_image(folder / EXAMPLE, pixels)
    write_image(folder / DRAWN, found.draw(pixels))
    regions = found.regions if found.regions is not None else ()
    number = len(found) + len(regions)
    return Example(EXAMPLE, DRAWN, f"{number or 'Nothing'} found in {EXAMPLE} with a score of 0.5 or more")


def _check(name: str, there: Repository | None, private: bool | None, create_pr: bool) -> None:
    """Refuse what would overwrite something else, or show something to everybody against the user's wish."""
    if there is None:
        if create_pr:
            raise UserError(f"push {name}: there is no such repository to propose a pull request to, or none to see")
        return
    if there.models and (there.config or {}).get("library_name") != LIBRARY:
        listed = ", ".join(there.models[:3]) + (", ..." if there.models[3:] else "")
        raise UserError(
            f"push {name}: the name is taken: the repository there holds another kind of model ({listed}), which would "
            "be overwritten; choose another name, or delete these files there first"
        )
    if private and not there.is_private and not create_pr:
        raise UserError(
            f"push {name}: --private is for new repositories, and this one exists and is public; make it private in "
            "its settings on the Hub, or choose another name"
        )


def _notes(
    name: str, card: ModelCard, run: RunFacts, options: CardOptions, warning: str | None, is_kept: bool
) -> list[str]:
    lines = [] if warning is None else [f"note: {warning}"]
    shows = [path.name for path in run.pictures if path.name == PICTURES[0] and options.pictures]
    if shows:
        lines += [f"note: {shows[0]} shows validation images of the run; --no-pictures leaves it out"]
    if not card.data.get("license"):
        lines += [
            "note: the model card names no licence; --license NAME, such as apache-2.0, says how others may use it"
        ]
    if is_kept:
        lines += [
            f"note: {CARD} of {name} was written by people: its text stays, and only its metadata is renewed; for a "
            f"new one delete {CARD} there and push again"
        ]
    return lines


class _OnTheHub:
    """What ``HubModel`` asks for."""

    def save(self, model: Model, folder: Path, card: dict[str, Any]) -> None:
        options, (run, warning) = CardOptions.of(card), facts_of(model)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            example = write(model, folder, run, options)
            write_text(folder / CARD, str(make_card(model, run, options, example)))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another") from error
        if warning is not None:
            say(f"note: {warning}")

    def card(self, model: Model, options: dict[str, Any]) -> ModelCard:
        return make_card(model, facts_of(model)[0], CardOptions.of(options))

    def push(self, model: Model, repo_id: str, options: dict[str, Any], card: dict[str, Any]) -> str:
        return push(model, repo_id, CardOptions.of(card), **options).url

    def load(
        self, source: str, tasks: Sequence[str] | None, device: Any, revision: str | None, access: Access
    ) -> Model:
        if revision is None and access == EVERYBODY:
            return load(source, tasks, device)
        if not is_repository(source):
            raise UserError(f"weights {source}: not a repository of the Hub; leave revision, token and the like out")
        folder = fetch_repository(source, revision, access)
        model = load(folder, tasks, device)
        if model.source is not None:
            model.source = model.source._replace(name=f"{source}@{revision}" if revision else source)
        return model


Model.hub = _OnTheHub()

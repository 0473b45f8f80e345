"""What is known of the run that a model's weights come from, for its model card: figures, data, settings, pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvision.config import Config, config_of_run
from mvision.errors import UserError
from mvision.model import Model
from mvision.storage.hub_model import Source
from mvision.storage.run_folder import RunFolder
from mvision.weights import zoo
from mvision.weights.files import built, read_weights
from mvision.weights.sources import described, hub_id
from mvision.weights.stored import read_header, read_json, read_tensors

METRICS = "metrics.json"
STATE = "mvision_state"
PICTURES = ("predictions.jpg", "results.png")


@dataclass(frozen=True)
class RunFacts:
    """Everything is optional: weights can be of no run, or have been taken out of its folder.

    Attributes:
        config: the run's, with the names of folders in place of their paths.
        metrics: the figures of these weights on the validation split, by task.
        epoch: that the weights are of, counted from 1.
        started_from: the published weights that the run began with, and a repository of the Hub that they are in.
        images: numbers of training and validation images of every data set.
        pictures: files that the run left.
        file: the weights file, where the model still has its weights.
        file_says: the model's config and the ``started_from`` in the header of that file.
    """

    config: Config | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    epoch: int | None = None
    started_from: str | None = None
    base_model: str | None = None
    images: list[list[int]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    file: Path | None = None
    file_says: tuple[Any, str | None] = (None, None)

    @property
    def header(self) -> dict[str, Any]:
        """What the header of the pushed weights says about the run."""
        return {"epoch": self.epoch, "metrics": self.metrics, "started_from": self.started_from}


def facts_of(model: Model) -> tuple[RunFacts, str | None]:
    """What is known of a model's run, and a line where nothing of it can be said about these weights.

    Raises:
        UserError: a file of the run is damaged.
    """
    source = model.source
    if source is None:
        return RunFacts(), None
    if source.path.is_dir() or source.path.suffix.lower() != ".safetensors":  # published weights, in another format
        started_from, base_model = _public(source.name and described(source.name))
        return RunFacts(started_from=started_from, base_model=base_model), None
    if not _is_as_read(model, source.path):
        return RunFacts(), (
            f"the weights are not those of {source.path} any more, so that the card has no figures, settings and "
            "pictures of that run"
        )
    return _of_file(model, source), None


def _of_file(model: Model, source: Source) -> RunFacts:
    path, folder = source.path, source.path.parent
    header = read_json(
        read_header(path).metadata["mvision"], f"weights {path}: the description in its header is damaged"
    )
    config = config_of_run(path)
    if config is not None:
        config = _without_paths(config)
    figures, where = header.get("metrics"), str(path)
    if (folder / METRICS).is_file():
        where = str(folder / METRICS)
        figures = read_json((folder / METRICS).read_text(encoding="utf-8", errors="replace"), f"{where}: not JSON")
    started_from, base_model = _public(described(source.name) if source.name else header.get("started_from"))
    return RunFacts(
        config,
        _figures(figures, where, model.tasks),
        header.get("epoch"),
        started_from,
        base_model,
        _numbers_of_images(RunFolder(folder).state),
        [folder / name for name in PICTURES if (folder / name).is_file()],
        path,
        (header.get("model"), header.get("started_from")),
    )


def _is_as_read(model: Model, path: Path) -> bool:
    """Whether a model still has the weights of its file, bit by bit."""
    now = model.state_dict()
    try:
        then = read_tensors(path)
        if then.keys() - now.keys():  # of tasks that were left out: names of tensors can differ then
            then = built(read_weights(path), model.tasks, path).state_dict()
    except UserError:  # the file is gone, or another one
        return False
    counters = {name for name in now if name.endswith("num_batches_tracked")}  # files can lack them
    return now.keys() - counters <= then.keys() <= now.keys() and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name].cpu(), tensor) for name, tensor in then.items()
    )


def _figures(content: Any, where: str, tasks: list[str]) -> dict[str, dict[str, float]]:
    """The figures of the model's tasks. A negative one means that there was nothing to measure."""
    if content is None:
        return {}
    is_good = isinstance(content, dict) and all(
        isinstance(figures, dict) and all(isinstance(value, int | float) for value in figures.values())
        for figures in content.values()
    )
    if not is_good:
        raise UserError(f"{where}: no figures by task, as mvision writes them; remove it, and the card has none")
    return {task: content[task] for task in tasks if task in content}


def _without_paths(config: Config) -> Config:
    """A copy that names data by the last part of its path: folders of this machine are nobody's business."""
    config = config.model_copy(deep=True)
    if config.data.root is not None:
        config.data.root = _folder_name(config.data.root)
    for more in config.data.more:
        more.root = _folder_name(more.root)
    if config.model.backbone.weights is not None:
        config.model.backbone.weights = Path(config.model.backbone.weights).name
    return config


def _folder_name(path: str) -> str:
    return Path(path).expanduser().absolute().name or "data"


def _numbers_of_images(state: Path) -> list[list[int]]:
    if not state.is_file():
        return []
    try:
        found = json.loads(read_header(state).metadata[STATE])["facts"]["images"]
        return [[int(train), int(val)] for train, val in found]
    except (UserError, KeyError, TypeError, ValueError):  # of another version: the card does without
        return []


def _public(described: str | None) -> tuple[str | None, str | None]:
    """How the card names weights that a run started from, and their repository; see ``sources.described``.

    The record of a run can have the path of a copy on its machine in it.
    """
    if not described:
        return None, None
    name = described.partition(" ")[0]
    model = zoo.MODELS.get(name)
    if model is None:
        return described, hub_id(name)
    return (
        f"{name} ({', '.join(filter(None, (model.hub or model.of.title, model.revision, model.licence)))})",
        model.hub,
    )

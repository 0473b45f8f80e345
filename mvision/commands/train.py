"""``mvision train``: the training and its config, from a shipped model, a file, initial weights or a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvision.config import RUN_CONFIG, Config, ModelConfig, load_config, shipped_configs
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.settings import Settings
from mvision.weights import read_weights
from mvision.weights.start import shipped_architecture

__all__ = ["run_config", "train"]


def run_config(
    *,
    tasks: list[str] | None = None,
    model: str | None = None,
    file: Path | None = None,
    init: str | None = None,
    family: str | None = None,
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> Config:
    """The complete config of a run.

    Args:
        tasks: each gets a head; empty: the tasks of the initial weights or of the config.
        model, file, options, assignments: see ``mvision.config.load_config``.
        init: weights to start from. Without ``model`` and ``file`` the run has their architecture.
        family: of a ``.pth`` file of the authors given as ``init``, where its name does not tell it.
        resume: a run to continue with its own config, which ``options`` and ``assignments`` can change.

    Raises:
        UserError: an unknown name, key or value; ``resume`` together with ``tasks``, ``model``, ``file`` or ``init``.
    """
    if resume is not None:
        excluded = {"--task": tasks, "--model": model, "--config": file, "--init": init}
        for option in (option for option, value in excluded.items() if value):
            raise UserError(f"--resume {resume}: a run goes on with its own config; leave {option} out")
        if not (resume / RUN_CONFIG).is_file():
            raise UserError(f"--resume {resume}: not the folder of a run, there is no {RUN_CONFIG} in it")
        return load_config(file=resume / RUN_CONFIG, overrides=options, assignments=assignments)
    of_weights: dict[str, Any] = {}
    if init is not None and model is None and file is None:
        weights = read_weights(init, family).config
        tasks = tasks or list(weights.heads)
        model, of_weights = _architecture(weights)
        of_weights |= _heads_like(weights, tasks)
        of_weights = _without_other_kinds(of_weights, options or {}, assignments or [])
    return load_config(model, file, tasks, {**of_weights, **(options or {})}, assignments)


def _without_other_kinds(of_weights: dict[str, Any], options: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Without the settings of a head that is to be of another kind than that of the weights: it starts anew."""
    wanted = {key: str(value) for key, value in options.items()}
    wanted |= {key: value.strip() for key, _, value in (text.partition("=") for text in assignments)}
    kept = {}
    for key, value in of_weights.items():
        kind = wanted.get(f"{key}.kind") if isinstance(value, dict) else None
        if kind is None or kind == value.get("kind"):
            kept[key] = value
    return kept


def _architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """A shipped model (for its training settings), and the backbone and neck of these weights.

    It is the published model of this architecture; else one with the same backbone, else ``base``.
    """
    backbones = {load_config(name).model.backbone.name: name for name in shipped_configs()}
    sections = {
        "model.backbone": config.backbone.model_dump(),
        "model.neck": config.neck.model_dump(),
        "model.image_size": config.image_size,
    }
    return shipped_architecture(config) or backbones.get(config.backbone.name, "base"), sections


def _heads_like(config: ModelConfig, tasks: list[str]) -> dict[str, Any]:
    """Settings with which the heads of ``tasks`` can be initialised with weights that have this config.

    The head of a task that the weights have too gets the same settings. Any other head gets the settings of the schema
    that it has in common with a head of the weights: instance segmentation gets the decoder's of a detection head.
    """
    heads = config.heads
    sections: dict[str, Any] = {}
    for task in tasks:
        if task in heads:
            sections[f"model.heads.{task}"] = heads[task].model_dump()
            continue
        schema = head_class(task).Config
        for settings in heads.values():
            common = next(base for base in type(settings).__mro__ if issubclass(schema, base))
            for name in common.model_fields if issubclass(common, Settings) else ():
                sections.setdefault(f"model.heads.{task}.{name}", getattr(settings, name))
    return sections

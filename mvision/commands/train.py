"""The config that a run starts from: a shipped model, a file, the weights it starts from, or the run it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvision.config import RUN_CONFIG, Config, ModelConfig, load_config, shipped_configs
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.settings import Settings
from mvision.weights import read_weights


def run_config(
    *,
    tasks: list[str] | None = None,
    model: str | None = None,
    file: Path | None = None,
    init: str | None = None,
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> Config:
    """Combine what the user named; what was not named follows from the rest.

    Args:
        tasks: the heads; empty: those of the config.
        model, file, options, assignments: see ``mvision.config.load_config``.
        init: weights to start from. Unless ``model`` or ``file`` says otherwise, the run gets their architecture.
        resume: a run to continue, with its own config; only ``options`` and ``assignments`` can change it.

    Raises:
        UserError: anything unknown, or ``resume`` together with what it excludes.
    """
    if resume is not None:
        named = {"--task": tasks, "--model": model, "--config": file, "--init": init}
        for option in (option for option, value in named.items() if value):
            raise UserError(f"--resume {resume}: a run goes on with its own config; leave {option} out")
        if not (resume / RUN_CONFIG).is_file():
            raise UserError(f"--resume {resume}: not the folder of a run, there is no {RUN_CONFIG} in it")
        return load_config(file=resume / RUN_CONFIG, overrides=options, assignments=assignments)
    known: dict[str, Any] = {}
    if init is not None and model is None and file is None:
        weights = read_weights(init).config
        tasks = tasks or list(weights.heads)
        model, known = _architecture(weights)
        known |= _heads_like(weights, tasks)
    return load_config(model, file, tasks, {**known, **(options or {})}, assignments)


def _architecture(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Of weights: the shipped model nearest to them (for how to train), and their own backbone and neck."""
    backbones = {load_config(name).model.backbone.name: name for name in shipped_configs()}
    sections = {
        "model.backbone": config.backbone.model_dump(),
        "model.neck": config.neck.model_dump(),
        "model.image_size": config.image_size,
    }
    return backbones.get(config.backbone.name, "base"), sections


def _heads_like(config: ModelConfig, tasks: list[str]) -> dict[str, Any]:
    """Settings of the heads for ``tasks`` that let them take over the weights' heads.

    A task that the weights know has its head's settings. Another gets what its own schema has in common with that of a
    head it is related to: a mask head gets the decoder of a detection head.
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

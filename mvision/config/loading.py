"""How a configuration comes together: shipped or given file, command-line options, ``-o key=value``.

Order of precedence: file < options < ``-o a.b=c``. A file may name one ``base:`` file, and under ``tasks:`` settings
that go on top of its own where a model is made for one task alone.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mvision.backbone import check_backbone_name
from mvision.config.explain import explain
from mvision.config.schema import Config, ModelConfig
from mvision.errors import UserError
from mvision.heads import serving_task

RUN_CONFIG = "config.yaml"
"""What the configuration of a run is called in its folder."""


def shipped_configs() -> list[str]:
    """Names of the model files that come with the package."""
    folder = resources.files("mvision.configs")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    model: str | None = None,
    file: str | Path | None = None,
    tasks: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> Config:
    """Read and combine everything that configures a run.

    Args:
        model: a shipped config's name, or any timm feature backbone's name (then ``base`` with that backbone).
        file: a YAML file that takes the place of the shipped one (or goes on top of ``model`` where both are given).
        tasks: the heads to keep; a task that the file does not describe gets its defaults. None: those that ``file``
            itself names, else the first that the shipped model describes, detection. Several make a joint model, in
            which a task that another includes takes that one's settings.
        overrides: dotted keys and values from command-line options, such as ``{"train.epochs": 3}``.
        assignments: ``key.sub=value`` strings of ``-o``; values are read as YAML.

    Raises:
        UserError: unknown file, model, key (with the nearest known one) or value out of range.
    """
    layers: list[dict[str, Any]] = []
    named: list[str] = []
    if model is not None or file is None:
        layers += _model_layers(model or "tiny")
    if file is not None:
        given = _file_layers(Path(file))
        named = list(((given[-1].get("model") or {}).get("heads")) or {})
        # Checked alone first, so that a mistake in the file is reported with the file's name.
        for task in (None, *(given[-1].get("tasks") or {})):
            parse_config(_combined(given, task), where=f"config {file}: ")
        layers += given
    # Shipped files describe every task they know a recipe for.
    described = _combined(layers, None).get("model", {}).get("heads") or {}
    kept = tasks or named or list(described)[:1]
    tree = _combined(layers, kept[0] if len(kept) == 1 else None)
    described = tree.setdefault("model", {}).get("heads") or {}
    follows = {task for task in kept if serving_task(task, kept) != task and task not in named}
    tree["model"]["heads"] = {task: {} if task in follows else described.get(task) or {} for task in kept}
    for key, value in (overrides or {}).items():
        _assign(tree, key, value)
    for assignment in assignments or []:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise UserError(f"-o {assignment}: write it as key.sub=value")
        _assign(tree, key, _yaml(text, f"-o {assignment}"))
    return parse_config(tree)


def config_of_run(source: str | Path) -> Config | None:
    """The ``config.yaml`` of a run, given its folder or a file in it; None where there is none beside it."""
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / RUN_CONFIG
    return load_config(file=file) if path.exists() and file.is_file() else None


def parse_config(tree: dict[str, Any], where: str = "") -> Config:
    """Validate a nested dictionary; every mistake becomes one line: ``where`` in front, then the key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(where + explain(error, Config)) from error
    except UserError as error:  # from the section of a head, which names its key itself
        raise UserError(f"{where}{error}") from error


def parse_model_config(tree: dict[str, Any]) -> ModelConfig:
    """The same for the model's section alone (as stored in weights files)."""
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, ModelConfig, "model")) from error


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section; lists and plain values replace."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _combined(layers: list[dict[str, Any]], task: str | None) -> dict[str, Any]:
    """Each layer over the one before; with what it says under ``tasks`` of this one."""
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = merge(tree, {section: value for section, value in layer.items() if section != "tasks"})
        tree = merge(tree, (layer.get("tasks") or {}).get(task) or {})
    return tree


def _model_layers(name: str) -> list[dict[str, Any]]:
    if name in shipped_configs():
        return _file_layers(_shipped_path(name))
    try:
        check_backbone_name(name)
    except UserError as error:
        raise UserError(f"--model {name}: no shipped model ({', '.join(shipped_configs())}), and {error}") from error
    return [*_model_layers("base"), {"model": {"backbone": {"name": name}}}]


def _shipped_path(name: str) -> Path:
    return Path(str(resources.files("mvision.configs") / f"{name}.yaml"))


def _file_layers(path: Path) -> list[dict[str, Any]]:
    """A file, after the one that it names as its base."""
    tree = _read(path)
    base = tree.pop("base", None)
    if base is None:
        return [tree]
    below = _read(_shipped_path(base) if base in shipped_configs() else path.parent / str(base))
    if "base" in below:
        raise UserError(f"{path}: its base '{base}' has a base itself; one level is allowed: write the settings out")
    return [below, tree]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"config {path}: {reason.lower()}; shipped: {', '.join(shipped_configs())}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not a text file in UTF-8") from error
    tree = _yaml(text, f"config {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: has to be a mapping with sections model, data, train")
    # A section whose every line is commented out reads as None; it means "the defaults".
    return {str(section): value for section, value in tree.items() if value is not None}


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML: {problem}") from error


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value

"""How a configuration is put together: a shipped or given file, command-line options, ``-o key=value``.

Order of precedence: file < options < ``-o a.b=c``. A file may name another one as its ``base``. Its section ``tasks``
holds settings for a model with one task alone; they override the rest of the file. The section of a head may have
``kinds``, its settings for other kinds of that head: what chooses one of them later starts from those alone.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mvision.backbone import check_backbone_name
from mvision.backbone.feature_nets import pyramid_of
from mvision.config.explain import explain
from mvision.config.schema import Config, DataConfig, ModelConfig
from mvision.errors import UserError, did_you_mean
from mvision.heads import HEADS, known_tasks, serving_task
from mvision.storage.yaml_files import parse_yaml, read_yaml

RUN_CONFIG = "config.yaml"
"""Name of the file in a run's folder that holds the run's configuration."""


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    folder = resources.files("mvision.configs")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


FINE_MAPS = {"pyramid": "mean-bilinear", "detail": 16}
"""Of a plain ViT's backbone for masks, which otherwise have no map of stride 4; see docs/backbones.md."""


def load_config(
    model: str | None = None,
    file: str | Path | None = None,
    tasks: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> Config:
    """Read and combine everything that configures a run.

    Args:
        model: a shipped config's name, or the name of a timm backbone, which replaces that of ``base``. None: ``tiny``,
            or nothing where ``file`` is given.
        file: a YAML file; where ``model`` is given too, its settings override those of ``model``.
        tasks: the tasks of the model; one that no file has a section for gets its default settings. None: those that
            ``file`` itself has sections for, else the first task of the shipped config, detection. In a model with
            several tasks, one that another task includes has the settings of that task.
        overrides: dotted keys and values from command-line options, such as ``{"train.epochs": 3}``.
        assignments: ``key.sub=value`` strings of ``-o``; values are read as YAML.

    Raises:
        UserError: unknown file, model or key (the message suggests the nearest known one), or a value out of range.
    """
    layers: list[dict[str, Any]] = []
    tasks_of_file: list[str] = []
    if model is not None or file is None:
        layers += _model_layers(model or "tiny")
    if file is not None:
        layers_of_file = _file_layers(Path(file))
        # Validated alone first, so that an error in the file names the file.
        for task in (None, *layers_of_file[-1].get("tasks", {})):
            parse_config(_without_kinds(_combined(layers_of_file, task)), where=f"config {file}: ")
        tasks_of_file = list(_heads(layers_of_file[-1]))
        layers += layers_of_file
    # A shipped config has a section for every task; the model gets only the tasks that are wanted.
    wanted = list(dict.fromkeys(tasks or tasks_of_file or list(_heads(_combined(layers, None)))[:1]))
    tree = _combined(layers, wanted[0] if len(wanted) == 1 else None)
    sections = _heads(tree)
    included = {task for task in wanted if serving_task(task, wanted) != task and task not in tasks_of_file}
    heads = {task: {} if task in included else sections.get(task) or {} for task in wanted}
    _assign(tree, "model.heads", heads)
    given = [*(overrides or {}).items(), *map(_parsed, assignments or [])]
    for key, value in given:
        if re.fullmatch(r"model\.heads\.[^.]+\.kind", key):  # before settings of that kind
            tree = _of_kind(tree, key.split(".")[2], value)
    for key, value in given:
        _assign(tree, key, value)
    return parse_config(_without_kinds(tree))


def config_of_run(source: str | Path) -> Config | None:
    """The configuration of a run, given its folder or a file in that folder; None if there is none.

    A ``config.yaml`` without the three sections that a run writes is another program's, and is left alone.
    """
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / RUN_CONFIG
    if not path.exists() or not file.is_file():
        return None
    tree = read_yaml(file, f"config {file}")
    if not isinstance(tree, dict) or not {"model", "data", "train"} <= tree.keys():
        return None
    return load_config(file=file)


def data_of_run(run: Config | None, root: str | None) -> DataConfig:
    """The data set at ``root``; for None that of the run, or the built-in one where there is no run.

    Where the run was trained on the data at ``root``, its splits, folds and held-out share are kept: the pictures that
    it validates on are the same ones, and none that it was trained on. It alone serves all tasks then.
    """
    if run is None:
        return DataConfig(root=root)
    own = run.data.root
    if root is None:
        return run.data
    if own is not None and (root == own or Path(root).resolve() == Path(own).resolve()):
        return run.data.model_copy(update={"more": [], "tasks": []})
    return DataConfig(root=root)


def parse_config(tree: dict[str, Any], where: str = "") -> Config:
    """Validate a nested dictionary.

    Raises:
        UserError: one line: ``where``, the key, and what is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(where + explain(error, Config)) from error
    except UserError as error:  # from the section of a head, whose message names the key already
        raise UserError(f"{where}{error}") from error


def parse_model_config(tree: dict[str, Any]) -> ModelConfig:
    """Validate the section ``model`` alone, as it is stored in weights files; raises UserError."""
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, ModelConfig, "model")) from error


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """A new dictionary: ``base`` overridden by ``top``, key by key; lists are replaced as a whole."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _combined(layers: list[dict[str, Any]], task: str | None) -> dict[str, Any]:
    """Layers merged in their order, each with its settings for ``task`` alone."""
    tree: dict[str, Any] = {}
    for layer in layers:
        for top in ({key: value for key, value in layer.items() if key != "tasks"}, layer.get("tasks", {}).get(task)):
            for name, section in _heads(top or {}).items():
                if isinstance(section, dict) and "kind" in section:
                    tree = _of_kind(tree, name, section["kind"])
            tree = merge(tree, top or {})
    return tree


def _of_kind(tree: dict[str, Any], task: str, kind: Any) -> dict[str, Any]:
    """The tree in which, if the section of a head has settings for this kind, these are in place of all others."""
    section = _heads(tree).get(task)
    kinds = section.get("kinds") if isinstance(section, dict) else None
    if not isinstance(kinds, dict) or not isinstance(kind, str) or kind not in kinds:
        return tree
    return _with_heads(tree, {task: {**(kinds[kind] or {}), "kinds": kinds}})


def _without_kinds(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the settings of the chosen kind of every head alone; raises UserError for an unknown kind."""
    heads = {}
    for task, section in _heads(tree).items():
        known = HEADS.get(task)
        if isinstance(section, dict) and isinstance(section.get("kinds"), dict) and isinstance(known, dict):
            for kind in section["kinds"].keys() - known.keys():
                raise UserError(f"model.heads.{task}.kinds: {kind!r} is unknown; {did_you_mean(str(kind), known)}")
            heads[task] = {key: value for key, value in section.items() if key != "kinds"}
    return _with_heads(tree, heads) if heads else tree


def _with_heads(tree: dict[str, Any], heads: dict[str, Any]) -> dict[str, Any]:
    """The tree with these sections in place of those of their heads."""
    return {**tree, "model": {**tree["model"], "heads": {**_heads(tree), **heads}}}


def _parsed(assignment: str) -> tuple[str, Any]:
    """Key and value of ``-o``."""
    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise UserError(f"-o {assignment}: write it as key.sub=value")
    return key, parse_yaml(text, f"-o {key}")


def _heads(tree: dict[str, Any]) -> dict[str, Any]:
    """The section ``model.heads``; empty where it is absent, or no mapping, which validation reports."""
    model = tree.get("model")
    heads = model.get("heads") if isinstance(model, dict) else None
    return heads if isinstance(heads, dict) else {}


def _model_layers(name: str) -> list[dict[str, Any]]:
    """The layers of a shipped config, or of ``base`` with another backbone."""
    if name in shipped_configs():
        return _file_layers(_shipped_path(name))
    try:
        check_backbone_name(name)
    except UserError as error:
        if near := difflib.get_close_matches(name.lower().replace("-", "_"), shipped_configs(), n=1, cutoff=0.8):
            raise UserError(f"--model {name}: no shipped model has this name: did you mean '{near[0]}'?") from error
        raise UserError(f"--model {name}: no shipped model ({', '.join(shipped_configs())}), and {error}") from error
    layer: dict[str, Any] = {"model": {"backbone": {"name": name, "normalize": "auto"}}}
    if not pyramid_of(name):
        layer["tasks"] = {"instance-seg": {"model": {"backbone": FINE_MAPS}}}
    return [*_model_layers("base"), layer]


def _shipped_path(name: str) -> Path:
    return Path(str(resources.files("mvision.configs") / f"{name}.yaml"))


def _file_layers(path: Path) -> list[dict[str, Any]]:
    """The content of a file, after that of its base if it has one."""
    tree = _read(path)
    base = tree.pop("base", None)
    if base is None:
        return [tree]
    if not isinstance(base, str):
        raise UserError(f"config {path}: base: give the name of a shipped model or of a file, not {base!r}")
    below = _read(_shipped_path(base) if base in shipped_configs() else path.parent / base)
    if "base" in below:
        raise UserError(f"{path}: its base '{base}' has a base itself; one level is allowed: write the settings out")
    return [below, tree]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path, f"config {path}")
    except UserError as error:
        if path.exists():
            raise
        raise UserError(f"{error}; shipped: {', '.join(shipped_configs())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: has to be a mapping with sections model, data, train")
    # A section whose every line is commented out is read as None; it means "the defaults".
    tree = {str(section): value for section, value in tree.items() if value is not None}
    for_one_task = tree.get("tasks", {})
    if not isinstance(for_one_task, dict) or not all(isinstance(part, dict | None) for part in for_one_task.values()):
        raise UserError(f"config {path}: tasks has to be a mapping of task names to sections model, data, train")
    for task in for_one_task:
        if task not in known_tasks():
            raise UserError(f"config {path}: tasks: unknown task '{task}': {did_you_mean(str(task), known_tasks())}")
    return tree


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; sections on the way that are missing are made. UserError where one of them is a value."""
    *path, last = key.split(".")
    for number, part in enumerate(path, start=1):
        value_of_part = tree.get(part)
        if part == "tile" and value_of_part is not None and not isinstance(value_of_part, dict):
            # ``data.tile: 640`` stands for ``data.tile.size: 640``, which stays when another key of the section is set.
            tree[part] = {"size": value_of_part}
        elif value_of_part is None:
            tree[part] = {}
        elif not isinstance(value_of_part, dict):
            whole = ".".join(path[:number])
            raise UserError(f"-o {key}: {whole} is {value_of_part!r}, which has no keys; set {whole} itself as a whole")
        tree = tree[part]
    tree[last] = value

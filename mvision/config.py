"""The YAML schema: what can be configured, how files, options and ``-o key=value`` combine, and errors that help.

Order of precedence: shipped or given file < command-line options < ``-o a.b=c``. A file may name one ``base:`` file,
and under ``tasks:`` settings that go on top of its own where a model is made for one task alone.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from mvision.errors import UserError
from mvision.explain import explain
from mvision.heads import head_class, serving_task
from mvision.settings import Settings
from mvision.structures import Category

RUN_CONFIG = "config.yaml"
"""What the configuration of a run is called in its folder."""


class BackboneConfig(Settings):
    """A timm model (``features_only``) or, as ``smp:NAME``, an encoder of segmentation-models-pytorch.

    Attributes:
        name: the model's name in its library.
        pretrained: load the library's weights (needs network or its cache).
        strides: the strides of the maps handed to the neck. A plain ViT has one stride only: its last
            ``len(strides)`` maps are taken, and the neck builds the pyramid.
        normalize: ``auto`` takes mean and std from the backbone's own config; ``none`` leaves images in 0..1.
        stage1_shortcut: add the projection that the published ResNet-18/34 "vd" have in their first stage.
    """

    name: str = "resnet18d"
    pretrained: bool = False
    strides: list[int] = [8, 16, 32]
    normalize: Literal["auto", "none"] = "auto"
    stage1_shortcut: bool = False


class NeckConfig(Settings):
    """Settings of ``mvision.neck.HybridEncoder``; see its docstring."""

    embed_dim: int = Field(256, gt=0)
    attention_levels: Literal["coarsest", "all"] | list[int] = "coarsest"
    share_attention: bool = True
    num_heads: int = Field(8, gt=0)
    num_layers: int = Field(1, ge=1)
    ffn_dim: int = Field(1024, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    position: Literal["sincos", "learned"] = "sincos"
    attention: Literal["global", "window", "auto"] = "global"
    window_size: int = Field(20, gt=0)
    window_threshold: int = Field(1600, gt=0)
    depth: int = Field(3, ge=0)
    expansion: float = Field(1.0, gt=0)
    rep_identity: bool = False


class ModelConfig(Settings):
    """Everything needed to build a model again: it travels in the weights file.

    ``heads`` maps a task's name to the settings of its head; ``categories`` is filled in from the data set.
    """

    backbone: BackboneConfig = BackboneConfig()
    neck: NeckConfig = NeckConfig()
    heads: dict[str, SerializeAsAny[Settings]] = {}
    categories: list[Category] = []
    image_size: tuple[int, int] = (640, 640)

    @field_validator("heads", mode="before")
    @classmethod
    def _typed_heads(cls, value: Any) -> Any:
        """Validate each section with the schema of its own head."""
        if not isinstance(value, dict):
            return value
        typed = {}
        for task, settings in value.items():
            schema = head_class(task).Config
            try:
                typed[task] = (
                    settings
                    if isinstance(settings, schema)
                    else schema.model_validate({} if settings is None else settings)
                )
            except ValidationError as error:
                raise UserError(explain(error, schema, f"model.heads.{task}")) from error
        return typed

    @model_validator(mode="after")
    def _one_head_for_both(self) -> ModelConfig:
        """A task that another includes has that one's settings, and must not ask for others."""
        for task in self.heads:
            serving = serving_task(task, self.heads)
            if serving == task:
                continue
            own, other = self.heads[task], self.heads[serving]
            shared = {name: getattr(other, name) for name in type(own).model_fields}
            for name, value in shared.items():
                if name in own.model_fields_set and getattr(own, name) != value:
                    raise UserError(
                        f"model.heads.{task}.{name} is {getattr(own, name)} and model.heads.{serving}.{name} {value}, "
                        f"and one head does both; set that of {serving} alone"
                    )
            self.heads[task] = type(own).model_validate(shared)
        return self

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("image_size")
    @classmethod
    def _multiple_of_32(cls, value: tuple[int, int]) -> tuple[int, int]:
        if any(side < 32 or side % 32 for side in value):
            raise ValueError("height and width have to be multiples of 32")
        return value


class AugmentConfig(Settings):
    """Training augmentation: probabilities in 0..1 unless said otherwise.

    Attributes:
        photometric: brightness, contrast, saturation, hue.
        photometric_strength: how far, by RT-DETR's strengths; more where the light will be another than in training.
        zoom_out: place the image on a larger canvas.
        crop: random crop that keeps objects (SSD's sampling of minimum overlaps).
        flip: left-right.
        vertical_flip: up-down; for images without a natural "up" such as microscopy.
        mosaic: four images in one.
        mixup: blend of two images.
        multi_scale: batches at random sizes within this fraction of ``image_size`` (0 switches it off).
        last_epochs: mosaic, mixup and zoom-out rest for this share of the run's end, 0..1.
    """

    photometric: float = Field(0.5, ge=0, le=1)
    photometric_strength: float = Field(1.0, gt=0, le=10)
    zoom_out: float = Field(0.3, ge=0, le=1)
    crop: float = Field(0.5, ge=0, le=1)
    flip: float = Field(0.5, ge=0, le=1)
    vertical_flip: float = Field(0.0, ge=0, le=1)
    mosaic: float = Field(0.0, ge=0, le=1)
    mixup: float = Field(0.0, ge=0, le=1)
    multi_scale: float = Field(0.0, ge=0, lt=1)
    last_epochs: float = Field(0.1, ge=0, le=1)


class MoreDataConfig(Settings):
    """A further data set to learn from.

    Attributes:
        root: its folder.
        train, val: its splits.
        tasks: what its labels are used for; empty: every task of the model for which it has labels.
        weight: how often an epoch shows each of its images; may be below 1.
    """

    root: str
    train: str = "train"
    val: str = "val"
    tasks: list[str] = []
    weight: float = Field(1.0, gt=0)


class DataConfig(Settings):
    """Where the data lies and how it is loaded.

    Attributes:
        root: the folder; None is the built-in data set.
        train, val: the splits to train and to evaluate on; any annotation file of the folder, by its stem.
        tasks, weight: as in ``MoreDataConfig``.
        more: further data sets. Classes are one where they have one name. What a data set has no class for, or no
            labels, is not taken for absent in its images; a task is evaluated on every data set that is used for it.
        fraction: share of the training images to use, drawn with the run's seed: how much do more labels help?
        augment: what happens to training images.
        workers: loading processes; None picks by the number of cores.
    """

    root: str | None = None
    train: str = "train"
    val: str = "val"
    tasks: list[str] = []
    weight: float = Field(1.0, gt=0)
    more: list[MoreDataConfig] = []
    fraction: float = Field(1.0, gt=0, le=1)
    augment: AugmentConfig = AugmentConfig()
    workers: int | None = Field(None, ge=0)


class TrainConfig(Settings):
    """The training run.

    Attributes:
        optimizer: ``adamw``, or ``muon`` (timm's): orthogonalised momentum for the weights of convolutions and linear
            layers, scaled so that AdamW's learning rates fit; learns faster from random weights. Norms, biases,
            embeddings and the last layers of classifiers get AdamW with Nesterov momentum.
        lr: peak learning rate of neck and heads, for the whole batch as given.
        backbone_lr: peak learning rate of the backbone; None: the same as ``lr``.
        weight_decay: on weights of convolutions and linear layers; norms, biases and embeddings have none.
        beta2: of AdamW.
        warmup_steps: linear warm-up, in optimiser steps.
        schedule: after the warm-up: ``cosine`` to ``final_lr``, ``linear`` to it, or ``constant``.
        final_lr: fraction of the peak that the schedule ends at.
        accumulate: batches per optimiser step.
        clip_norm: largest gradient norm; 0 switches clipping off.
        ema_decay: of the exponential moving average that is evaluated and saved; 0 switches it off.
        ema_warmup: steps over which the decay rises to its value (decay * (1 - exp(-step / ema_warmup))).
        val_interval: epochs between evaluations (the last epoch is always evaluated).
        patience: evaluations without a better AP before the run stops early; 0 never stops.
        channels_last: memory format of images and weights; faster on most machines.
        task_weights: of a joint model's tasks in the loss, by name; 1 where none is given. One head that does two tasks
            has its own name's: instance-seg also for the boxes.
        trackers: any of accelerate's trackers, such as tensorboard, wandb, mlflow.
    """

    epochs: int = Field(72, ge=1)
    batch_size: int = Field(16, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    backbone_lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    beta2: float = Field(0.999, gt=0, lt=1)
    warmup_steps: int = Field(1000, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = Field(0.01, ge=0, le=1)
    accumulate: int = Field(1, ge=1)
    clip_norm: float = Field(0.1, ge=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    ema_warmup: int = Field(2000, ge=1)
    val_interval: int = Field(1, ge=1)
    patience: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    freeze: list[Literal["backbone", "neck"]] = []
    task_weights: dict[str, float] = {}
    seed: int = Field(0, ge=0)
    trackers: list[str] = []


class Config(Settings):
    """The whole file."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_yaml(self) -> str:
        """The complete file, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
    from mvision.backbone import check_backbone_name

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

"""What all readers of published weights share: descriptions in JSON that are checked, classes, and their result."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvision.config import ModelConfig, parse_model_config
from mvision.errors import UserError
from mvision.structures.coco_names import coco_categories
from mvision.structures.objects365_names import objects365_categories
from mvision.weights.stored import read_json

TASK = "detection"
"""What the published models do."""
DECODER = f"heads.{TASK}.decoder."
"""Where their decoder is in a model of mvision."""
MAX_JSON = 2**24  # bytes
_KINDS: dict[type, str] = {dict: "JSON object", list: "list", str: "text", int: "whole number"}


@dataclass
class Published:
    """A published model, in mvision's terms.

    Attributes:
        tensors: by mvision's names. They can lack ``num_batches_tracked`` of norms: some publishers freeze those.
        notes: what was chosen or left out, each a part of a line.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises UserError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path}: is larger than {MAX_JSON:,} bytes, which no description of a model is")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    content = read_json(text, f"{path}: cannot be read")
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def get(section: dict[str, Any], key: str, default: Any, kind: type, path: Path) -> Any:
    """A value of a section that has to be of one type; null stands for the default."""
    value = section.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key} is {reprlib.repr(value)}, and has to be a {_KINDS[kind]}")
    return value


def check(published: dict[str, Any], expected: dict[str, Any], path: Path, prefix: str = "") -> None:
    """Raise UserError if a setting has another value than the expected one; one that is absent has the expected."""
    for key, value in expected.items():
        given = published.get(key, value)
        if given != value:
            raise UserError(f"{path}: {prefix}{key} is {reprlib.repr(given)}, and only {value!r} can be read")


def read_processor(folder: Path) -> dict[str, Any]:
    """The description of the images' preparation in a folder in Hugging Face's format; empty without one."""
    file = folder / "preprocessor_config.json"
    return read_object(file) if file.is_file() else {}


def image_size(processor: dict[str, Any], folder: Path) -> list[Any]:
    """(height, width) of the model's input, not checked; 640 where it is not said."""
    size = get(processor, "size", {}, dict, folder / "preprocessor_config.json")
    return [size.get("height", 640), size.get("width", 640)]


def normalise(config: ModelConfig, tensors: dict[str, Tensor], processor: dict[str, Any], folder: Path) -> None:
    """Add the images' mean and standard deviation to config and tensors, where the processor normalises."""
    if not processor.get("do_normalize", False):
        return
    config.backbone.normalize = "auto"
    file = folder / "preprocessor_config.json"
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        numbers = get(processor, key, [], list, file)
        if len(numbers) != 3 or not all(isinstance(number, int | float) for number in numbers):
            raise UserError(f"{file}: {key} is {numbers!r}, and has to be three numbers")
        tensors[f"backbone.{name}"] = torch.tensor(numbers, dtype=torch.float32).view(3, 1, 1)


def parse(sections: dict[str, Any], path: Path) -> ModelConfig:
    """The config of a model; a UserError names ``path``."""
    try:
        return parse_model_config(sections)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def label_names(labels: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """The name of every row of the classifier, ``LABEL_3`` where ``labels`` (id2label of config.json) has none."""
    bias = tensors.get(f"{DECODER}class_heads.0.bias")
    if bias is None or bias.ndim != 1:
        raise UserError(f"{path}: the weights have no classifier: not a model for object detection")
    return [get(labels, str(index), f"LABEL_{index}", str, path) for index in range(len(bias))]


def categories(names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes of a model with these names: COCO's or Objects365's own ids if they are theirs, else from 0 on."""
    official = coco_categories(names) or objects365_categories(names)
    if official is not None:
        return [category.model_dump() for category in official]
    return [{"id": index, "name": name} for index, name in enumerate(names)]

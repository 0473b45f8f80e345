"""The saved state of a run: all that an exact continuation needs, in one safetensors file, which cannot hold code.

The tensors are the weights (``model.NAME``), their moving average (``average.NAME``), the optimiser's state by the name
of the parameter (``optimizer.KEY.NAME``) and the random numbers of torch of every process (``random.PROCESS.DEVICE``).
Everything else is JSON in the file's header.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvision.config import Config
from mvision.engine.trainer import Progress, Trainer
from mvision.errors import UserError
from mvision.storage.atomic import whole_file

HEADER = "mvision_state"


@dataclass
class SavedState:
    """What the header of a state says.

    Attributes:
        record: the last line of ``metrics.jsonl`` at that time; None where no epoch was finished.
        facts: see ``run_facts``.
        optimizer: by parameter, the values of the optimiser's state that are no tensors.
        scaler: of fp16's loss scale; None with another precision.
        random: by process, the states of Python's and numpy's random numbers.
    """

    progress: Progress
    record: dict[str, Any] | None
    facts: dict[str, Any]
    optimizer: dict[str, dict[str, Any]]
    scaler: dict[str, Any] | None
    random: list[dict[str, Any]]


def save_state(trainer: Trainer, path: Path, record: dict[str, Any] | None) -> None:
    """Write the state; ``trainer.random`` has to be that of this moment.

    Args:
        record: of the last finished epoch.

    Raises:
        UserError: the file cannot be written; the former state is unchanged.
    """
    tensors = {f"model.{name}": tensor for name, tensor in trainer.bare_model.state_dict().items()}
    if trainer.ema is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in trainer.ema.module.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for name, key, value in _optimizer_values(trainer):
        if isinstance(value, Tensor):
            tensors[f"optimizer.{key}.{name}"] = value
        else:
            plain.setdefault(name, {})[key] = value
    for process, states in enumerate(trainer.random):
        tensors |= {f"random.{process}.{device}": state for device, state in states["torch"].items()}
    scaler = trainer.accelerator.scaler
    generators = [{key: states[key] for key in ("python", "numpy")} for states in trainer.random]
    state = SavedState(
        trainer.progress, record, trainer.facts, plain, None if scaler is None else scaler.state_dict(), generators
    )
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as temporary:
            save_file(
                _separate(tensors), temporary, {HEADER: json.dumps({**vars(state), "progress": vars(state.progress)})}
            )
    except (OSError, SafetensorError) as error:
        kept = "the state that was saved before is still there" if path.exists() else "there is no earlier one"
        is_full = "No space left" in str(error)
        reason, cure = ("no space left on the disk", "Make room") if is_full else (error, "Repair that")
        raise UserError(
            f"{path}: the state of the run cannot be written ({reason}); {kept}. {cure}, and go on with --resume "
            f"{path.parent.parent}"
        ) from error


def read_state(path: Path) -> SavedState:
    """The header of a state file.

    Raises:
        UserError: it is damaged, or not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[HEADER])
        progress = Progress(**content["progress"])
        for value in fields(progress):
            if type(getattr(progress, value.name)).__name__ not in (value.type.split("[")[0], "int"):
                raise ValueError(f"progress.{value.name} is {getattr(progress, value.name)!r}")
        saved = SavedState(**{**content, "progress": progress})
        if not {"tasks", "classes", "images", "batches", "optimizer"} <= saved.facts.keys():
            raise ValueError("facts of the run are missing")
        return saved
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def load_state(trainer: Trainer, path: Path, saved: SavedState) -> None:
    """Put a saved state into the model, its average, the optimiser and the sources of random numbers.

    Learning rates, weight decays and the like are those of the config. Of a run with fewer processes than this one,
    the new processes keep the random numbers that they have.

    Raises:
        UserError: the file is damaged, or of another model than the config's.
    """
    try:
        tensors = load_file(path)
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            states.setdefault(part, {})[rest] = tensor
        trainer.bare_model.load_state_dict(states["model"])
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(states.get("average", states["model"]))
        _load_optimizer(trainer, states.get("optimizer", {}), saved.optimizer)
        if trainer.accelerator.scaler is not None and saved.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(saved.scaler)
        process = trainer.accelerator.process_index
        if process < len(saved.random):
            _set_random_state(saved.random[process], states["random"], process, trainer.accelerator.device)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise _damaged(path, error) from error
    trainer.progress = saved.progress


def run_facts(config: Config, images: list[tuple[int, int]], batches: int) -> dict[str, Any]:
    """What has to be the same when a run is resumed, or is told where it is not, as JSON can represent it.

    Args:
        config: with the classes of the data.
        images: of each data set, the numbers of training and validation images.
        batches: of an epoch.
    """
    return {
        "tasks": list(config.model.heads),
        "classes": [{"name": c.name, "keypoints": list(c.keypoints)} for c in config.model.categories],
        "images": [list(numbers) for numbers in images],
        "batches": {"number": batches, "size": config.train.batch_size, "seed": config.train.seed}
        | ({"repeat_threshold": config.data.repeat_threshold} if config.data.repeat_threshold else {}),
        "optimizer": config.train.optimizer,
        "image_size": list(config.model.image_size),
        "steps_of_epoch": math.ceil(batches / config.train.accumulate),
        "drawn": _drawn(config),
    }


def _drawn(config: Config) -> dict[str, Any]:
    """What decides which pictures are for training and which for validation, where chance does."""
    data = config.data
    drawn: dict[str, Any] = {"data.fold": list(data.fold)} if data.fold else {}
    if data.fraction < 1:
        drawn["data.fraction"] = data.fraction
    if any(held_out := [data.val_fraction, *(more.val_fraction for more in data.more)]):
        drawn["data.val_fraction"] = held_out
    return {**drawn, "train.seed": config.train.seed} if drawn else {}


def random_states(accelerator: Accelerator) -> list[dict[str, Any]]:
    """The states of the random numbers of all processes; every process has to call this."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, values, following = random.getstate()
    torch_states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        torch_states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    elif accelerator.device.type == "mps":
        torch_states["mps"] = torch.mps.get_rng_state()
    own = {
        "python": [version, list(values), following],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch_states,
    }
    return gather_object([own]) if accelerator.num_processes > 1 else [own]


def not_finite(trainer: Trainer) -> list[str]:
    """Names of tensors with values that are infinite or NaN: of the weights, their average, the optimiser's state."""
    tensors = {f"weights {name}": tensor for name, tensor in trainer.bare_model.state_dict().items()}
    if trainer.ema is not None:
        tensors |= {f"average {name}": tensor for name, tensor in trainer.ema.module.state_dict().items()}
    for name, key, value in _optimizer_values(trainer):
        if isinstance(value, Tensor):
            tensors[f"optimizer {key} {name}"] = value
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    good = torch.stack([tensor.isfinite().all().to(trainer.accelerator.device) for tensor in tensors.values()])
    return [name for name, is_good in zip(tensors, good.tolist()) if not is_good]


def _optimizer_values(trainer: Trainer) -> Iterator[tuple[str, str, Any]]:
    """Name of the parameter, key and value of everything in the optimiser's state."""
    names = {id(parameter): name for name, parameter in trainer.bare_model.named_parameters()}
    for parameter, values in trainer.optimizer.state.items():
        for key, value in values.items():
            yield names[id(parameter)], key, value


def _load_optimizer(trainer: Trainer, tensors: dict[str, Tensor], plain: dict[str, dict[str, Any]]) -> None:
    names = {id(parameter): name for name, parameter in trainer.bare_model.named_parameters()}
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in plain.items()}
    for key_and_name, tensor in tensors.items():
        key, _, name = key_and_name.partition(".")
        by_name.setdefault(name, {})[key] = tensor
    states, number = {}, 0
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            values = by_name.get(name)
            if values:
                _check_optimizer_state(name, parameter, values, group)
                states[number] = {key: _laid_out_like(parameter, value) for key, value in values.items()}
            number += 1
    current = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict({**current, "state": states})


def _check_optimizer_state(name: str, parameter: Tensor, values: dict[str, Any], group: dict[str, Any]) -> None:
    """Raise ValueError for values that the optimiser would not notice before its first step, or not at all."""
    for key, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{key} of {name} has the shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        elif value is not group.get(key, value):  # such as ``use_muon``
            raise ValueError(f"{key} of {name} is {value!r}, not {group[key]!r}")


def _laid_out_like(parameter: Tensor, value: Any) -> Any:
    """The value in the memory order of its parameter, which fused optimisers rely on; files have one order alone."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _set_random_state(
    generators: dict[str, Any], tensors: dict[str, Tensor], process: int, device: torch.device
) -> None:
    version, values, following = generators["python"]
    random.setstate((version, tuple(values), following))
    kind, keys, *rest = generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors[f"{process}.cpu"])
    state = tensors.get(f"{process}.{device.type}")
    if state is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif state is not None and device.type == "mps":
        torch.mps.set_rng_state(state)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without memory in common, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _damaged(path: Path, error: Exception) -> UserError:
    first = (str(error).splitlines() or [""])[-1].strip() or type(error).__name__
    return UserError(
        f"{path}: the saved state is damaged, or of another model than the config describes ({first}); start a new run "
        f"from its weights: --init {path.parent.parent / 'best.safetensors'}"
    )

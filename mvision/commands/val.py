"""Evaluation of weights on a data set, from what a user names to a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mvision.config import DataConfig, config_of_run
from mvision.data import build_eval_loader, read_validation
from mvision.deploy.exported import is_exported
from mvision.deploy.runtimes import Chosen, open_fastest
from mvision.errors import UserError
from mvision.evaluation import Evaluated, Validation, evaluate_all, make_metrics, tables
from mvision.machine import keep_freed_memory, resolve_device, resolve_precision
from mvision.storage.run_folder import RunFolder
from mvision.weights import load

METRICS = "metrics.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def validate(
    weights: str,
    *,
    tasks: Sequence[str] = (),
    data: str | None = None,
    split: str | None = None,
    output: Path | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Chosen | None = None,
    device: str | None = None,
) -> str:
    """Evaluate weights and return what to print: the data, the COCO table and AP by class of every task.

    Args:
        weights: any source that ``mvision.load`` takes, or an exported model.
        tasks: which of its tasks; none: all of them.
        data: a data folder; None: the one of the weights' run, where there is one, else the built-in data set.
        split: which of its parts; None: the one that the run was validated on, else ``val``.
        output: a folder for ``metrics.json``.
        batch_size: images per step, 16 by default.
        workers: loading processes; None picks by the number of cores.
        precision: None computes as the run did, so that the figures are those that training ended with; otherwise the
            model is opened as ``mvision predict`` does (``open_fastest``). An exported model always is.
        device: None is the first GPU, else the CPU.

    Raises:
        UserError: anything wrong with weights, data, device or folder.
    """
    if output is not None:
        _make(output)  # before the work, not after it
    keep_freed_memory()
    chosen = resolve_device(device)
    model, road = _open(weights, tasks, chosen, precision)
    run = config_of_run(weights)
    default = run.data if run is not None and data is None else DataConfig(root=data)
    messages, parts = read_validation(default, split, model.tasks)
    sizes: dict[str, Any] = {"batch_size": batch_size or 16, "image_size": model.config.image_size, "device": chosen}
    validation = [
        Validation(
            name,
            build_eval_loader(part, DataConfig(workers=workers), **sizes),
            make_metrics(model, part, used_for),
        )
        for name, used_for, part in parts
    ]
    inside = resolve_precision(run.train.precision if run is not None else "auto", chosen) if road is None else "fp32"
    with torch.autocast(chosen.type, DTYPES[inside], enabled=inside != "fp32"):
        figures = evaluate_all(model, validation)
    if output is not None:
        RunFolder(output).write_text(METRICS, json.dumps(figures, indent=2) + "\n")
    return "\n".join([*messages, *([road] if road else []), *tables(validation)])


def _open(
    weights: str, tasks: Sequence[str], device: torch.device, precision: Chosen | None
) -> tuple[Evaluated, str | None]:
    if precision is not None or is_exported(weights):
        return open_fastest(weights, tasks, device, precision or "auto")
    return load(weights, tasks=list(tasks) or None).to(device), None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror or error}); choose another") from error

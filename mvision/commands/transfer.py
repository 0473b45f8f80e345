"""``mvision transfer``: how much a trained encoder helps another task, measured by short trainings.

Every cell of a matrix is one training: a target task, a start (which of the trained weights it begins with), a share of
the training images and a seed. Each finished cell is a line of ``cells.jsonl``. Calling the command again trains only
the missing cells, on any machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from mvision import __version__
from mvision.commands.train import run_config
from mvision.commands.transfer_report import page, plot
from mvision.config import Config
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.machine import device_name, resolve_device
from mvision.storage.atomic import remove_partial_files, write_text
from mvision.storage.run_folder import RunFolder
from mvision.weights import read_weights, resolve_weights

# For each start the parts that are loaded from the weights, and whether they are frozen.
STARTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "random": ((), False),
    "backbone": (("backbone",), False),
    "backbone+neck": (("backbone", "neck"), False),
    "frozen": (("backbone", "neck"), True),
}
CELLS, PLOT, PAGE = "cells.jsonl", "curves.png", "README.md"
EVALUATIONS = 6  # the most evaluations of one training, which are the points of its curve
MAX_EPOCHS = 10**6  # of one training
# What a cell sets itself, and the option that decides it.
OF_CELLS = {
    "train.epochs": "--epochs",
    "train.seed": "--seeds",
    "data.fraction": "--fraction",
    "train.val_interval": "--epochs, whose curve has the points of six evaluations",
    "train.freeze": "the start frozen, which is one of them",
}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix: ``fraction`` is the share of the training images, ``start`` a key of ``STARTS``."""

    task: str
    start: str
    fraction: float
    seed: int


class _Point(BaseModel):
    epoch: float
    score: float


class _Finished(BaseModel):
    """What the page and the plot take from a line of ``cells.jsonl``."""

    task: str
    start: Literal["random", "backbone", "backbone+neck", "frozen"]
    fraction: float
    seed: int
    figure: str
    machine: str
    setup: dict[str, Any]
    curve: list[_Point] = Field(min_length=1)


def transfer_matrix(
    weights: str,
    *,
    family: str | None = None,
    tasks: Sequence[str],
    fractions: Sequence[float] = (1.0, 0.25),
    seeds: int = 3,
    epochs: int = 3,
    output: Path,
    data: str | None = None,
    device: str | None = None,
    assignments: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> str:
    """Train the missing cells, seed after seed, and update the page and its plot after each of them.

    Args:
        weights, family: source of the backbone and neck; all models have its architecture.
        tasks: target tasks. Their heads always start from random weights.
        fractions: shares of the training images. The epochs are divided by the share, so that all have as many steps.
        seeds: the seeds 0..seeds - 1 are used; a seed also decides which images are in the share.
        epochs: of a training on all images.
        output: folder for ``cells.jsonl``, ``curves.png``, ``README.md`` (the page) and the logs of the trainings.
        data: data folder; None: the built-in data set.
        device: None: the first GPU, else the CPU.
        assignments: ``key.sub=value`` for every training.
        log: is called with a line per cell.

    Returns:
        The page's text.

    Raises:
        UserError: the weights, data or options cannot be used, or ``output`` has cells of other options.
    """
    _check(tasks, fractions, epochs)
    _check_assignments(assignments)
    setup = _setup(weights, family, tasks, epochs, data, assignments)
    file = output / CELLS
    records = read_cells(file)
    done = _finished(file, records, setup)
    remove_partial_files(output)
    # All starts of one seed come before the next seed, so that an early stop leaves something to compare.
    product = itertools.product(range(seeds), dict.fromkeys(tasks), dict.fromkeys(fractions), STARTS)
    cells = [Cell(task, start, fraction, seed) for seed, task, fraction, start in product]
    missing = [cell for cell in cells if cell not in done]
    log(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished: {file}")
    for number, cell in enumerate(missing, start=1):
        found = _run(cell, weights, family, epochs, data, output, device, assignments)
        records.append(record := {**asdict(cell), **found, "setup": setup})
        output.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(f"{json.dumps(record)}\n" for record in records))
        log(
            f"{number} of {len(missing)}: {cell.task}, {cell.start}, {cell.fraction:.0%} of the images, "
            f"seed {cell.seed}: {record['figure']} {record['curve'][-1]['score']:.3f} "
            f"in {record['curve'][-1]['seconds']:.0f} s"
        )
        _report(records, output)
    return _report(records, output)


def _check(tasks: Sequence[str], fractions: Sequence[float], epochs: int) -> None:
    """Raise a UserError for options that cannot be a matrix."""
    if not tasks:
        raise UserError("name at least one target, such as --task instance-seg")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise UserError(f"--fraction {fraction:g}: has to be above 0 and at most 1")
        if epochs / fraction > MAX_EPOCHS:
            raise UserError(
                f"--fraction {fraction:g}: {epochs} epochs over all images would be more than {MAX_EPOCHS:,} over this "
                "share of them; give a larger share"
            )


def _check_assignments(assignments: Sequence[str]) -> None:
    """Raise a UserError for settings that every cell of the matrix has its own of."""
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        if key in OF_CELLS:
            raise UserError(f"-o {assignment}: every cell of the matrix has its own {key}; use {OF_CELLS[key]}")


def _run(
    cell: Cell,
    weights: str,
    family: str | None,
    epochs: int,
    data: str | None,
    output: Path,
    device: str | None,
    assignments: Sequence[str],
) -> dict[str, Any]:
    """Train one cell; returns its curve and its final metrics."""
    parts, frozen = STARTS[cell.start]
    config = _config(cell.task, weights, family, data, assignments)
    config.data.fraction, config.train.seed = cell.fraction, cell.seed
    config.train.epochs = passes = max(1, round(epochs / cell.fraction))
    config.train.val_interval = math.ceil(passes / EVALUATIONS)
    config.train.freeze = ["backbone", "neck"] if frozen else []
    name = f"{cell.task}-{cell.start}-{cell.fraction:g}-{cell.seed}"
    folder = output / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)  # left by a training that was stopped
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
        source = {"init": weights, "init_family": family} if parts else {"init": None}
        train(config, output=folder, init_parts=parts or None, device=device, **source)
    metric = head_class(cell.task).primary_metric
    curve = [
        {"epoch": r["epoch"] + 1, "step": r["step"], "seconds": r["seconds"], "score": r["metrics"][cell.task][metric]}
        for r in RunFolder(folder).records()
        if "metrics" in r
    ]
    best = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[cell.task]
    shutil.rmtree(folder)  # it holds weights and optimizer states; the log is kept
    machine = f"{device_name(resolve_device(device))}, torch {torch.__version__}, mvision {__version__}"
    return {"figure": metric, "curve": curve, "best": best, "machine": f"{machine}, {date.today().isoformat()}"}


def _config(task: str, weights: str, family: str | None, data: str | None, assignments: Sequence[str]) -> Config:
    options = {} if data is None else {"data.root": data}
    return run_config(tasks=[task], init=weights, family=family, options=options, assignments=list(assignments))


def _setup(
    weights: str,
    family: str | None,
    tasks: Sequence[str],
    epochs: int,
    data: str | None,
    assignments: Sequence[str],
) -> dict[str, Any]:
    """What all cells of a matrix have in common. Wrong options are refused here, before the first training."""
    source = read_weights(weights, family)
    configs = [_config(task, weights, family, data, assignments) for task in tasks]
    path = resolve_weights(weights)
    file = path if path.is_file() else path / "model.safetensors"
    return {
        "source": "+".join(source.config.heads),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "backbone": source.config.backbone.name,
        "image_size": list(configs[0].model.image_size),
        "data": Path(data).name if data is not None else "built-in",
        "epochs": epochs,
        "options": list(assignments),
    }


def _finished(file: Path, records: Sequence[dict[str, Any]], setup: dict[str, Any]) -> set[Cell]:
    done = set()
    for record in records:
        for key, value in setup.items():
            if record["setup"].get(key) != value:
                raise UserError(
                    f"{file}: its cells were made with {key} {record['setup'].get(key)}, now it is {value}; "
                    "choose another --output"
                )
        done.add(Cell(**{name: record[name] for name in Cell.__dataclass_fields__}))
    return done


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``cells.jsonl``; empty without such a file. Raises UserError if a line is damaged."""
    if not file.is_file():
        return []
    records = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):  # noqa: B007 - below
            if line.strip():
                records.append(json.loads(line))
                _Finished.model_validate(records[-1])
    except ValidationError as error:
        raise UserError(f"{file}, line {number}: not a finished cell of a matrix; remove that line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: a line is not JSON ({error}); remove that line") from error
    return records


def _report(records: Sequence[dict[str, Any]], output: Path) -> str:
    text = page(records, PLOT)
    plot(records, output / PLOT)
    write_text(output / PAGE, text)
    return text

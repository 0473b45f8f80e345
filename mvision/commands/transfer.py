"""What a trained encoder is worth to another task: the same short training from several starts, measured.

Every cell of the matrix is one run: a target task, a start, a share of the training images and a seed. Finished cells
are lines of ``cells.jsonl``, so a stopped matrix goes on where it was, on any machine.
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
from typing import Any

import torch

from mvision import __version__
from mvision.commands.train import run_config
from mvision.commands.transfer_report import page, plot
from mvision.config import Config
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.machine import cpu_name
from mvision.storage.run_folder import RunFolder
from mvision.weights import read_weights, resolve_weights

# What each start takes from the weights, and whether that stays as it is.
STARTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "random": ((), False),
    "backbone": (("backbone",), False),
    "backbone+neck": (("backbone", "neck"), False),
    "frozen": (("backbone", "neck"), True),
}
CELLS, PLOT, PAGE = "cells.jsonl", "curves.png", "README.md"
EVALUATIONS = 6  # of a run, at most: enough points for a curve


@dataclass(frozen=True)
class Cell:
    """One run of the matrix: ``fraction`` is the share of the training images, ``start`` a key of ``STARTS``."""

    task: str
    start: str
    fraction: float
    seed: int


def transfer_matrix(
    weights: str,
    *,
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
    """Run the cells that are missing, seed after seed, and write table, plot and page anew after each.

    Args:
        weights: what the other starts take backbone and neck from; the model has their architecture.
        tasks: targets. Heads always start from random weights.
        fractions: shares of the training images. A smaller share gets as many more epochs: every run has about the
            same number of steps.
        seeds: runs 0..seeds - 1 of every cell; the seed also draws the share of the images.
        epochs: over all the training images.
        output: a folder for ``cells.jsonl``, ``curves.png``, ``README.md`` (the page) and the logs of the runs.
        data: a data folder, None for the built-in set.
        device: None is the first GPU, else the CPU.
        assignments: ``key.sub=value`` for every run.
        log: gets a line per cell.

    Returns:
        The page's text.

    Raises:
        UserError: anything wrong with weights, data or options; cells in ``output`` that were made in another way.
    """
    if not tasks:
        raise UserError("name at least one target, such as --task instance-seg")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise UserError(f"--fraction {fraction:g}: has to be above 0 and at most 1")
    setup = _setup(weights, tasks, epochs, data, assignments)
    file = output / CELLS
    done = _finished(file, setup)
    # All starts of a seed first: whoever stops early has something to compare.
    product = itertools.product(range(seeds), tasks, fractions, STARTS)
    cells = [Cell(task, start, fraction, seed) for seed, task, fraction, start in product]
    missing = [cell for cell in cells if cell not in done]
    log(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished: {file}")
    for number, cell in enumerate(missing, start=1):
        record = {**asdict(cell), **_run(cell, weights, epochs, data, output, device, assignments), "setup": setup}
        output.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        log(
            f"{number} of {len(missing)}: {cell.task}, {cell.start}, {cell.fraction:.0%} of the images, "
            f"seed {cell.seed}: {record['figure']} {record['curve'][-1]['score']:.3f} "
            f"in {record['curve'][-1]['seconds']:.0f} s"
        )
        _report(output)
    return _report(output)


def _run(
    cell: Cell,
    weights: str,
    epochs: int,
    data: str | None,
    output: Path,
    device: str | None,
    assignments: Sequence[str],
) -> dict[str, Any]:
    """Train one cell; its curve and its final figures."""
    parts, frozen = STARTS[cell.start]
    config = _config(cell.task, weights, data, assignments)
    config.data.fraction, config.train.seed = cell.fraction, cell.seed
    config.train.epochs = max(1, round(epochs / cell.fraction))
    config.train.val_interval = math.ceil(config.train.epochs / EVALUATIONS)
    config.train.freeze = ["backbone", "neck"] if frozen else []
    name = f"{cell.task}-{cell.start}-{cell.fraction:g}-{cell.seed}"
    folder = output / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
        train(config, output=folder, init=weights if parts else None, init_parts=parts or None, device=device)
    figure = head_class(cell.task).primary_metric
    curve = [
        {"epoch": r["epoch"] + 1, "step": r["step"], "seconds": r["seconds"], "score": r["metrics"][cell.task][figure]}
        for r in RunFolder(folder).records()
        if "metrics" in r
    ]
    figures = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[cell.task]
    shutil.rmtree(folder)  # weights of dozens of short runs; the log stays
    return {"figure": figure, "curve": curve, "best": figures, "machine": _machine(device)}


def _config(task: str, weights: str, data: str | None, assignments: Sequence[str]) -> Config:
    options = {} if data is None else {"data.root": data}
    return run_config(tasks=[task], init=weights, options=options, assignments=list(assignments))


def _setup(
    weights: str, tasks: Sequence[str], epochs: int, data: str | None, assignments: Sequence[str]
) -> dict[str, Any]:
    """What all cells of a matrix have in common; also finds mistakes in the options before the first run."""
    source = read_weights(weights)
    configs = [_config(task, weights, data, assignments) for task in tasks]
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


def _finished(file: Path, setup: dict[str, Any]) -> set[Cell]:
    done = set()
    for record in read_cells(file):
        for key, value in setup.items():
            if record["setup"].get(key) != value:
                raise UserError(
                    f"{file}: its cells were made with {key} {record['setup'].get(key)}, now it is {value}; "
                    "choose another --output"
                )
        done.add(Cell(**{name: record[name] for name in Cell.__dataclass_fields__}))
    return done


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``cells.jsonl``; none where there is no such file. UserError where one is damaged."""
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{file}: a line of it is no JSON ({error}); remove that line") from error


def _report(output: Path) -> str:
    records = read_cells(output / CELLS)
    text = page(records, PLOT)
    plot(records, output / PLOT)
    RunFolder(output).write_text(PAGE, text)
    return text


def _machine(device: str | None) -> str:
    chosen = torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else cpu_name()
    return f"{chosen}, torch {torch.__version__}, mvision {__version__}, {date.today().isoformat()}"

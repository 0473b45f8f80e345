"""``mvision train --folds K``: K runs, each validated on another part of the images, and the spread of their figures.

A validation split of twenty pictures says little: which twenty they are decides more than what is trained. Every
picture is validated on once here. The folder holds a run for each fold, ``config.yaml``, which the runs have in common,
and ``folds.json``.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mvision.config import RUN_CONFIG, Config
from mvision.engine.stopping import LAUNCHED
from mvision.engine.train import train
from mvision.errors import Stopped, UserError
from mvision.evaluation.tables import figure_text, text_table
from mvision.storage.run_folder import RunFolder

FOLDS = "folds.json"
METRICS = "metrics.json"
LOCK = ".lock"


class Configure(Protocol):
    """``mvision.commands.train.run_config`` with all arguments but these."""

    def __call__(self, *, resume: Path | None, options: dict[str, Any]) -> Config: ...


def is_folded(run: Path | None) -> bool:
    """Whether a folder is one that ``train_folds`` has made."""
    return run is not None and (run / FOLDS).is_file()


def train_folds(
    configure: Configure,
    folds: int | None,
    *,
    options: dict[str, Any],
    output: Path | None = None,
    init: str | None = None,
    init_family: str | None = None,
    resume: Path | None = None,
    device: str | None = None,
) -> str:
    """Train a run for each fold, one after the other, and write their figures.

    Args:
        configure: makes the config of a run from ``options``, dotted keys and values.
        folds: how many there are; None where ``resume`` says it.
        output: the folder; None takes the next number under ``runs/TASK``.
        init, init_family, device: of every run, see ``mvision.engine.train.train``.
        resume: a folder to go on in. Runs that are finished are not trained again.

    Returns:
        A table: every figure of every fold, with the mean and the standard deviation over the folds.

    Raises:
        UserError: options that do not go together, fewer pictures than folds, or whatever a run raises.
    """
    if LAUNCHED in os.environ:
        raise UserError("--folds: the runs follow one another in one process; start it without torchrun")
    if resume is not None:
        state = _read_state(resume, folds, output)
        init, init_family = state["init"], state["init_family"]
        base, is_made, folder = _same_folds(configure, options, resume), False, RunFolder(resume)
    else:
        state = {"folds": _checked(folds), "init": init, "init_family": init_family}
        base = _config_of_all(configure, options, state["folds"])
        is_made = output is None or not output.exists()
        folder = RunFolder.create(output, list(base.model.heads))
    figures, count = [], state["folds"]
    try:
        with folder.claimed():
            folder.write_text(RUN_CONFIG, base.to_yaml())
            folder.write_text(FOLDS, json.dumps(state, indent=2) + "\n")
            for fold in range(1, count + 1):
                path = folder.path / f"fold{fold}"
                print(f"fold {fold} of {count}: {path}")
                if RunFolder(path).state.is_file():
                    train(configure(resume=path, options=options), resume=path, device=device)
                else:
                    config = configure(resume=resume, options={**options, "data.fold": [fold, count]})
                    _train_anew(config, path, init, init_family, device)
                figures.append(json.loads((path / METRICS).read_text(encoding="utf-8")))
            summary = summarised(figures)
            folder.write_text(FOLDS, json.dumps({**state, "figures": summary}, indent=2) + "\n")
    except Stopped as stopped:
        raise Stopped(stopped.number, f"go on with: mvision train --resume {shlex.quote(str(folder.path))}") from None
    except UserError:
        if resume is None and not (folder.path / "fold1").exists():
            _remove(folder.path, is_made)
        raise
    return f"\n{table(summary, count)}\n\n{count} folds: {folder.path / FOLDS}"


def _config_of_all(configure: Configure, options: dict[str, Any], folds: int) -> Config:
    """The config that the runs have in common; what does not go together with folds is refused."""
    base = configure(resume=None, options=options)
    if base.data.fold is not None:
        raise UserError(f"--folds {folds}: it sets data.fold, which is {list(base.data.fold)}; leave one of them out")
    configure(resume=None, options={**options, "data.fold": [1, folds]})
    return base


def _same_folds(configure: Configure, options: dict[str, Any], folder: Path) -> Config:
    """The config of folds that go on; with another seed some pictures would be validated on twice."""
    config, before = configure(resume=folder, options=options), configure(resume=folder, options={})
    seed, wanted = before.train.seed, config.train.seed
    if seed != wanted:
        raise UserError(f"--seed {wanted}: the folds in {folder} were drawn with seed {seed}; leave --seed out")
    return config


def _checked(folds: int | None) -> int:
    if folds is None or folds < 2:
        raise UserError(f"--folds {folds}: two or more are needed, such as --folds 5")
    return folds


def _read_state(resume: Path, folds: int | None, output: Path | None) -> dict[str, Any]:
    """What ``folds.json`` says of a folder that is gone on with."""
    if not is_folded(resume):
        raise UserError(f"--folds {folds}: {resume} is not a folder of folds, there is no {FOLDS} in it; leave one out")
    if output is not None:
        raise UserError(f"--output {output}: a resumed run stays in its folder, {resume}; leave --output out")
    try:
        state = json.loads((resume / FOLDS).read_text(encoding="utf-8"))
        state = {"folds": int(state["folds"]), "init": state["init"], "init_family": state["init_family"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{resume / FOLDS}: damaged; start again with another --output") from error
    if folds not in (None, state["folds"]):
        raise UserError(f"--folds {folds}: there are {state['folds']} in {resume}; leave --folds out")
    return state


def _train_anew(config: Config, path: Path, init: str | None, init_family: str | None, device: str | None) -> None:
    """A fold from its beginning."""
    if path.exists():  # stopped before its first state was saved
        shutil.rmtree(path)
    train(config, output=path, init=init, init_family=init_family, device=device)


def _remove(folder: Path, is_made: bool) -> None:
    """Take back what was written into a folder in which no run has begun."""
    for name in (RUN_CONFIG, FOLDS, LOCK):
        (folder / name).unlink(missing_ok=True)
    if is_made:
        with suppress(OSError):  # something else has come into it
            folder.rmdir()


def summarised(figures: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and name of the figure: the values of the folds, their mean and standard deviation (n - 1).

    A fold without such an object has None, and does not count in the mean; nor is there a deviation of one value.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for task in figures[0]:
        for name in dict.fromkeys(name for of_fold in figures for name in of_fold[task]):
            given = [of_fold[task].get(name, -1.0) for of_fold in figures]
            values = [value if math.isfinite(value) and value >= 0 else None for value in given]
            measured = [value for value in values if value is not None]
            summary.setdefault(task, {})[name] = {
                "folds": values,
                "mean": statistics.fmean(measured) if measured else None,
                "std": statistics.stdev(measured) if len(measured) > 1 else None,
            }
    return summary


def table(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], folds: int) -> str:
    """The figures for a terminal; ``-`` where the data has no such object."""
    rows = [["", *(f"fold {number}" for number in range(1, folds + 1)), "mean", "std"]]
    for task, figures in summary.items():
        for name, figure in figures.items():
            values = [*figure["folds"], figure["mean"], figure["std"]]
            rows.append([f"{task} {name}", *(figure_text(-1.0 if value is None else value) for value in values)])
    return "\n".join(text_table(rows))

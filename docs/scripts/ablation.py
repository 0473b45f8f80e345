"""What the scripts that compare trainings share: rows that are kept as trainings end, and tables over seeds.

A folder of results has rows.jsonl, one line for each training, and table.md. The command that wrote it continues what
was stopped, inside a training too; another one adds to the rows, if the recipe is the same. Several commands may write
to one folder at the same time, as long as ``--only`` gives each of them other trainings.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision.config import Config, load_config
from mvision.engine.train import train
from mvision.evaluation.tables import markdown_table
from mvision.heads import head_class
from mvision.storage.atomic import write_text
from mvision.storage.run_folder import RunFolder

TASKS = ("detection", "instance-seg", "keypoints")
ONLY = "trainings whose name (it is printed before each) matches, such as '*-0' for the first seed; may be repeated"

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        variant: the columns that name what is compared, such as ``{"block": "elan", "depth": 3}``.
        config: with the tasks, the data set's folder and the seed.
        facts: further columns of the row.
    """

    variant: dict[str, Any]
    config: Config
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[Row]:
        """For each task the columns that tell the row of this training from all others."""
        data, seed = name_of(self.config.data.root), self.config.train.seed
        return [{"task": task, "data": data, **self.variant, "seed": seed} for task in self.config.model.heads]

    @property
    def name(self) -> str:
        """Of the run's folder."""
        own = [*self.variant.values(), self.config.train.seed]
        return "-".join(map(str, [*self.config.model.heads, name_of(self.config.data.root), *own]))


def run_trials(options: argparse.Namespace, trials: Iterable[Trial], table: Callable[[list[Row]], str]) -> None:
    """Train what has no row yet, and write ``table.md`` after each training."""
    out, recipe = options.out, recipe_of(options)
    out.mkdir(parents=True, exist_ok=True)
    rows = _read_rows(out / "rows.jsonl", recipe)
    for trial in trials:
        if options.only and not any(fnmatch(trial.name, pattern) for pattern in options.only):
            continue
        if all(any(key.items() <= row.items() for row in rows) for key in trial.keys):
            continue
        begin = time.monotonic()
        run = out / "runs" / trial.name
        print(f"--- {run.name}: {trial.facts}", flush=True)
        curves, clock = _train(trial, run, options.device)
        seconds = round(time.monotonic() - begin, 1)
        more = [
            {**key, **trial.facts, "ap": curve[-1][1], "curve": curve, "clock": clock, "seconds": seconds, **recipe}
            | {"torch": torch.__version__}
            for key, curve in zip(trial.keys, curves)
        ]
        rows = _add_rows(out, more, recipe, table)
        shutil.rmtree(run)
    print(table(rows) if rows else "no row yet")


def _add_rows(out: Path, more: list[Row], recipe: Row, table: Callable[[list[Row]], str]) -> list[Row]:
    """All rows with these, in the files too; other commands wait meanwhile, and theirs are kept."""
    with (out / "rows.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*_read_rows(out / "rows.jsonl", recipe), *more]
        write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_text(out / "table.md", table(rows))
    return rows


def _train(
    trial: Trial, run: Path, device: str | None
) -> tuple[list[list[tuple[int, float]]], list[tuple[int, float]]]:
    """For each task (epoch, AP) of every evaluation, by its primary metric; (step, seconds so far) of each of these."""
    if RunFolder(run).state.exists():
        train(load_config(file=run / "config.yaml"), resume=run, device=device)
    else:
        shutil.rmtree(run, ignore_errors=True)  # stopped before there was anything to continue
        train(trial.config, output=run, device=device)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [(record["epoch"] + 1, record["metrics"]) for record in records if "metrics" in record]
    clock = [(record["step"], record["seconds"]) for record in records if "metrics" in record]
    metrics = {task: head_class(task, head).primary_metric for task, head in trial.config.model.heads.items()}
    return [[(epoch, found[task][metric]) for epoch, found in evaluated] for task, metric in metrics.items()], clock


def _read_rows(file: Path, recipe: Row) -> list[Row]:
    """The rows of earlier commands, which must have the same recipe: a table has one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if any(row[name] != value for name, value in recipe.items()):
            other = {name: row[name] for name in recipe}
            raise SystemExit(f"{file} has rows of {other}, not of {recipe}: choose another folder")
    return rows


def tables(rows: list[Row], names: list[str], header: list[str], cells: Callable[[Row], list[str]]) -> str:
    """Markdown: for each task and data set a table of the last AP over the seeds, the best one in bold.

    Args:
        names: the columns of a variant.
        header: of the columns that ``cells`` gives, from the first row of a variant.
    """
    pages = []
    for (task, data), group in _grouped(rows, ["task", "data"]):
        lines = []
        for _, same in _grouped(group, names):
            found = [row["ap"] for row in same]
            spread = f"{min(found):.3f} to {max(found):.3f}"
            lines.append([*cells(same[0]), f"{statistics.mean(found):.3f}", spread, str(len(found))])
        best = max(line[-3] for line in lines)
        shown = [[*line[:-3], f"**{line[-3]}**" if line[-3] == best else line[-3], *line[-2:]] for line in lines]
        pages.append("\n".join([f"{task} on {data}:", "", *markdown_table([*header, "AP", "range", "seeds"], shown)]))
    return "\n\n".join(pages) + "\n"


def _grouped(rows: list[Row], names: list[str]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Rows that agree in these columns, in the order in which they came first."""
    order: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        order.setdefault(tuple(row[name] for name in names), []).append(row)
    yield from order.items()


def parser_of(description: str | None, by_epochs: bool = True) -> argparse.ArgumentParser:
    """The options that all of these scripts have; ``by_epochs``: with those of one model and its epochs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the rows and the table")
    parser.add_argument(
        "--data", action="append", default=[], type=task_and_folder, metavar="TASK=FOLDER",
        help="a data set to train TASK on, TASK= for the built-in one; may be repeated  [default: that, for all tasks]",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help=ONLY)
    if by_epochs:
        parser.add_argument("--model", default="tiny", help="a shipped config")
        parser.add_argument("--epochs", type=int, metavar="N", help="instead of the config's")
    parser.add_argument("--set", "-o", action="append", default=[], metavar="KEY=VALUE", help="as in mvision train")
    parser.add_argument("--device", default=None)
    return parser


def config_of(task: str, options: argparse.Namespace, overrides: dict[str, Any] | None = None) -> Config:
    """The config of a task, with the settings of the command line; ``overrides`` have dotted keys."""
    overrides = dict(overrides or {})
    if options.epochs is not None:
        overrides["train.epochs"] = options.epochs
    config = load_config(options.model, tasks=[task], overrides=overrides, assignments=options.set)
    config.train.epochs = epochs_of(config)
    return config


def epochs_of(config: Config) -> int:
    """Those of a large data set where the config leaves it to the run: all that are compared have equally many."""
    epochs = config.train.epochs
    return config.train.full_epochs if isinstance(epochs, str) else epochs


def recipe_of(options: argparse.Namespace) -> Row:
    """What all rows of a folder have in common."""
    return {name: getattr(options, name) for name in ("model", "epochs") if hasattr(options, name)} | {
        "settings": options.set
    }


def places(data: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """(task, folder) of ``--data``; none stands for all tasks on the built-in set."""
    found: list[tuple[str, str | None]] = [*data] or [(task, None) for task in TASKS]
    for (task, one), (other_task, other) in itertools.combinations(found, 2):
        if (task, name_of(one)) == (other_task, name_of(other)):
            raise SystemExit(f"--data: {one} and {other} have one name, so that rows could not tell them apart")
    return found


def task_and_folder(text: str) -> tuple[str, str | None]:
    """``TASK=FOLDER`` of ``--data``; no folder stands for the built-in set."""
    task, equals, folder = text.partition("=")
    if not equals or task not in TASKS:
        raise SystemExit(f"--data: {text!r} is not TASK=FOLDER with a task of {', '.join(TASKS)}")
    return task, folder or None


def name_of(folder: str | None) -> str:
    """A data set's name in the rows."""
    return Path(folder).resolve().name if folder else "built-in"

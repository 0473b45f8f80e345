"""What one model for all three tasks loses to three models, with each way to predict poses.

    python docs/scripts/joint_tasks.py OUT --seeds 3
    python docs/scripts/joint_tasks.py OUT --seeds 3 --poses own shared

Trains a model for each task alone and joint models with poses from a grid, from queries of their own and from those of
the objects, all with equal steps and sizes. Poses from the objects' queries are compared with poses alone from queries
of their own. See ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import TASKS, Row, Trial, epochs_of, parser_of, run_trials, tables

from mvision.config import load_config
from mvision.errors import Stopped

EVALUATIONS = 4  # in a training, evenly spaced
POSES = {"dense": {"kind": "dense"}, "own": {"kind": "query"}, "shared": {"kind": "query", "queries": "shared"}}
ALONE, JOINT = "alone", "joint"


def main() -> None:
    """Train what has no row yet, and write the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--poses", nargs="+", choices=list(POSES), default=list(POSES))
    parser.add_argument("--forms", nargs="+", choices=[ALONE, JOINT], default=[ALONE, JOINT])
    options = parser.parse_args()
    if options.data:
        parser.error("--data: choose a folder with -o data.root=FOLDER, it has to have the labels of all tasks")
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all forms."""
    for seed, form in itertools.product(range(options.seeds), options.forms):
        groups = [TASKS] if form == JOINT else [(task,) for task in TASKS]
        for tasks, poses in itertools.product(groups, options.poses):
            if form == ALONE and tasks != ("keypoints",) and poses != options.poses[0]:
                continue  # boxes and masks alone are the same whatever the poses are predicted from
            if form == ALONE and tasks == ("keypoints",) and poses == "shared":
                continue
            yield trial(options, form, tasks, poses, seed)


def trial(options: argparse.Namespace, form: str, tasks: tuple[str, ...], poses: str, seed: int) -> Trial:
    """All tasks have the size of the joint model."""
    chosen = {f"model.heads.keypoints.{key}": value for key, value in POSES[poses].items()}
    overrides = chosen if "keypoints" in tasks else {}
    overrides["model.image_size"] = load_config(options.model, tasks=list(TASKS)).model.image_size
    if options.epochs is not None:
        overrides["train.epochs"] = options.epochs
    config = load_config(options.model, tasks=list(tasks), overrides=overrides, assignments=options.set)
    config.train.seed, config.train.epochs = seed, epochs_of(config)
    config.train.val_interval = max(1, epochs_of(config) // EVALUATIONS)
    return Trial({"form": form, "poses": poses if "keypoints" in tasks else "none"}, config)


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``, with the AP at each evaluation for the first seed."""
    ordered = sorted(rows, key=lambda row: (TASKS.index(row["task"]), row["form"], row["poses"]))
    header = ["model", "poses", "seconds", "AP in the course of the first seed"]
    return tables(ordered, ["form", "poses"], header, cells)


def cells(row: Row) -> list[str]:
    return [row["form"], row["poses"], f"{row['seconds']:.0f}", ", ".join(f"{ap:.3f}" for _, ap in row["curve"])]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

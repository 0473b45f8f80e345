"""``mvision train``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from mvision.cli.options import (
    EXISTING_FILE,
    EXISTING_FOLDER,
    OUTPUT_FOLDER,
    WEIGHTS,
    ImageSize,
    OneOf,
    assignments_option,
    device_option,
    family_option,
)
from mvision.heads import known_tasks
from mvision.machine import PrecisionOption

TASKS = known_tasks()


@click.command(short_help="Train a model; leaves a run folder.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="T",
    help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}; several make one model.  [default: {TASKS[0]}]",
)
@click.option(
    "--data",
    metavar="DIR",
    help="COCO, Roboflow or YOLO folder, or builtin:N for the built-in data set with N training images.  [default: the "
    "built-in data set]",
)
@click.option(
    "--model", metavar="NAME", help="A shipped model (see mvision info) or any timm backbone.  [default: tiny]"
)
@click.option("--config", "file", type=EXISTING_FILE, metavar="FILE", help="A YAML file instead of a shipped model.")
@assignments_option
@click.option("--epochs", type=int, metavar="N", help="Passes over the data.  [default: the config's]")
@click.option("--batch-size", type=int, metavar="N", help="Images per step, over all devices.  [default: the config's]")
@click.option("--image-size", type=ImageSize(), metavar="N|HxW", help="Multiples of 32.  [default: the config's]")
@click.option("--init", metavar="WEIGHTS", help=f"Start from {WEIGHTS}.")
@family_option
@click.option(
    "--freeze", multiple=True, type=OneOf(["backbone", "neck"]), metavar="PART", help="Keep backbone or neck as it is."
)
@click.option("--folds", type=int, metavar="K", help="K runs, each validated on another part of the images.")
@click.option("--resume", type=EXISTING_FOLDER, metavar="RUN", help="Continue a stopped run, exactly where it was.")
@click.option("--output", type=OUTPUT_FOLDER, metavar="DIR", help="The run's folder.  [default: runs/TASK/N]")
@device_option
@click.option(
    "--precision",
    type=OneOf(get_args(PrecisionOption)),
    metavar="P",
    help="fp32, bf16 or fp16.  [default: the fastest one here]",
)
@click.option("--workers", type=int, metavar="N", help="Loading processes.  [default: by the number of cores]")
@click.option("--seed", type=int, metavar="N", help="Same seed, same run.  [default: 0]")
def train(
    tasks: tuple[str, ...],
    data: str | None,
    model: str | None,
    file: Path | None,
    assignments: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    image_size: tuple[int, int] | None,
    init: str | None,
    family: str | None,
    freeze: tuple[str, ...],
    folds: int | None,
    resume: Path | None,
    output: Path | None,
    device: str | None,
    precision: str | None,
    workers: int | None,
    seed: int | None,
) -> None:
    """Train a model and leave a run folder with weights, figures and pictures.

    Without --data it trains on the built-in data set, which is generated on first use and needs no network.

    \b
    Example:
      mvision train --task detection --data my_data --model small --epochs 50
    """
    from mvision.commands.early import expect_workers

    expect_workers(workers, assignments, config_follows=file is not None or resume is not None)
    from mvision.commands.folds import is_folded, train_folds
    from mvision.commands.train import run_config
    from mvision.commands.train import train as train_model

    options = {
        "data.root": data,
        "data.workers": workers,
        "model.image_size": image_size,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.precision": precision,
        "train.seed": seed,
        "train.freeze": list(freeze) or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    configure = partial(
        run_config, tasks=list(tasks), model=model, file=file, init=init, family=family, assignments=list(assignments)
    )
    start: dict[str, Any] = {"output": output, "init": init, "init_family": family, "resume": resume, "device": device}
    if folds is not None or is_folded(resume):
        click.echo(train_folds(configure, folds, options=given, **start))
    else:
        train_model(configure(resume=resume, options=given), **start)

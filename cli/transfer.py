"""``mvision transfer``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import OUTPUT_FOLDER, WEIGHTS, assignments_option, device_option


@click.command(short_help="Measure what trained weights are worth to other tasks.")
@click.option("--init", "weights", required=True, metavar="WEIGHTS", help=f"Whose backbone and neck: {WEIGHTS}.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=["instance-seg", "keypoints"],
    show_default=True,
    metavar="T",
    help="Targets.",
)
@click.option(
    "--fraction",
    "fractions",
    multiple=True,
    type=float,
    default=[1.0, 0.25],
    show_default=True,
    metavar="X",
    help="Shares of the training images.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Runs of each cell."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Over all training images."
)
@click.option("--data", metavar="DIR", help="COCO, Roboflow or YOLO folder.  [default: the built-in data set]")
@assignments_option
@click.option(
    "--output",
    type=OUTPUT_FOLDER,
    default=Path("transfer"),
    show_default=True,
    metavar="DIR",
    help="Where to write, and to go on.",
)
@device_option
def transfer(
    weights: str,
    tasks: tuple[str, ...],
    fractions: tuple[float, ...],
    seeds: int,
    epochs: int,
    data: str | None,
    assignments: tuple[str, ...],
    output: Path,
    device: str | None,
) -> None:
    """Train each target task from random weights, from the backbone of WEIGHTS, from its backbone and neck, and from
    both frozen, on shares of the data, and compare.

    Leaves cells.jsonl (a line per finished run; the same command goes on where it stopped), curves.png and README.md.

    \b
    Example:
      mvision transfer --init runs/detection/1 --task keypoints --seeds 1
    """
    from mvision.commands.transfer import transfer_matrix

    text = transfer_matrix(
        weights,
        tasks=tasks,
        fractions=fractions,
        seeds=seeds,
        epochs=epochs,
        output=output,
        data=data,
        device=device,
        assignments=assignments,
        log=click.echo,
    )
    click.echo(text)

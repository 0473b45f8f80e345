"""``mvision transfer``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import OUTPUT_FOLDER, WEIGHTS, assignments_option, device_option, echo, family_option


@click.command(short_help="Measure how much trained weights help other tasks.")
@click.option("--init", "weights", required=True, metavar="WEIGHTS", help=f"Source of backbone and neck: {WEIGHTS}.")
@family_option
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=["instance-seg", "keypoints"],
    show_default=True,
    metavar="T",
    help="Target tasks.",
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
    "--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, metavar="N", help="Seeds of each training."
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 10_000),
    default=3,
    show_default=True,
    metavar="N",
    help="Epochs over all images.",
)
@click.option("--data", metavar="DIR", help="COCO, Roboflow or YOLO folder.  [default: the built-in data set]")
@assignments_option
@click.option(
    "--output",
    type=OUTPUT_FOLDER,
    default=Path("transfer"),
    show_default=True,
    metavar="DIR",
    help="Where to write, and to continue.",
)
@device_option
def transfer(
    weights: str,
    family: str | None,
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

    Writes cells.jsonl (a line per finished training), curves.png and README.md. The same command continues a stopped
    matrix.

    \b
    Example:
      mvision transfer --init runs/detection/1 --task keypoints --seeds 1
    """
    from mvision.commands.transfer import transfer_matrix

    text = transfer_matrix(
        weights,
        family=family,
        tasks=tasks,
        fractions=fractions,
        seeds=seeds,
        epochs=epochs,
        output=output,
        data=data,
        device=device,
        assignments=assignments,
        log=echo,
    )
    echo(text)

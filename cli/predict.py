"""``mvision predict``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from mvision.cli.options import OUTPUT_FOLDER, WEIGHTS, OneOf, device_option, echo
from mvision.machine import InferencePrecisionOption

UNIT = click.FloatRange(0, 1)


@click.command(short_help="Find objects in images, folders and videos.")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: all of the weights]")
@click.option("--weights", metavar="W", help=f"The model: {WEIGHTS}.  [default: the newest run of the task]")
@click.option("--threshold", default=0.5, show_default=True, type=UNIT, metavar="X", help="Lowest score that is kept.")
@click.option("--output", type=OUTPUT_FOLDER, metavar="DIR", help="Where to write.  [default: predictions]")
@click.option(
    "--precision",
    type=OneOf(get_args(InferencePrecisionOption)),
    default="auto",
    show_default=True,
    metavar="P",
    help="fp32, bf16, or auto: bf16 where the hardware has it.",
)
@device_option
def predict(
    sources: tuple[str, ...],
    tasks: tuple[str, ...],
    weights: str | None,
    threshold: float,
    output: Path | None,
    precision: InferencePrecisionOption,
    device: str | None,
) -> None:
    """Find objects in every SOURCE: an image, a folder, a glob, a video or a camera's number.

    Writes predictions.json (a COCO results list) and one picture per image. Without SOURCE it takes sample images of
    the data that the run was trained on.

    \b
    Example:
      mvision predict --task detection photos/ --weights runs/detection/1 --output found
    """
    from mvision.commands.predict import predict_job

    summary = predict_job(
        sources,
        tasks=tasks,
        weights=weights,
        threshold=threshold,
        output=output,
        device=device,
        precision=precision,
        log=echo,
    )
    echo(summary)

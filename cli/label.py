"""``mvision label``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvision.cli.options import (
    OUTPUT_FOLDER,
    WEIGHTS,
    OneOf,
    device_option,
    echo,
    family_option,
    precision_option,
    thresholds_callback,
)
from mvision.machine import PrecisionOption

FORMATS = ("coco", "yolo", "cvat", "label-studio", "fiftyone")


@click.command(short_help="Write predictions as labels to correct in CVAT, Label Studio and others.")
@click.argument("folder", metavar="FOLDER")
@click.option("--format", "format_name", type=OneOf(FORMATS), required=True, metavar="F", help=", ".join(FORMATS) + ".")
@click.option("--weights", metavar="W", help=f"The model: {WEIGHTS}.  [default: the newest run of the task]")
@family_option
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: all of the weights]")
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    callback=thresholds_callback,
    metavar="X",
    help="Lowest score that is written, CLASS=X for one class, or best. Repeatable.  [default: 0.3]",
)
@click.option(
    "--review",
    "reviews",
    multiple=True,
    callback=thresholds_callback,
    metavar="X",
    help="Objects with a lower score are marked for review; CLASS=X, or best. Repeatable.  [default: 0.5]",
)
@click.option("--nms", type=float, metavar="IOU", help="Keep the better of two boxes of any classes that overlap more.")
@click.option(
    "--masks",
    type=OneOf(("polygon", "rle")),
    metavar="FORM",
    help="Masks as polygons with few points, or rle: exact, for tools with a brush.  [default: polygon]",
)
@click.option(
    "--image-url", metavar="URL", help="Label Studio: what the pictures' addresses begin with, such as s3://b/."
)
@click.option("--output", type=OUTPUT_FOLDER, metavar="DIR", help="A new folder.  [default: labelled]")
@precision_option
@device_option
def label(
    folder: str,
    format_name: str,
    weights: str | None,
    family: str | None,
    tasks: tuple[str, ...],
    thresholds: Any,
    reviews: Any,
    nms: float | None,
    masks: str | None,
    image_url: str | None,
    output: Path | None,
    precision: PrecisionOption,
    device: str | None,
) -> None:
    """Find objects in the pictures of FOLDER and write them as labels that people correct.

    The output is a new folder with the labels and links to the pictures. A run that was stopped goes on with the same
    command. mvision train --data reads what CVAT, Label Studio and FiftyOne export after the correction.

    \b
    Example:
      mvision label photos/ --weights runs/detection/1 --format cvat --output for_cvat
      mvision train --data corrected_export --init runs/detection/1
    """
    from mvision.commands.label import label_job

    summary = label_job(
        folder,
        format_name=format_name,
        weights=weights,
        family=family,
        tasks=tasks,
        threshold=thresholds,
        review=reviews,
        nms=nms,
        masks=masks,
        image_url=image_url,
        output=output,
        device=device,
        precision=precision,
        log=echo,
    )
    echo(summary)

"""``mvision val``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from mvision.cli.options import OUTPUT_FOLDER, WEIGHTS, OneOf, device_option, echo, family_option, tile_options
from mvision.machine import PrecisionOption


@click.command(short_help="Evaluate weights: the COCO table and AP by class.")
@click.option("--weights", required=True, metavar="W", help=f"What to evaluate: {WEIGHTS}.")
@family_option
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: all of the weights]")
@click.option("--data", metavar="DIR", help="COCO, Roboflow or YOLO folder.  [default: as in training]")
@click.option("--split", metavar="NAME", help="Which split of the data.  [default: val]")
@click.option(
    "--output",
    type=OUTPUT_FOLDER,
    metavar="DIR",
    help="Also write metrics.json, predictions.json and curves there.",
)
@click.option("--write-thresholds", is_flag=True, help="Put the best thresholds into the weights.")
@tile_options
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Images or tiles per step.  [default: 16]")
@click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Loading processes.  [default: by cores]")
@click.option(
    "--precision",
    type=OneOf(get_args(PrecisionOption)),
    metavar="P",
    help="Compute as predict does: auto, fp32, bf16 or fp16.  [default: as in training]",
)
@device_option
def val(
    weights: str,
    family: str | None,
    tasks: tuple[str, ...],
    data: str | None,
    split: str | None,
    output: Path | None,
    write_thresholds: bool,
    tile: tuple[int, int] | None,
    overlap: float | None,
    no_whole: bool,
    batch_size: int | None,
    workers: int | None,
    precision: PrecisionOption | None,
    device: str | None,
) -> None:
    """Evaluate weights on a split of the data: the COCO table, AP and the best threshold of every class.

    With --tile, pictures are evaluated as predict finds objects in them on tiles: the default for weights that were
    trained on tiles (data.tile); --tile 0 takes whole pictures.

    \b
    Example:
      mvision val --weights runs/detection/1 --data my_data
    """
    from mvision.commands.early import expect_workers

    expect_workers(workers)
    from mvision.commands.val import validate

    tables = validate(
        weights,
        tasks=tasks,
        family=family,
        data=data,
        split=split,
        output=output,
        write_thresholds=write_thresholds,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        device=device,
        tile=tile,
        overlap=overlap,
        whole=not no_whole,
    )
    echo(tables)

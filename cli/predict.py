"""``mvision predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvision.cli.options import (
    WEIGHTS,
    FolderOrUrl,
    device_option,
    echo,
    family_option,
    precision_option,
    thresholds_callback,
    tile_options,
)
from mvision.cli.ray_options import ray_options
from mvision.machine import PrecisionOption


@click.command(short_help="Find objects in images, folders and videos.")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: all of the weights]")
@click.option("--weights", metavar="W", help=f"The model: {WEIGHTS}.  [default: the newest run of the task]")
@family_option
@click.option("--data", metavar="DIR", help="A COCO, Roboflow or YOLO folder in place of SOURCE.")
@click.option("--split", metavar="NAME", help="Which split of it.  [default: val]")
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    callback=thresholds_callback,
    metavar="X",
    help="Lowest score that is kept, CLASS=X for one class, or best. Repeatable.  [default: 0.5]",
)
@click.option("--multi-label", is_flag=True, help="A place may be several classes.  [default: its best one]")
@click.option("--nms", type=float, metavar="IOU", help="Keep the better of two boxes of any classes that overlap more.")
@click.option(
    "--track",
    is_flag=False,
    flag_value="bytetrack",
    metavar="[NAME]",
    help="Follow objects through videos, by bytetrack, botsort, cbiou, mcbyte, ocsort or sort.  [default: bytetrack]",
)
@tile_options
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Images or tiles at once.  [default: CPU 1, GPU 8]"
)
@click.option("--output", type=FolderOrUrl(), metavar="DIR", help="Where to write.  [default: predictions]")
@precision_option
@click.option("--no-pictures", is_flag=True, help="Write predictions.json alone, which is faster.")
@device_option
@ray_options
def predict(
    sources: tuple[str, ...],
    tasks: tuple[str, ...],
    weights: str | None,
    family: str | None,
    data: str | None,
    split: str | None,
    thresholds: Any,
    multi_label: bool,
    nms: float | None,
    track: str | None,
    tile: tuple[int, int] | None,
    overlap: float | None,
    no_whole: bool,
    batch_size: int | None,
    output: Path | None,
    precision: PrecisionOption,
    no_pictures: bool,
    device: str | None,
) -> None:
    """Find objects in every SOURCE: an image, a folder, a glob, a video, a URL (http, rtsp) or a camera's number.

    Writes predictions.json (a COCO results list) and one picture per image; with --track, also a text file in the
    format of the MOT challenge for every video. Without SOURCE it takes sample images of the data that the run was
    trained on. With --data, predictions.json has the data set's image ids, and results of every score unless a
    threshold is given: what an evaluation needs.

    With --tile, pictures that are larger than a tile are predicted on window by window, so that small objects in them
    are seen at their size. Objects that a border cuts are joined.

    \b
    Example:
      mvision predict --task detection photos/ --weights runs/detection/1 --output found
    """
    from mvision.commands.predict import predict_job

    summary = predict_job(
        sources,
        tasks=tasks,
        weights=weights,
        family=family,
        data=data,
        split=split,
        threshold=thresholds,
        multi_label=multi_label,
        nms=nms,
        track=track,
        tile=tile,
        overlap=overlap,
        whole=not no_whole,
        batch_size=batch_size,
        output=output,
        device=device,
        precision=precision,
        pictures=not no_pictures,
        log=echo,
    )
    echo(summary)

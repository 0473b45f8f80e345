"""``mvision data``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import EXISTING_FILE, OneOf, SuggestingGroup, assignments_option, echo
from mvision.heads import known_tasks

SPLITS_HELP = "Only this split. Repeatable.  [default: {}]"


@click.group(cls=SuggestingGroup, short_help="Check, show or convert a data set.")
def data() -> None:
    """Check, show or convert a data set. DIR is a COCO, Roboflow or YOLO folder, or a YOLO data.yaml."""


@data.command(short_help="Report the contents of a data set and its faults.")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--split", "splits", multiple=True, metavar="NAME", help=SPLITS_HELP.format("train, val and test"))
@click.option("--quick", is_flag=True, help="Read the annotations only, do not open the images.")
@click.option("--all", "every_place", is_flag=True, help="List every place of every fault, not five of each kind.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=OneOf(known_tasks()),
    metavar="T",
    help=f"What the data is for, as in mvision train. Repeatable.  [default: {known_tasks()[0]}]",
)
@click.option("--config", "file", type=EXISTING_FILE, metavar="FILE", help="The YAML file of the training.")
@assignments_option
@click.pass_context
def check(
    context: click.Context,
    folder: str | None,
    splits: tuple[str, ...],
    quick: bool,
    every_place: bool,
    tasks: tuple[str, ...],
    file: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Read annotations and images, and report the contents and every kind of fault with its count.

    Without DIR the built-in data set is checked. The exit code is 2 exactly where mvision train, with the same tasks
    and settings, would refuse the data.

    \b
    Example:
      mvision data check my_data --task keypoints -o data.val_fraction=0.2
      mvision data check my_maps -o data.tile=640
    """
    from mvision.commands.data import check

    report = check(folder, splits, quick=quick, tasks=tasks, file=file, assignments=assignments)
    echo(report.text(every_place))
    if not report.usable:
        context.exit(2)


@data.command(short_help="Draw images with their labels on a sheet.")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--split", default="train", show_default=True, metavar="NAME", help="Which split.")
@click.option("--count", default=16, show_default=True, type=click.IntRange(min=1), metavar="N", help="Images.")
@click.option("--augmented", is_flag=True, help="Augmented as in training.")
@click.option("--config", "file", type=EXISTING_FILE, metavar="FILE", help="The YAML file whose augmentation is shown.")
@assignments_option
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), metavar="N", help="Which images.")
@click.option("--output", default="data.jpg", show_default=True, metavar="FILE", help="A .jpg or .png file.")
def show(
    folder: str | None,
    split: str,
    count: int,
    augmented: bool,
    file: Path | None,
    assignments: tuple[str, ...],
    seed: int,
    output: str,
) -> None:
    """Draw random images with their boxes, masks and keypoints on one sheet.

    Without DIR the built-in data set is shown.

    \b
    Example:
      mvision data show my_data --split val --output val.jpg
      mvision data show my_data --augmented -o data.augment.copy_paste=0.5 -o data.augment.rotate=30
    """
    from mvision.commands.data import show

    text = show(
        folder,
        output,
        split=split,
        count=count,
        augmented=augmented,
        seed=seed,
        file=file,
        assignments=assignments,
    )
    echo(text)


@data.command(short_help="Copy a data set of any layout as plain COCO.")
@click.argument("folder", metavar="DIR")
@click.argument("destination", metavar="OUTPUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", "splits", multiple=True, metavar="NAME", help=SPLITS_HELP.format("all"))
def convert(folder: str, destination: Path, splits: tuple[str, ...]) -> None:
    """Copy a data set into the new folder OUTPUT as images/ and annotations/train.json, annotations/val.json.

    \b
    Example:
      mvision data convert yolo_export/data.yaml my_data
    """
    from mvision.commands.data import convert

    echo(convert(folder, destination, splits))

"""``mvision data``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import SuggestingGroup, image_counter

SPLITS_HELP = "Only this part of the data. Repeatable.  [default: {}]"


@click.group(cls=SuggestingGroup, short_help="Is a data set sound, and what is in it? Convert it.")
def data() -> None:
    """Look into a data set, or convert it. DIR is a COCO, Roboflow or YOLO folder, or a YOLO data.yaml."""


@data.command(short_help="Read everything; name and count what is wrong.")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--split", "splits", multiple=True, metavar="NAME", help=SPLITS_HELP.format("train, val and test"))
@click.option("--quick", is_flag=True, help="Read the annotations only, do not open the images.")
@click.pass_context
def check(context: click.Context, folder: str | None, splits: tuple[str, ...], quick: bool) -> None:
    """Read annotations and images, tell what is in them, and name and count what is wrong.

    Without DIR it is the built-in data set. The exit code is 2 if training would refuse the data.

    \b
    Example:
      mvision data check my_data
    """
    from mvision.data import find_layout
    from mvision.data.tools.check import check as check_layout

    layout = find_layout(folder)
    with image_counter("reading") as progress:
        report = check_layout(layout, splits, quick=quick, progress=progress)
    click.echo(report.text())
    if not report.usable:
        context.exit(2)


@data.command(short_help="A sheet of pictures with their labels.")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--split", default="train", show_default=True, metavar="NAME", help="Which part of the data.")
@click.option("--count", default=16, show_default=True, type=click.IntRange(min=1), metavar="N", help="Pictures.")
@click.option("--augmented", is_flag=True, help="As training sees them, with the default augmentation.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), metavar="N", help="Which pictures.")
@click.option("--output", default="data.jpg", show_default=True, metavar="FILE", help="A .jpg or .png file.")
def show(folder: str | None, split: str, count: int, augmented: bool, seed: int, output: str) -> None:
    """Draw random images with their boxes, masks and keypoints on one sheet.

    Without DIR it is the built-in data set.

    \b
    Example:
      mvision data show my_data --split val --output val.jpg
    """
    from mvision.config import AugmentConfig
    from mvision.data import find_layout
    from mvision.data.tools.show import contact_sheet, write_image

    layout = find_layout(folder)
    augment = AugmentConfig() if augmented else None
    write_image(output, contact_sheet(layout, split, count, seed=seed, augment=augment))
    click.echo(f"{layout.description}\nsheet: {output}")


@data.command(short_help="Write any readable layout as plain COCO.")
@click.argument("folder", metavar="DIR")
@click.argument("destination", metavar="OUTPUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", "splits", multiple=True, metavar="NAME", help=SPLITS_HELP.format("all"))
def convert(folder: str, destination: Path, splits: tuple[str, ...]) -> None:
    """Copy a data set into the new folder OUTPUT as images/ and annotations/train.json, annotations/val.json.

    \b
    Example:
      mvision data convert yolo_export/data.yaml my_data
    """
    from mvision.data import find_layout
    from mvision.data.tools.convert import convert as convert_layout

    layout = find_layout(folder)
    with image_counter("copying") as progress:
        converted = convert_layout(layout, destination, splits, progress=progress)
    click.echo(f"{layout.description}\n{converted.description}")

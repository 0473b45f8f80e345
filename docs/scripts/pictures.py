"""The pictures of the documentation: sheets of predictions from a run, and the strip on the first page.

    mvision train --task detection --task instance-seg --task keypoints
    python docs/scripts/pictures.py sheet runs/detection+instance-seg+keypoints/1 docs/joint.jpg
    mvision train --task instance-seg
    python docs/scripts/pictures.py sheet runs/instance-seg/1 docs/instance-seg.jpg --count 8
    python docs/scripts/pictures.py hero docs/hero.jpg      # parts of the sheets: needs no run

A sheet has the first validation images of the run's data, in rows as wide as the sheet, with what the run finds above a
score of 0.5: nothing is chosen. ``docs/keypoints.jpg`` is the file ``predictions.jpg`` of ``mvision train --task
keypoints``. The strip is cut out of the sheets by hand: it shows places where the model is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent
WIDTH, GAP, QUALITY = 1200, 5, 88
# File, left, top, right, bottom: what the strip shows, in pixels of the sheets as they are kept.
PARTS = (
    ("joint.jpg", 602, 0, 899, 222),
    ("keypoints.jpg", 902, 961, 1200, 1226),
    ("joint.jpg", 402, 500, 798, 755),
    ("joint.jpg", 866, 302, 1070, 590),
)


def main() -> None:
    """Make one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="predictions of a run on its first validation images")
    sheet.add_argument("run", type=Path)
    sheet.add_argument("output", type=Path)
    sheet.add_argument("--count", type=int, default=7, help="images")
    hero = commands.add_parser("hero", help="parts of the sheets, side by side")
    hero.add_argument("output", type=Path)
    options = parser.parse_args()
    if options.command == "hero":
        pictures = [Image.open(DOCS / file).convert("RGB").crop(place) for file, *place in PARTS]
        made = in_rows(pictures, rows=1)
    else:
        made = in_rows(predicted(options.run, options.count), rows=2)
    made.save(options.output, quality=QUALITY)
    print(f"{options.output}: {made.width} x {made.height}")


def predicted(run: Path, count: int) -> list[Image.Image]:
    """The first validation images of the run's data with what it finds in them."""
    import mvision
    from mvision.config import load_config
    from mvision.data.formats.coco import CocoSplit
    from mvision.data.formats.layouts import find_layout
    from mvision.structures.images import read_image

    split = CocoSplit(find_layout(load_config(file=run / "config.yaml").data.root).split("val"))
    images = [read_image(split.folder / record.file) for record in split.records[:count]]
    results = mvision.load(run).predict(images)
    # Drawn at twice the size: labels and lines are then smaller than what they are about.
    larger = [np.asarray(Image.fromarray(image).resize((2 * image.shape[1], 2 * image.shape[0]))) for image in images]
    return [
        Image.fromarray(found.resized(image.shape[:2]).draw(image))
        for found, image in zip(results, larger, strict=True)
    ]


def in_rows(pictures: Sequence[Image.Image], rows: int) -> Image.Image:
    """Pictures side by side in rows of one height, each row as wide as the sheet."""
    per_row = -(-len(pictures) // rows)
    strips = [_row(pictures[first : first + per_row]) for first in range(0, len(pictures), per_row)]
    sheet = Image.new("RGB", (WIDTH, sum(strip.height for strip in strips) + GAP * (len(strips) - 1)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    return sheet


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    free = WIDTH - GAP * (len(pictures) - 1)
    height = round(free / sum(picture.width / picture.height for picture in pictures))
    widths = [round(height * picture.width / picture.height) for picture in pictures]
    widths[-1] += free - sum(widths)
    row, left = Image.new("RGB", (WIDTH, height), "white"), 0
    for picture, width in zip(pictures, widths, strict=True):
        row.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, 0))
        left += width + GAP
    return row


if __name__ == "__main__":
    main()

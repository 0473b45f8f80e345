"""The formats that ``mvision label`` writes: what each can hold, who writes it, and how its tool takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mvision.data.formats.coco_writer import write_coco, write_fiftyone
from mvision.data.formats.cvat_writer import check_cvat, write_cvat
from mvision.data.formats.label_studio_writer import check_label_studio, write_label_studio
from mvision.data.formats.labelled import Pictures, Request
from mvision.data.formats.yolo_writer import LIST, check_yolo, write_yolo
from mvision.errors import UserError, did_you_mean


def _check_nothing(request: Request) -> None:
    return


@dataclass(frozen=True)
class LabelFormat:
    """One format.

    Attributes:
        title: for the user.
        pictures: the folder in the output that the pictures lie in.
        check: raises a ``UserError`` for what the format cannot hold.
        write: writes everything but the pictures into a new folder.
        review: where the marks for review are.
        next_step: what to do with the folder, a line with its name as ``{folder}``.
    """

    title: str
    pictures: str
    check: Callable[[Request], None]
    write: Callable[[Path, Request, Pictures, Counter[str]], None]
    review: str
    next_step: str


FORMATS = {
    "coco": LabelFormat(
        "COCO",
        "images",
        _check_nothing,
        write_coco,
        'the annotation\'s attributes, "review": true',
        "{folder}/annotations has the file for any tool that imports COCO",
    ),
    "yolo": LabelFormat(
        "YOLO",
        "images/train",
        check_yolo,
        write_yolo,
        LIST,
        "{folder}/data.yaml describes the data set; {folder}/review.csv lists what to look at first",
    ),
    "cvat": LabelFormat(
        "CVAT for images 1.1",
        "images",
        check_cvat,
        write_cvat,
        'the attribute "review" of every shape',
        "in CVAT paste {folder}/labels.json as raw labels, make a task of {folder}/images, and upload "
        "{folder}/annotations.xml as CVAT 1.1",
    ),
    "label-studio": LabelFormat(
        "Label Studio",
        "images",
        check_label_studio,
        write_label_studio,
        'the column "review" of a task, the scores of its regions, and a note on each of those regions',
        "in Label Studio paste {folder}/label_config.xml as the labelling interface and import {folder}/tasks.json",
    ),
    "fiftyone": LabelFormat(
        "FiftyOne",
        "data",
        _check_nothing,
        write_fiftyone,
        'the attribute "review" of every label, beside its confidence',
        'in FiftyOne: fo.Dataset.from_dir("{folder}", fo.types.COCODetectionDataset)',
    ),
}


def label_format(name: str) -> LabelFormat:
    """A format by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown; {did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def check_request(form: LabelFormat, request: Request) -> None:
    """Raise a ``UserError`` for what the format, or any file of text, cannot hold."""
    names: set[str] = set()
    for category in request.categories:
        if not category.name.strip():
            raise UserError(f"class {category.id} of the weights has no name, which every format needs; give it one")
        if any("\ud800" <= character <= "\udfff" for character in category.name):
            raise UserError(f"class {category.name!a} has half a character in its name, which no file can hold")
        if category.name in names:
            raise UserError(f"two classes of the weights are called '{category.name}', which no format can tell apart")
        names.add(category.name)
    form.check(request)

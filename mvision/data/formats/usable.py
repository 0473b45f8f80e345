"""Whether a split can serve a task. Training, evaluation and ``mvision data check`` all ask here."""

from __future__ import annotations

from collections.abc import Sequence

from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.segmentation import Outlines
from mvision.errors import UserError
from mvision.heads import head_class

LISTED = 3  # kinds of problems that a reason names


def refusal(split: CocoSplit, task: str, empty_is_fine: bool = False) -> str | None:
    """Why nothing can be learned or measured for a task: no object of the split has what the task needs.

    Args:
        split: read with the fields of ``Targets`` that the task needs.
        task: name of a head.
        empty_is_fine: a split without any annotation is accepted: a validation set may have none.

    Returns:
        One line that begins with the file, or None where there is something.
    """
    if empty_is_fine and split.annotated == 0:
        return None
    needs = head_class(task).needs
    objects = ~split.labels.crowd
    start = f"{split.split.annotations}: no object in it can be used for {task}:"
    if split.annotated == 0:
        return f"{start} none of its {len(split)} images has a label"
    if not len(objects):
        return f"{start} all of its {split.annotated} annotations were left out: {_problems(split, ('boxes',))}"
    if not objects.any():
        return (
            f"{start} all {len(objects)} are crowd regions (iscrowd 1), of which nothing is learned; CVAT writes "
            "iscrowd 1 for every mask of its brush: -o data.ignore_iscrowd=true reads them as single objects"
        )
    counts = usable_objects(split)
    for field in sorted(needs):
        if counts.get(field) == 0:
            name = {"masks": "mask (a segmentation)", "keypoints": "labelled keypoint"}.get(field, field)
            why = _problems(split, (field,))
            return f"{start} none of the {int(objects.sum())} objects has a {name}{f': {why}' if why else ''}"
    return None


def refuse(split: CocoSplit, tasks: Sequence[str], empty_is_fine: bool = False) -> None:
    """Raises UserError with the first ``refusal`` for these tasks, if there is one."""
    for task in tasks:
        if reason := refusal(split, task, empty_is_fine):
            raise UserError(reason)


def usable_objects(split: CocoSplit) -> dict[str, int]:
    """Objects (no crowds) that have something for a field of ``Targets``, by field; of those fields that were read."""
    real, labels = ~split.labels.crowd, split.labels
    counts = {"boxes": int(real.sum())}
    if isinstance(labels.outlines, Outlines):
        counts["masks"] = int((labels.outlines.present & real).sum())
    if labels.keypoints is not None:
        counts["keypoints"] = int((labels.keypoints[real, :, 2] > 0).any(axis=1).sum())
    return counts


def _problems(split: CocoSplit, fields: Sequence[str]) -> str:
    """The most frequent problems that concern these fields."""
    found = sorted((p for p in split.problems if p.field in fields), key=lambda problem: -problem.count)
    return "; ".join(map(str, found[:LISTED]))

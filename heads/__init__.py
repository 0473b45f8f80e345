"""Heads: one task a file. The dictionary below is the only place where a task's name meets its class."""

from __future__ import annotations

from importlib.metadata import entry_points

from mvision.errors import UserError
from mvision.heads.base import Head
from mvision.heads.detection import DetectionHead
from mvision.heads.keypoint import KeypointHead
from mvision.heads.mask import MaskHead

HEADS: dict[str, type[Head]] = {
    "detection": DetectionHead,
    "instance-seg": MaskHead,
    "keypoints": KeypointHead,
}


def head_class(task: str) -> type[Head]:
    """The head of a task: built in, or announced by another package under the entry-point group ``mvision.heads``."""
    if task in HEADS:
        return HEADS[task]
    outside = {entry.name: entry for entry in entry_points(group="mvision.heads")}
    if task in outside:
        return outside[task].load()
    known = ", ".join(sorted({*HEADS, *outside}))
    raise UserError(f"unknown task '{task}': choose one of {known}")

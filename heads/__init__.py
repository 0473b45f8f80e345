"""Heads: one task a file. The dictionary below is the only place where a task's name meets its class."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from mvision.errors import UserError
from mvision.heads.base import Head
from mvision.heads.detection import DetectionHead
from mvision.heads.instance_seg.head import MaskHead
from mvision.heads.keypoints.head import KeypointHead
from mvision.heads.semantic import SemanticHead

HEADS: dict[str, type[Head]] = {
    "detection": DetectionHead,
    "instance-seg": MaskHead,
    "keypoints": KeypointHead,
    "semantic-seg": SemanticHead,
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


def serving_task(task: str, tasks: Iterable[str]) -> str:
    """The task whose head gives the outputs of ``task`` in a model with these tasks: it, or one that includes it."""
    return next((other for other in tasks if task in head_class(other).includes), task)

"""Heads, one for each task. The dictionary below is the only place that names the class of a task.

A class is imported when it is used first, so that listing the tasks (for help texts) does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from mvision.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mvision.heads.base import Head
    from mvision.settings import Settings

HEADS: dict[str, str | dict[str, str]] = {
    "detection": "mvision.heads.detection:DetectionHead",
    "instance-seg": "mvision.heads.instance_seg:MaskHead",
    "keypoints": {
        "dense": "mvision.heads.keypoints:KeypointHead",
        "minimal": "mvision.heads.keypoints:MinimalKeypointHead",
        "query": "mvision.heads.poses:QueryPoseHead",
    },
    "semantic-seg": "mvision.heads.semantic:SemanticHead",
}
"""Task -> class. A task with several classes has a dictionary of them by the setting ``kind`` of the task's section
under ``model.heads``, the default first."""

ENTRY_POINTS = "mvision.heads"
"""Entry-point group in which another package adds a head: ``task = package.module:HeadClass``."""


def known_tasks() -> list[str]:
    """All tasks, those of other packages last."""
    return [*HEADS, *sorted(_outside())]


def head_class(task: str, settings: Mapping[str, Any] | Settings | None = None) -> type[Head]:
    """The head class of a task.

    Args:
        settings: the task's section of a config; its ``kind`` chooses among several classes. None: the default.

    Raises:
        UserError: the task is unknown, or has no class of that kind.
    """
    if task not in HEADS:
        outside = _outside()
        if task not in outside:
            raise UserError(f"unknown task '{task}': {did_you_mean(task, known_tasks())}")
        return outside[task].load()
    path = HEADS[task]
    if not isinstance(path, str):
        given = settings.get("kind") if isinstance(settings, Mapping) else getattr(settings, "kind", None)
        kind = given or next(iter(path))
        if not isinstance(kind, str) or kind not in path:
            raise UserError(f"model.heads.{task}.kind: {kind!r} is unknown; {did_you_mean(str(kind), path)}")
        path = path[kind]
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def serving_task(task: str, tasks: Iterable[str]) -> str:
    """The task whose head computes the outputs of ``task`` in a model with ``tasks``: one that includes it, or itself.

    See ``Head.includes``.
    """
    return next((other for other in tasks if task in head_class(other).includes), task)


def _outside() -> dict[str, EntryPoint]:
    return _announced(tuple(sys.path))


@cache
def _announced(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """The heads of other packages on this ``sys.path``.

    Cached: reading the metadata of every installed package takes milliseconds, and a model asks in each forward pass.
    """
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS) if entry.name not in HEADS}


def __getattr__(name: str) -> Any:
    if name == "Head":
        from mvision.heads.base import Head

        return Head
    raise AttributeError(f"module 'mvision.heads' has no attribute {name!r}")

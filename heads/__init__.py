"""Heads: one task each. The dictionary below is the only place where a task's name meets its class.

Classes are imported when they are asked for, so that the names alone (for help texts) cost nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from mvision.errors import UserError

if TYPE_CHECKING:
    from mvision.heads.base import Head
    from mvision.settings import Settings

HEADS: dict[str, str | dict[str, str]] = {
    "detection": "mvision.heads.detection:DetectionHead",
    "instance-seg": "mvision.heads.instance_seg:MaskHead",
    "keypoints": {
        "dense": "mvision.heads.keypoints:KeypointHead",
        "minimal": "mvision.heads.keypoints:MinimalKeypointHead",
    },
    "semantic-seg": "mvision.heads.semantic:SemanticHead",
}
"""Task -> class; where there are several, by the setting ``kind`` of the task's section under ``model.heads``, the
default first."""

ENTRY_POINTS = "mvision.heads"
"""The group under which another package announces a head: ``task = package.module:HeadClass``."""


def known_tasks() -> list[str]:
    """Every task that there is a head for, those of other packages last."""
    return [*HEADS, *sorted(_outside())]


def head_class(task: str, settings: Mapping[str, Any] | Settings | None = None) -> type[Head]:
    """The head of a task: of the kind that ``settings`` (its section of a config) name, else the default.

    Raises:
        UserError: the task is unknown, or has no head of that kind.
    """
    if task not in HEADS:
        outside = _outside()
        if task not in outside:
            raise UserError(f"unknown task '{task}': choose one of {', '.join(known_tasks())}")
        return outside[task].load()
    path = HEADS[task]
    if not isinstance(path, str):
        given = settings.get("kind") if isinstance(settings, Mapping) else getattr(settings, "kind", None)
        kind = given or next(iter(path))
        if kind not in path:
            raise UserError(f"model.heads.{task}.kind: {kind!r} is unknown; choose one of {', '.join(path)}")
        path = path[kind]
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def serving_task(task: str, tasks: Iterable[str]) -> str:
    """The task whose head gives the outputs of ``task`` in a model with these tasks: it, or one that includes it."""
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

"""``mvision models``: the published models that can be loaded by a short name. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mvision.errors import UserError, did_you_mean
from mvision.weights import zoo
from mvision.weights.zoo import MODELS, ZooModel

HEADER = ("name", "trained on", "AP", "params", "GFLOPs", "licence", "Hub repository")
SHORT = "O365"
"""Objects365 in the table, for lines of a terminal's width."""


def models_text(name: str | None = None, task: str | None = None) -> str:
    """A table of the published models, or all about one of them.

    Args:
        name: the short name of one model.
        task: only models of this task.

    Raises:
        UserError: no such model, or no model of this task.
    """
    if name is not None:
        return model_text(zoo.get(name))
    chosen = of_task(task)
    lines: list[str] = []
    for part in dict.fromkeys(model.task for model in chosen):
        rows = [_row(model) for model in chosen if model.task == part]
        lines += [f"{part}", *_aligned([HEADER, *rows]), ""]
    lines += [
        f"{SHORT}: Objects365. AP: the publishers' figure, of boxes, masks or keypoints, on COCO val2017; of models",
        "without COCO, on Objects365 or CrowdPose.",
        "params in millions, GFLOPs of one image of 640 x 640: counted here, or, with ~, the publishers' figures.",
        "Use:    mvision train --data DIR --init dfine-s    mvision predict photo.jpg --weights dfine-s",
        "More:   mvision models dfine-s",
    ]
    return "\n".join(lines)


def models_json(name: str | None = None, task: str | None = None) -> str:
    """The same as JSON: a list with one object for each model."""
    chosen = [zoo.get(name)] if name is not None else of_task(task)
    return json.dumps([_record(model) for model in chosen], indent=2)


def of_task(task: str | None) -> list[ZooModel]:
    """The models of a task; None: all. Raises UserError if there are none."""
    chosen = [model for model in MODELS.values() if task in (None, model.task)]
    if not chosen:
        tasks = dict.fromkeys(model.task for model in MODELS.values())
        raise UserError(f"--task {task}: there is no published model of this task; {did_you_mean(str(task), tasks)}")
    return chosen


def model_text(model: ZooModel) -> str:
    """All about one model, one fact per line."""
    family, size = model.of, model.size
    terms = "; Objects365's images have terms of their own" if zoo.OBJECTS365 in model.data else ""
    own = zoo.own_copy(model)
    rows = [
        ("model", f"{family.title}, {model.task}, trained on {model.data}"),
        ("AP", f"{model.ap} on {model.measured}, published"),
        ("size", f"{size.parameters:g} M parameters, {size.gflops:g} GFLOPs at 640 x 640, {_counted(model)}"),
        *([("note", family.note)] if family.note else []),
        ("licence", f"code {family.code_licence}, weights {family.weights_licence}, as the authors declare{terms}"),
        ("code", family.page),
        ("paper", family.paper),
        *_places(model),
        *([("your copy", str(own))] if own is not None else []),
        *([("architecture", f"--model {model.config}")] if model.config is not None else []),
        ("start from it", f"mvision train --data DIR --init {model.name}"),
        ("predict", f"mvision predict photo.jpg --weights {model.name}"),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join([model.name, "", *(f"{key:<{width}}  {value}" for key, value in rows)])


def _row(model: ZooModel) -> tuple[str, ...]:
    about = "" if model.size.counted else "~"
    digits = 1 if model.size.counted else 0
    parameters, gflops = (f"{about}{figure:.{digits}f}" for figure in (model.size.parameters, model.size.gflops))
    data = model.data.replace(zoo.OBJECTS365, SHORT)
    return model.name, data, f"{model.ap:.1f}", parameters, gflops, model.licence, model.hub or f"- ({model.place})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Texts aligned left, figures (of the columns 2, 3 and 4) right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _counted(model: ZooModel) -> str:
    return "counted by mvision" if model.size.counted else "the publishers' figures"


def _places(model: ZooModel) -> list[tuple[str, str]]:
    """Where the weights are, and by what they are recognised."""
    if model.hub is None:
        if model.is_download:
            return [("weights", f"{model.url}, downloaded at first use")]
        return [("weights", f"not downloaded by mvision: {zoo.by_hand(model)}")]
    checksum = f"SHA-256 {model.sha256}" if model.sha256 else "no checksum known but the Hub's own"
    rows = [
        ("weights", f"https://huggingface.co/{model.hub}"),
        ("revision", model.revision or "not pinned: the newest is taken, and its commit is said"),
        ("checksum", checksum),
    ]
    return [*rows, ("original", model.url)] if model.url is not None else rows


def _record(model: ZooModel) -> dict[str, Any]:
    """All fields of a model, with the licences of its family."""
    family = asdict(model.of)
    del family["act"]  # of most of its models; the model has its own
    return {**asdict(model), **{f"family_{key}" if key == "title" else key: value for key, value in family.items()}}

"""The analyses of all tasks and data sets of an evaluation: their figures, thresholds, tables and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mvision.evaluation.analysis import Analysis, analyse
from mvision.evaluation.coco import CocoMetric
from mvision.evaluation.evaluate import Validation
from mvision.evaluation.pictures import write_pictures
from mvision.storage.atomic import write_text


class TaskAnalysis(NamedTuple):
    """The analysis of a task on a data set; ``first`` if no other data set came before that is used for the task."""

    data: str
    task: str
    first: bool
    analysis: Analysis


def analyse_all(validation: Sequence[Validation]) -> list[TaskAnalysis]:
    """The analyses of an evaluation that has just been made, of every task's main metric.

    Tasks without objects, such as semantic-seg, have none. With several processes the main one is enough.
    """
    found: list[TaskAnalysis] = []
    for part in validation:
        for task, (main, *_) in part.metrics.items():
            if isinstance(main, CocoMetric):
                is_first = all(other.task != task for other in found)
                found.append(TaskAnalysis(part.name, task, is_first, analyse(main)))
    return found


def with_analyses(
    figures: dict[str, dict[str, float]], analyses: Sequence[TaskAnalysis]
) -> dict[str, dict[str, float]]:
    """The figures of an evaluation with those of its analyses, named as ``evaluate_all`` names them."""
    figures = {task: dict(of_task) for task, of_task in figures.items()}
    for one in analyses:
        prefix = "" if one.first else f"{one.data}/"
        figures[one.task] |= {f"{prefix}{name}": value for name, value in one.analysis.figures().items()}
    return figures


def best_thresholds(analyses: Sequence[TaskAnalysis]) -> dict[str, dict[str, float]]:
    """Task -> class -> threshold; of several data sets the first one that has the class decides."""
    found: dict[str, dict[str, float]] = {}
    for one in analyses:
        found[one.task] = one.analysis.thresholds | found.get(one.task, {})
    return found


def analysis_tables(analyses: Sequence[TaskAnalysis]) -> list[str]:
    """The table of every analysis, for a terminal; with a heading if there are several."""
    if len(analyses) == 1:
        return [analyses[0].analysis.table()]
    several = len({one.data for one in analyses}) > 1
    return [f"{f'{one.data}, ' if several else ''}{one.task}\n{one.analysis.table()}" for one in analyses]


def write_curves(analyses: Sequence[TaskAnalysis], folder: Path) -> list[Path]:
    """The pictures of every analysis, with the names of task and data set where there are several, and ``curves.json``.

    Raises:
        OSError: a file cannot be written.
    """
    paths: list[Path] = []
    for number, one in enumerate(analyses, start=1):
        names = [one.data] * (len({other.data for other in analyses}) > 1) + [one.task] * (len(analyses) > 1)
        suffix = "".join(f"-{name}" for name in names)
        if folder / f"curves{suffix}.png" in paths:  # two data sets of one name
            suffix += f"-{number}"
        paths += write_pictures(one.analysis, folder, suffix)
    if analyses:
        lists = {one.task if one.first else f"{one.data}/{one.task}": one.analysis.lists() for one in analyses}
        # A list of numbers or names in a line of its own: those have no brackets inside.
        text = re.sub(_LIST, _in_one_line, json.dumps(lists, indent=2))
        paths.append(folder / "curves.json")
        write_text(paths[-1], text + "\n")
    return paths


_LIST = re.compile(r'\[\n((?:\s+(?:[-\d][^\n"\[\]{}]*|"(?:[^"\\]|\\.)*",?)\n)+)\s+\]')


def _in_one_line(found: re.Match[str]) -> str:
    return f"[{' '.join(line.strip() for line in found[1].splitlines())}]"

"""The page of a transfer matrix: table, plot and the sentences around them, from the finished cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

WORDS = {
    "random": "random weights",
    "backbone": "backbone",
    "backbone+neck": "backbone and neck",
    "frozen": "backbone and neck, frozen",
}


def page(records: Sequence[Record], picture: str) -> str:
    """Markdown with two tables, one row for each target and share of the images: final AP, and how much earlier."""
    if not records:
        return "# Transfer\n\nNo cell is finished yet.\n"
    setup = records[0]["setup"]
    starts = [start for start in WORDS if any(r["start"] == start for r in records)]
    seeds = sorted({r["seed"] for r in records})
    machines = sorted({r["machine"] for r in records})
    height, width = setup["image_size"]
    options = f", {' '.join(f'-o {option}' for option in setup['options'])}" if setup["options"] else ""
    lines = [
        f"# What an encoder trained on {setup['source']} is worth to other tasks",
        "",
        f"Data: {setup['data']}; backbone {setup['backbone']} at {width} x {height}; {setup['epochs']} epochs over all "
        f"images, as many steps over a share of them{options}; heads start from random weights. The weights were "
        "trained on all the training images of their own data. AP (mIoU of semantic-seg) on the validation split after "
        "the last epoch: mean over the seeds, and the standard deviation where there are several.",
        "",
        "| target | images | " + " | ".join(WORDS[start] for start in starts) + " |",
        "|---" * (2 + len(starts)) + "|",
    ]
    groups = sorted({(r["task"], -r["fraction"]) for r in records})
    for task, negative in groups:
        cells = [_final(_select(records, task, -negative, start)) for start in starts]
        lines.append(f"| {task} | {-negative:.0%} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "How much earlier: epochs until the mean curve reaches what random weights end with, as a share of theirs "
        "(interpolated between evaluations; \u2264 the first evaluation where it is there already).",
        "",
        "| target | images | " + " | ".join(WORDS[start] for start in starts if start != "random") + " |",
        "|---" * (1 + len(starts)) + "|",
    ]
    for task, negative in groups:
        goal = mean_curve(_select(records, task, -negative, "random"))
        cells = [
            _earlier(mean_curve(_select(records, task, -negative, start)), goal)
            for start in starts
            if start != "random"
        ]
        lines.append(f"| {task} | {-negative:.0%} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"![AP over the epochs]({picture})",
        "",
        f"{len(records)} runs, seeds {', '.join(map(str, seeds))}. {'; '.join(machines)}.",
        "",
    ]
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """AP over the epochs: one plot for each target and share of the images, a line per start, a band over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({r["task"] for r in records})
    fractions = sorted({r["fraction"] for r in records}, reverse=True)
    figure = Figure(figsize=(4.5 * len(fractions), 3.4 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(tasks), len(fractions), squeeze=False)
    for row, task in zip(rows, tasks):
        for axes, fraction in zip(row, fractions):
            for index, start in enumerate(WORDS):
                chosen = _select(records, task, fraction, start)
                if not chosen:
                    continue
                epochs = [epoch for epoch, _ in mean_curve(chosen)]
                values = list(zip(*([point["score"] for point in r["curve"]] for r in chosen)))
                colour = f"C{index}"
                axes.plot(epochs, [statistics.mean(v) for v in values], "o-", color=colour, label=WORDS[start], ms=3)
                axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
            axes.set(
                title=f"{task}, {fraction:.0%} of the images",
                xlabel="epoch",
                ylabel=f"validation {_figure(records, task)}",
                ylim=(0, None),
            )
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
    rows[0][0].legend(fontsize=8, frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def mean_curve(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(epoch, mean AP) at every evaluation."""
    if not records:
        return []
    columns = zip(*(r["curve"] for r in records))
    return [(column[0]["epoch"], statistics.mean(point["score"] for point in column)) for column in columns]


def first_reach(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The epoch at which a curve first reaches ``goal``, interpolated; None if it does not."""
    before: tuple[float, float] | None = None
    for epoch, value in curve:
        if value >= goal:
            if before is None or value == before[1]:
                return epoch
            return before[0] + (epoch - before[0]) * (goal - before[1]) / (value - before[1])
        before = epoch, value
    return None


def _select(records: Sequence[Record], task: str, fraction: float, start: str) -> list[Record]:
    return [r for r in records if (r["task"], r["fraction"], r["start"]) == (task, fraction, start)]


def _figure(records: Sequence[Record], task: str) -> str:
    return next(r["figure"] for r in records if r["task"] == task)


def _final(records: Sequence[Record]) -> str:
    values = [r["curve"][-1]["score"] for r in records]
    if not values:
        return "-"
    spread = f" \u00b1 {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _earlier(curve: Sequence[tuple[float, float]], goal: Sequence[tuple[float, float]]) -> str:
    if not curve or not goal:
        return "-"
    reached = first_reach(curve, goal[-1][1])
    if reached is None:
        return "not reached"
    sign = "\u2264 " if reached == curve[0][0] else ""
    return f"{sign}{reached / goal[-1][0]:.2f}"

"""The page of a transfer matrix: tables and a plot of the finished cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvision.evaluation.tables import markdown_table, markdown_text
from mvision.storage.atomic import whole_file

Record = dict[str, Any]

LABELS = {
    "random": "random weights",
    "backbone": "backbone",
    "backbone+neck": "backbone and neck",
    "frozen": "backbone and neck, frozen",
}


def page(records: Sequence[Record], picture: str) -> str:
    """Markdown with two tables, with a row for each target task and share of the images.

    The first table has the final AP. The second has the epochs until the AP of a start reaches the final AP of random
    weights, as a share of the epochs of random weights.

    Args:
        picture: path of the plot, relative to the page.
    """
    if not records:
        return "# Transfer\n\nNo cell is finished yet.\n"
    setup = records[0]["setup"]
    starts = [start for start in LABELS if any(r["start"] == start for r in records)]
    trained = [start for start in starts if start != "random"]
    seeds = sorted({r["seed"] for r in records})
    machines = sorted({r["machine"] for r in records})
    height, width = setup["image_size"]
    shown = [markdown_text(f"-o {option}") for option in setup["options"]]
    options = f", {' '.join(shown)}" if shown else ""
    groups = sorted({(r["task"], -r["fraction"]) for r in records})
    final, earlier = [], []
    for task, negative in groups:
        row = [markdown_text(task), f"{-negative:.0%}"]
        curves = {start: _select(records, task, -negative, start) for start in LABELS}
        goal = mean_curve(curves["random"])
        final.append([*row, *(_final(curves[start]) for start in starts)])
        earlier.append([*row, *(_earlier(mean_curve(curves[start]), goal) for start in trained)])
    lines = [
        f"# How much an encoder trained on {markdown_text(setup['source'])} helps other tasks",
        "",
        f"Data: {markdown_text(setup['data'])}; backbone {markdown_text(setup['backbone'])} at {width} x {height}; "
        f"{setup['epochs']} epochs over all images, and as many steps over a share of them{options}; heads start from "
        "random weights. The weights were trained on all training images of their own data. AP (mIoU of semantic-seg) "
        "on the validation split after the last epoch: mean over the seeds, and the standard deviation "
        "if there are several.",
        "",
        *markdown_table(["target", "images", *(LABELS[start] for start in starts)], final),
        "",
        "Epochs until the mean curve reaches the final AP of random weights, as a share of the epochs that random "
        "weights were trained for (interpolated between evaluations; \u2264 if the first evaluation is already there).",
        "",
        *markdown_table(["target", "images", *(LABELS[start] for start in trained)], earlier),
        "",
        f"![AP over the epochs]({picture})",
        "",
        f"{len(records)} runs, seeds {', '.join(map(str, seeds))}. {'; '.join(map(markdown_text, machines))}.",
        "",
    ]
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """AP over the epochs: one plot per target task and share of the images, with a line per start.

    Around each line is a band from the lowest to the highest AP over the seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({r["task"] for r in records})
    fractions = sorted({r["fraction"] for r in records}, reverse=True)
    figure = Figure(figsize=(4.5 * len(fractions), 3.4 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(tasks), len(fractions), squeeze=False)
    for row, task in zip(rows, tasks):
        for axes, fraction in zip(row, fractions):
            for index, start in enumerate(LABELS):
                chosen = _select(records, task, fraction, start)
                if not chosen:
                    continue
                epochs = [epoch for epoch, _ in mean_curve(chosen)]
                values = list(zip(*([point["score"] for point in r["curve"]] for r in chosen)))
                colour = f"C{index}"
                axes.plot(epochs, [statistics.mean(v) for v in values], "o-", color=colour, label=LABELS[start], ms=3)
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
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def mean_curve(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(epoch, mean AP) at every evaluation."""
    if not records:
        return []
    columns = zip(*(r["curve"] for r in records))
    return [(column[0]["epoch"], statistics.mean(point["score"] for point in column)) for column in columns]


def first_reach(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The epoch at which a curve first reaches ``goal``, interpolated; None if it does not."""
    previous: tuple[float, float] | None = None
    for epoch, value in curve:
        if value >= goal:
            if previous is None:
                return epoch
            return previous[0] + (epoch - previous[0]) * (goal - previous[1]) / (value - previous[1])
        previous = epoch, value
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

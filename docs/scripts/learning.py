"""The report on learning: AP against steps and wall-clock time for small data sets, models and starts.

    python docs/scripts/learning.py OUT --weights lite0.safetensors --data detection=bccd --page docs/learning.md

Trains every model on every data set as it is shipped, at equal steps and sizes: from random weights, and from a
backbone of ``--weights`` (see imagenet_weights.py) in place of its own. Each data set gets a picture of the curves and
a table; ``--page`` puts them into a page, between its two marks, and the pictures into the folder beside it that has
the page's name. ``--others`` adds the rows of other programs: ``COLUMNS``, with (epoch, AP) of each evaluation as
``curve``, and (step, seconds) as ``clock``. See ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, places, run_trials
from matplotlib.figure import Figure
from small_sets import SHIPPED, small_config, small_parser

from mvision.errors import Stopped
from mvision.evaluation.tables import markdown_table
from mvision.machine import resolve_device
from mvision.storage.atomic import whole_file, write_text

RANDOM, PRETRAINED = "random", "pretrained"
MARKS = ("<!-- figures: begin -->", "<!-- figures: end -->")
MODEL = ("model", "start", "steps", "size", "machine")
"""The columns that tell one line of a picture from another."""
COLUMNS = ("task", "data", "pictures", *MODEL, "seed", "curve", "clock")


@dataclass(frozen=True)
class Curve:
    """The trainings of a model on a data set, one for each seed.

    Attributes:
        name: model and start.
        row: of the first seed.
        steps, seconds: of each evaluation; the seconds are means over the seeds.
        aps: for each evaluation the AP of each seed.
    """

    name: str
    row: Row
    steps: list[int]
    seconds: list[float]
    aps: list[list[float]]

    @property
    def means(self) -> list[float]:
        """Over the seeds."""
        return [statistics.mean(found) for found in self.aps]

    def at(self, share: float) -> float:
        """The mean AP at the first evaluation after this share of the steps."""
        return next(ap for step, ap in zip(self.steps, self.means) if step >= share * self.steps[-1])


def main() -> None:
    """Train what has no row yet, and write tables and pictures."""
    parser = small_parser(__doc__, steps=1500, size=320)
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny", "small"], help="shipped configs")
    add("--starts", nargs="+", choices=[RANDOM, PRETRAINED], default=[RANDOM, PRETRAINED])
    add("--weights", type=Path, metavar="FILE", help="of the backbone, see imagenet_weights.py")
    add("--backbone", default="tf_efficientnet_lite0", help="of --weights  [default: %(default)s]")
    add("--others", action="append", default=[], type=Path, metavar="FILE", help="rows of other programs, JSON lines")
    add("--page", type=Path, metavar="FILE", help="a page with the two marks, such as docs/learning.md")
    options = parser.parse_args()
    if PRETRAINED in options.starts and options.weights is None:
        parser.error(f"--weights: the start {PRETRAINED} needs a file; or choose --starts {RANDOM}")
    others = [row for file in options.others for row in read_others(file)]
    run_trials(options, trials(options), lambda rows: report([*rows, *others], options.out, options.page))


def read_others(file: Path) -> list[Row]:
    """The rows of another program."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in COLUMNS if name not in row]:
            raise SystemExit(f"--others {file}, line {number}: lacks {', '.join(missing)}")
    return rows


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a report of what is there compares all models."""
    loops = itertools.product(range(options.seeds), places(options.data), options.models, options.starts)
    for seed, place, model, start in loops:
        chosen: dict[str, Any] = {}
        if start == PRETRAINED:
            chosen = {"name": options.backbone, "normalize": "auto", "weights": str(options.weights.resolve())}
        overrides = {f"model.backbone.{key}": value for key, value in chosen.items()}
        config, columns = small_config(options, place, seed, model, SHIPPED, overrides)
        yield Trial({"model": model, "start": start, **columns}, config, {"machine": machine(options.device)})


def machine(device: str | None) -> str:
    """The name of the GPU, or how many threads the CPU has."""
    chosen = resolve_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def report(rows: list[Row], out: Path, page: Path | None) -> str:
    """Markdown with a picture and a table for each data set; writes the pictures, and the page if there is one."""
    folder = out if page is None else page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for (task, data, pictures), curves in curves_of(rows).items():
        name = f"{task}-{data}-{pictures}"
        draw(curves, f"{task} on {data}, {pictures} pictures", folder / f"{name}.png")
        link = f"{folder.name}/{name}.png" if page else f"{name}.png"
        parts += [f"### {data}, {task}, {pictures} pictures", f"![AP against steps and seconds]({link})", table(curves)]
    text = "\n\n".join(parts)
    if page is not None:
        write_text(page, with_figures(page.read_text(encoding="utf-8"), text))
    return text + "\n"


def curves_of(rows: list[Row]) -> dict[tuple[str, str, int], list[Curve]]:
    """For each (task, data set, number of pictures) a curve of every model, in the order in which they came."""
    groups: dict[tuple[str, str, int], dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        group = groups.setdefault((row["task"], row["data"], row["pictures"]), {})
        group.setdefault(tuple(row[name] for name in MODEL), []).append(row)
    return {key: [_curve(seeds) for seeds in group.values()] for key, group in groups.items()}


def _curve(seeds: list[Row]) -> Curve:
    clocks = list(zip(*(row["clock"] for row in seeds), strict=True))
    return Curve(
        name=f"{seeds[0]['model']}, {seeds[0]['start']}",
        row=seeds[0],
        steps=[one[0][0] for one in clocks],
        seconds=[statistics.mean(seconds for _, seconds in one) for one in clocks],
        aps=[[ap for _, ap in one] for one in zip(*(row["curve"] for row in seeds), strict=True)],
    )


def draw(curves: list[Curve], title: str, file: Path) -> None:
    """A PNG: means as lines, the range over the seeds as bands."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        low, high = [min(found) for found in curve.aps], [max(found) for found in curve.aps]
        for axes, places_ in ((by_steps, curve.steps), (by_time, curve.seconds)):
            (line,) = axes.plot(places_, curve.means, marker=".", linewidth=1.2, label=curve.name)
            axes.fill_between(places_, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    by_steps.set(xlabel="optimiser steps", ylabel="AP on the validation split", ylim=(0, None))
    by_time.set(xlabel="seconds, evaluations included")
    for axes in (by_steps, by_time):
        axes.grid(alpha=0.3)
    by_steps.legend(fontsize=8, frameon=False)
    figure.suptitle(title)
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def table(curves: list[Curve]) -> str:
    """Markdown: a row for each curve."""
    header = ["model", "start", "px", "steps", "seconds", "AP at 10 %", "at 50 %", "at the end", "range", "seeds"]
    lines = []
    for curve in curves:
        last = curve.aps[-1]
        aps = [f"{curve.at(share):.3f}" for share in (0.1, 0.5, 1.0)]
        length = [str(curve.row["size"]), str(curve.steps[-1]), f"{curve.seconds[-1]:.0f}"]
        spread = f"{min(last):.3f} to {max(last):.3f}"
        lines.append(
            [curve.row["model"], curve.row["start"], *length, *aps, spread, str(len(last)), curve.row["machine"]]
        )
    return "\n".join(markdown_table([*header, "machine"], lines))


def with_figures(page: str, text: str) -> str:
    """The page with this text between its marks."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"the page lacks one of the marks {' and '.join(MARKS)}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

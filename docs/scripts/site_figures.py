"""Draw the curves of the documentation from the tables of its own pages, into docs/figures.

    python docs/scripts/site_figures.py                # needs matplotlib, which mvision brings
    python docs/scripts/site_figures.py --output DIR   # somewhere else

Nothing is measured here. A figure has the numbers that stand in the table it is drawn from, so the two cannot differ;
where a table is gone or has other columns, the script ends with an error that names it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
TEAL, ORANGE, GREY = "#00897b", "#f4511e", "#78909c"


@dataclass(frozen=True)
class Table:
    """The header and rows of a Markdown table, without asterisks and backticks."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> list[str]:
        return [row[self.columns.index(name)] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        return [float(value) for value in self.column(name)]


def find_table(page: str, columns: Sequence[str], heading: str = "") -> Table:
    """The first table of a page that begins with these columns, below a heading that begins so.

    Args:
        page: a file below docs/.
        columns: the first names of its header.
        heading: the beginning of a heading; empty: the whole page is searched.

    Raises:
        SystemExit: there is none.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading:
        found = re.search(rf"^#+ {re.escape(heading)}.*?(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
        text = found[0] if found else ""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, _, *rows = [_cells(line) for line in block.splitlines()]
        if header[: len(columns)] == tuple(columns):
            return Table(header, tuple(rows))
    sys.exit(f"{page}: no table with the columns {', '.join(columns)}{f' below {heading!r}' if heading else ''}")


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().replace("*", "").replace("`", "") for cell in line.strip().strip("|").split("|"))


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS / "figures", help="a folder")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in all_figures().items():
        figure.save(output / f"{name}.png")
        print(output / f"{name}.png")


@dataclass(frozen=True)
class Line:
    label: str
    x: list[float]
    y: list[float]
    colour: str | None = None
    style: str = "-"


@dataclass(frozen=True)
class Figure:
    """Lines over one axis. ``y`` is an AP from 0 on."""

    lines: tuple[Line, ...]
    x_label: str
    y_label: str

    def save(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
        for line in self.lines:
            axes.plot(line.x, line.y, line.style, marker="o", markersize=4, label=line.label, color=line.colour)
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(self.lines) > 1:
            axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        # Without the name of the program in the file, the same figures give the same file with any matplotlib.
        figure.savefig(path, dpi=120, metadata={"Software": None})
        plt.close(figure)


def all_figures() -> dict[str, Figure]:
    """Every figure by the name of its file."""
    return {"blood_cells": blood_cells(), "nuclei": nuclei(), "pretrained": pretrained(), "starts": starts()}


def blood_cells() -> Figure:
    table = find_table("measurements.md", ("seconds", "epoch", "AP", "AP50"), "Blood cells from random weights")
    seconds = table.numbers("seconds")
    lines = (Line("AP50", seconds, table.numbers("AP50"), GREY), Line("AP", seconds, table.numbers("AP"), TEAL))
    return Figure(lines, "seconds, evaluations included", "box AP, validation")


def nuclei() -> Figure:
    table = find_table("measurements.md", ("seconds", "epoch", "mask AP"), "Nuclei from random weights")
    seconds = table.numbers("seconds")
    masks, boxes = table.numbers("mask AP"), table.numbers("box AP")
    lines = (Line("masks", seconds, masks, ORANGE), Line("boxes", seconds, boxes, TEAL))
    return Figure(lines, "seconds, evaluations included", "AP, validation")


def pretrained() -> Figure:
    curve = "AP after 50, 100 and 150 steps"
    table = find_table("learning.md", ("backbone starts", "its norms", "neck and heads", curve))
    lines = []
    for start, norms, heads, values in table.rows:
        label = start if start == "random" else f"{start.replace('pretrained, ', '')}; norms {norms}; {heads}"
        style = "--" if "AdamW" in heads else "-"
        colour = GREY if start == "random" else None
        lines.append(Line(label, [50, 100, 150], _values(values), colour, style))
    return Figure(tuple(lines), "steps of 8 pictures", "box AP, validation")


def starts() -> Figure:
    table = find_table("learning.md", ("model", "recipe", "BCCD, 292 pictures"))
    lines = []
    for model, recipe, *_, curve in table.rows:
        style = "--" if "before" in recipe else "-"
        values = _values(curve)
        lines.append(Line(f"{model}: {recipe}", [40.0 * (k + 1) for k in range(len(values))], values, None, style))
    return Figure(tuple(lines), "steps of 8 pictures", "box AP, validation")


def _values(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


if __name__ == "__main__":
    main()

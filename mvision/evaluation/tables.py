"""Tables as text: aligned for a terminal, or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mvision.errors import printable, shortened

MAX_CELL = 80  # characters; a longer name, such as one of a megabyte, would widen every row


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal: the first column aligned left, the others right, two spaces between them."""
    shown = [[shortened(printable(cell), MAX_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in shown]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; names in it that others chose have to come through ``markdown_text``."""
    return [_row(header), "|" + "---|" * len(header), *map(_row, rows)]


def markdown_text(text: str) -> str:
    """Text that a page of Markdown shows as it is: no link, no HTML, no end of a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", printable(text))


def figure_text(value: float) -> str:
    """A metric's figure with three decimals; ``-`` for a negative one, which means that the data has no such object."""
    return "-" if value < 0 else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

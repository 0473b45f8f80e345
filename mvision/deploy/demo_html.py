"""What the page of ``mvision demo`` shows, as HTML.

Names of classes, files and weights come from others: all of them are escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from mvision.deploy.demo_model import DemoModel, Found, Row
from mvision.errors import UserError, printable, shortened

LONGEST = 60  # characters of a name
NAMED = 4  # classes that are counted by name above the table

CSS = """
.gradio-container {max-width: 1560px !important; margin: 0 auto !important; padding: 4px 12px 24px !important;}
.mv-result img {width: 100%; max-height: 62vh; object-fit: contain;}
.gradio-container .html-container {padding: 0 2px !important;}
.mv-head {display: flex; align-items: baseline; gap: 14px; padding: 2px 2px 10px;}
.mv-logo {font-size: 26px; font-weight: 750; letter-spacing: -0.03em; color: var(--body-text-color);}
.mv-logo i {font-style: normal; color: var(--color-accent);}
.mv-lead {color: var(--body-text-color-subdued); font-size: 15px;}
.mv-name {font-weight: 650; font-size: 16px; color: var(--body-text-color); overflow-wrap: anywhere;}
.mv-about {color: var(--body-text-color-subdued); font-size: 13px; margin-top: 2px; overflow-wrap: anywhere;}
.mv-chips {display: flex; flex-wrap: wrap; gap: 8px;}
.mv-chip {padding: 5px 12px; border-radius: 999px; font-size: 13.5px; background: var(--background-fill-primary);
  border: 1px solid var(--border-color-primary); color: var(--body-text-color);}
.mv-chip b {font-weight: 650; font-variant-numeric: tabular-nums;}
.mv-chip.mv-time {background: var(--color-accent-soft); border-color: transparent;}
.mv-table {max-height: 320px; overflow: auto; border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--background-fill-primary);}
.mv-table table {width: 100%; border-collapse: collapse; border: 0 !important; font-size: 13.5px; margin: 0 !important;}
.mv-table thead, .mv-table tr {border: 0 !important;}
.mv-table th {position: sticky; top: 0; text-align: right; padding: 8px 12px; font-weight: 600; font-size: 12px;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary); border: 0;}
.mv-table td {text-align: right; padding: 7px 12px; border: 0; border-top: 1px solid var(--border-color-primary);
  font-variant-numeric: tabular-nums; color: var(--body-text-color);}
.mv-table th:first-child, .mv-table td:first-child {text-align: left; overflow-wrap: anywhere;}
.mv-table th:nth-child(2), .mv-table td:nth-child(2) {text-align: left;}
.mv-dot {display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 9px;}
.mv-bar {display: inline-block; width: 72px; height: 6px; border-radius: 3px; margin-left: 10px; vertical-align: middle;
  background: var(--border-color-primary);}
.mv-bar span {display: block; height: 6px; border-radius: 3px; background: var(--color-accent);}
.mv-line {padding: 10px 14px; border-radius: 10px; font-size: 14px; overflow-wrap: anywhere;
  background: var(--background-fill-primary); color: var(--body-text-color);}
.mv-line.mv-bad {background: #fef2f2; color: #991b1b; border: 1px solid #fecaca;}
.dark .mv-line.mv-bad {background: #450a0a; color: #fecaca; border-color: #7f1d1d;}
footer {display: none !important;}
"""


def look(models: Sequence[DemoModel], file: str | None, tasks: Sequence[str], threshold: float) -> tuple[Any, ...]:
    """For every model: the drawn picture or None, and the HTML of the facts and of the table.

    Nothing is kept between two calls, so that several people do not get each other's results.
    """
    shown: list[Any] = []
    for model in models:
        asked = [task for task in model.tasks if task in tasks]
        if file is None:
            shown += [None, line("Upload a picture, paste one, or take one with the webcam."), ""]
        elif not asked:
            shown += [None, line(f"Tick one of its tasks: {', '.join(model.tasks)}."), ""]
        else:
            try:
                found = model.find(file, asked, threshold)
            except UserError as error:
                shown += [None, line(str(error), bad=True), ""]
            else:
                shown += [found.picture, facts(found), table(found.rows)]
    return tuple(shown)


def head() -> str:
    """The title of the page."""
    lead = "Give a picture, and see what the model finds in it."
    return f'<div class="mv-head"><span class="mv-logo">m<i>vision</i></span><span class="mv-lead">{lead}</span></div>'


def about(model: DemoModel) -> str:
    """What a model is: its weights, tasks, classes and runtime."""
    classes = model.classes
    known = f"{len(classes)} classes" if len(classes) > 1 else f"one class, {_text(classes[0])}"
    facts = " · ".join([", ".join(map(_text, model.tasks)), known, _text(model.runtime, 200)])
    return f'<div class="mv-name">{_text(model.name, 120)}</div><div class="mv-about">{facts}</div>'


def facts(found: Found) -> str:
    """How much was found, and how long the forward pass took."""
    objects = Counter(row.name for row in found.rows if not row.region)
    regions = sum(row.region for row in found.rows)
    total = objects.total()
    chips = [f"<b>{total}</b> object{'' if total == 1 else 's'}"] if total or not regions else []
    chips += [f"<b>{count}</b> {_text(name)}" for name, count in objects.most_common(NAMED)] if len(objects) > 1 else []
    chips += [f"<b>{len(objects) - NAMED}</b> more classes"] if len(objects) > NAMED else []
    chips += [f"<b>{regions}</b> class{'' if regions == 1 else 'es'} of regions"] if regions else []
    chips += ["{1} × {0} pixels".format(*found.size)]
    pass_time = f'<span class="mv-chip mv-time">forward pass <b>{found.seconds * 1000:.1f} ms</b></span>'
    notes = "".join(line(note) for note in found.notes)
    return f'<div class="mv-chips">{pass_time}{"".join(map(_chip, chips))}</div>{notes}'


def table(rows: Sequence[Row]) -> str:
    """The objects: class, score and box."""
    if not rows:
        return line("Nothing reaches the threshold: a lower one shows weaker results.")
    head = "".join(f"<th>{name}</th>" for name in ("class", "score", "x", "y", "width", "height"))
    body = "".join(map(_row, rows))
    return f'<div class="mv-table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def line(text: str, bad: bool = False) -> str:
    """One line of text, marked where something is wrong."""
    return f'<div class="mv-line{" mv-bad" if bad else ""}">{_text(text, 400)}</div>'


def _row(row: Row) -> str:
    red, green, blue = row.colour
    dot = f'<span class="mv-dot" style="background: rgb({red}, {green}, {blue})"></span>'
    bar = f'<span class="mv-bar"><span style="width: {100 * row.score:.0f}%"></span></span>'
    name = f"{_text(row.name)} (region)" if row.region else _text(row.name)
    box = "".join(f"<td>{value:.0f}</td>" for value in row.box)
    return f"<tr><td>{dot}{name}</td><td>{row.score:.2f}{bar}</td>{box}</tr>"


def _chip(text: str) -> str:
    return f'<span class="mv-chip">{text}</span>'


def _text(text: str, most: int = LONGEST) -> str:
    return escape(shortened(printable(text), most))

"""``mvision models``."""

from __future__ import annotations

import click

from mvision.cli.options import echo


@click.command(short_help="List the published models that can be loaded by name.")
@click.argument("name", required=False)
@click.option("--task", metavar="T", help="Only models of this task.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def models(name: str | None, task: str | None, as_json: bool) -> None:
    """List the published models that --init and --weights take by name, or say all about one NAME.

    Nothing is downloaded before a model is used.

    \b
    Example:
      mvision models dfine-s
    """
    from mvision.commands.models import models_json, models_text

    echo(models_json(name, task) if as_json else models_text(name, task))

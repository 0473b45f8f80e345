"""``mvision info``."""

from __future__ import annotations

import click

from mvision.cli.options import WEIGHTS


@click.command(short_help="This machine and its versions; what a model consists of.")
@click.option("--model", metavar="NAME", help="A shipped model or any timm backbone.")
@click.option("--weights", metavar="W", help=f"The model in {WEIGHTS}.")
def info(model: str | None, weights: str | None) -> None:
    """Tell about this machine and the installed versions, or about a model: layers, parameters and FLOPs by part.

    \b
    Example:
      mvision info --model rtdetr_r18
    """
    from mvision.commands.info import info_text

    click.echo(info_text(model, weights))

"""``mvision info``."""

from __future__ import annotations

import click

from mvision.cli.options import WEIGHTS, echo, family_option


@click.command(short_help="Describe this machine, or the parts of a model.")
@click.option("--model", metavar="NAME", help="A shipped model or any timm backbone.")
@click.option("--weights", metavar="W", help=f"Instead of --model: {WEIGHTS}; or an exported model.")
@family_option
def info(model: str | None, weights: str | None, family: str | None) -> None:
    """Describe this machine and the installed versions, or a model: layers, parameters and FLOPs by part.

    Of an exported model: what it was made from, its inputs and outputs.

    \b
    Example:
      mvision info --model rtdetr_r18
    """
    from mvision.commands.info import info_text

    echo(info_text(model, weights, family))

"""``mvision demo``."""

from __future__ import annotations

import click

from mvision.cli.options import WEIGHTS, device_option, echo, family_option


@click.command(short_help="Try weights on pictures and a webcam, in the browser.")
@click.option(
    "--weights",
    multiple=True,
    metavar="W",
    help=f"The model: {WEIGHTS}. Given twice: two models side by side.  [default: the newest run of the task]",
)
@family_option
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: all of the weights]")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="H",
    help="Address to listen on; 0.0.0.0 lets other machines in, without a password.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0: any free one.",
)
@device_option
def demo(
    weights: tuple[str, ...],
    family: str | None,
    tasks: tuple[str, ...],
    host: str,
    port: int,
    device: str | None,
) -> None:
    """Show a page on which pictures are tried on a model, until Ctrl-C.

    A picture is uploaded, pasted or taken with a webcam; the page draws what is found, lists it, and says how long the
    forward pass took. Tasks of a joint model and the threshold are chosen there. Uploads stay on this machine and are
    removed at the end; nothing is fetched from elsewhere.

    \b
    Example:
      mvision demo --weights runs/detection/1 --weights runs/detection/2
    """
    from mvision.commands.demo import demo_job

    demo_job(weights, family=family, tasks=tasks, host=host, port=port, device=device, log=echo)

"""``mvision export``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import WEIGHTS, ImageSize, OneOf


@click.command(short_help="Write a model for ONNX Runtime or OpenVINO, compared with PyTorch.")
@click.option("--weights", required=True, metavar="W", help=f"What to export: {WEIGHTS}.")
@click.option(
    "--format",
    type=OneOf(["onnx", "openvino"]),
    default="onnx",
    show_default=True,
    metavar="F",
    help="onnx or openvino.",
)
@click.option("--task", "tasks", multiple=True, metavar="T", help="Which tasks.  [default: all the weights do]")
@click.option("--image-size", type=ImageSize(), metavar="N|HxW", help="Multiples of 32.  [default: the model's]")
@click.option("--dynamic-size", is_flag=True, help="Take images of any size in multiples of 32.")
@click.option("--int8", is_flag=True, help="Quantise (openvino), and measure the loss.")
@click.option("--data", metavar="DIR", help="To calibrate and measure INT8 with.  [default: the built-in data set]")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Where.  [default: beside the weights]")
def export(
    weights: str,
    format: str,
    tasks: tuple[str, ...],
    image_size: tuple[int, int] | None,
    dynamic_size: bool,
    int8: bool,
    data: str | None,
    output: Path | None,
) -> None:
    """Export a model from pixels to raw outputs, with a free batch, and run it beside PyTorch before it counts.

    With --int8 the model is calibrated on training images and measured on validation images; the exit code is 2 if it
    lost more than 1 % of a task's AP.

    \b
    Example:
      mvision export --weights runs/detection/1 --format onnx
    """
    from mvision.deploy.export import export as export_model
    from mvision.deploy.quantise import ALLOWED

    quantised = export_model(
        weights,
        format=format,
        tasks=tasks,
        image_size=image_size,
        dynamic_size=dynamic_size,
        int8=int8,
        data=data,
        output=output,
        log=click.echo,
    )
    if quantised is not None and quantised.loss > ALLOWED:
        click.secho(f"INT8 lost {quantised.loss:.1%} of AP, more than {ALLOWED:.0%}", fg="red", err=True)
        click.get_current_context().exit(2)

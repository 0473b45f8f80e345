"""``mvision export``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import WEIGHTS, ImageSize, OneOf, echo, family_option


@click.command(short_help="Write a model for ONNX Runtime, OpenVINO, ExecuTorch or LiteRT.")
@click.option("--weights", required=True, metavar="W", help=f"What to export: {WEIGHTS}.")
@click.option(
    "--format",
    type=OneOf(["onnx", "openvino", "executorch", "litert"]),
    default="onnx",
    show_default=True,
    metavar="F",
    help="onnx, openvino; for phones: executorch (.pte), litert (.tflite).",
)
@family_option
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: all of the weights]")
@click.option("--image-size", type=ImageSize(), metavar="N|HxW", help="Multiples of 32.  [default: the model's]")
@click.option("--dynamic-size", is_flag=True, help="Accept images of any size in multiples of 32 (onnx, openvino).")
@click.option("--opset", type=int, metavar="N", help="Version of ONNX's operators, 17 or higher.  [default: torch's]")
@click.option("--int8", is_flag=True, help="Quantise (openvino only), and measure the loss of AP.")
@click.option("--data", metavar="DIR", help="Data for --int8.  [default: the built-in data set]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A file, or a folder for openvino; replaces nothing but an earlier export.  [default: beside the weights]",
)
def export(
    weights: str,
    family: str | None,
    format: str,
    tasks: tuple[str, ...],
    image_size: tuple[int, int] | None,
    dynamic_size: bool,
    opset: int | None,
    int8: bool,
    data: str | None,
    output: Path | None,
) -> None:
    """Export a model and compare it with PyTorch; if the outputs differ nothing is written.

    ONNX and OpenVINO take any batch size, files for phones one image at a time.

    With --int8 the model is calibrated on training images and measured on validation images. The exit code is 2 if it
    lost more than 1 % of a task's AP, or had no AP to lose.

    \b
    Example:
      mvision export --weights runs/detection/1 --format onnx
    """
    from mvision.commands.export import export

    quantised = export(
        weights,
        format=format,
        tasks=tasks,
        family=family,
        image_size=image_size,
        dynamic_size=dynamic_size,
        opset=opset,
        int8=int8,
        data=data,
        output=output,
        log=echo,
    )
    if quantised is not None and quantised.warning is not None:
        click.secho(quantised.warning, fg="red", err=True)
        click.get_current_context().exit(2)

"""``mvision benchmark``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import OUTPUT_FOLDER, WEIGHTS, SuggestingGroup, device_option, echo, family_option

ROUNDS = click.IntRange(3, 10_000)
output_option = click.option(
    "--output", type=OUTPUT_FOLDER, default=Path("benchmark"), show_default=True, metavar="DIR", help="Where to write."
)


@click.group(cls=SuggestingGroup, short_help="Measure time and memory of the encoder or of whole models.")
def benchmark() -> None:
    """Measure on this machine. Everything takes turns in one run, so that ratios can be trusted."""


@benchmark.command(short_help="Compare the hybrid encoder with Transformer encoders.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=click.IntRange(64, 16_384),
    metavar="N",
    help="Image side.  [default: 320 to 1536]",
)
@click.option(
    "--encoder",
    "names",
    multiple=True,
    metavar="NAME",
    help="Beside the hybrid encoder, as in the table.  [default: all]",
)
@click.option(
    "--embed-dim", type=click.IntRange(8, 8192), default=256, show_default=True, metavar="N", help="Channels."
)
@click.option("--repeats", type=ROUNDS, default=10, show_default=True, metavar="N", help="Most rounds.")
@output_option
@device_option
def encoder(
    sizes: tuple[int, ...], names: tuple[str, ...], embed_dim: int, repeats: int, output: Path, device: str | None
) -> None:
    """Compare the encoder with others: time, peak memory, parameters and FLOPs.

    Others are plain and deformable Transformer encoders, and hybrid encoders with other attention or fusion blocks.

    Writes encoder.md, encoder.png and encoder.json.

    \b
    Example:
      mvision benchmark encoder --size 640
    """
    from mvision.commands.benchmark_encoder import benchmark_encoder

    text = benchmark_encoder(
        sizes=sizes, names=names, embed_dim=embed_dim, repeats=repeats, device=device, output=output, log=echo
    )
    echo(text)


@benchmark.command(short_help="Time of every part of a model, and of the model in every runtime.")
@click.option("--model", metavar="NAME", help="A shipped model or any timm backbone.  [default: base]")
@click.option("--weights", metavar="W", help=f"Instead of --model: {WEIGHTS}.")
@family_option
@click.option("--task", "tasks", multiple=True, metavar="T", help="Tasks.  [default: detection, or all of the weights]")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Images per call.  [default: 1, 8]",
)
@click.option(
    "--precision", "precisions", multiple=True, metavar="P", help="fp32, bf16.  [default: those of the device]"
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="R",
    help="eager, compiled, onnx, openvino (all of these by default), executorch, litert.",
)
@click.option("--repeats", type=ROUNDS, default=15, show_default=True, metavar="N", help="Most rounds.")
@output_option
@device_option
def model(
    model: str | None,
    weights: str | None,
    family: str | None,
    tasks: tuple[str, ...],
    batches: tuple[int, ...],
    precisions: tuple[str, ...],
    runtimes: tuple[str, ...],
    repeats: int,
    output: Path,
    device: str | None,
) -> None:
    """Measure every part of a model, from preparation to post-processing; then the whole model in every runtime.

    Writes model.md and model.json.

    \b
    Example:
      mvision benchmark model --model rtdetr_r18 --batch 1
    """
    from mvision.commands.benchmark_model import benchmark_model

    text = benchmark_model(
        model=model,
        weights=weights,
        family=family,
        tasks=tasks,
        batches=batches,
        precisions=precisions,
        runtimes=runtimes,
        repeats=repeats,
        device=device,
        output=output,
        log=echo,
    )
    echo(text)

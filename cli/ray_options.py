"""``--engine ray`` of ``mvision predict``, with the options that only it has."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

from mvision.cli.options import OneOf, echo

FORMATS = ("parquet", "jsonl")
SHARED = (
    *("sources", "tasks", "weights", "family", "thresholds", "multi_label", "nms", "output", "precision"),
    *("batch_size", "device"),
)


def ray_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to ``predict``, which is called without them unless the engine is Ray."""

    @click.option(
        "--engine",
        type=OneOf(("local", "ray")),
        default="local",
        metavar="E",
        help="local, or ray: on many machines, into shards (needs the extra ray).",
        show_default=True,
    )
    @click.option("--actors", type=click.IntRange(1), metavar="N", help="With ray: how many hold the model.")
    @click.option("--format", "shard_format", type=OneOf(FORMATS), metavar="F", help="With ray.  [default: parquet]")
    @click.option(
        "--shard-size", type=click.IntRange(1), metavar="N", help="With ray: images in a shard.  [default: 1000]"
    )
    @wraps(command)
    def either(engine: str, actors: int | None, shard_format: str | None, shard_size: int | None, **given: Any) -> None:
        of_ray = {"--actors": actors, "--format": shard_format, "--shard-size": shard_size}
        if engine == "ray":
            more = {"actors": actors, "shard_size": shard_size, "format": shard_format or FORMATS[0]}
            _predict_by_ray(more, **_without_others(given))
            return
        for option in (option for option, value in of_ray.items() if value is not None):
            raise click.UsageError(f"{option} is for --engine ray")
        if isinstance(given["output"], str):
            raise click.UsageError(f"--output {given['output']}: a URL is for --engine ray; give a folder")
        command(**given)

    return either


def _without_others(given: dict[str, Any]) -> dict[str, Any]:
    """The options that both engines have; raises a usage error for one of the others that was given."""
    context = click.get_current_context()
    for option in context.command.params:
        name = str(option.name)
        is_given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if name in given and name not in (*SHARED, "no_pictures") and is_given:  # there are no pictures in any case
            raise click.UsageError(f"{option.opts[0]} is not for --engine ray")
    return {name: given[name] for name in SHARED}


def _predict_by_ray(more: dict[str, Any], sources: tuple[str, ...], thresholds: Any, output: Any, **given: Any) -> None:
    from mvision.commands.predict_ray import predict_ray_job

    place = None if output is None else str(output)
    echo(predict_ray_job(sources, threshold=thresholds, output=place, log=echo, **given, **more))

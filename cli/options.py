"""Parameter types and options of several commands, and errors that suggest the nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from mvision.errors import did_you_mean, printable_lines
from mvision.machine import PrecisionOption

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

EXISTING_FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
EXISTING_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
OUTPUT_FOLDER = click.Path(path_type=Path, file_okay=False)
WEIGHTS = "a run folder, .safetensors file, Hugging Face folder, Hub id or name from mvision models"
BEST = "best"  # the thresholds with the largest F1 in validation, which the weights have
EVERY = "*"  # stands for all classes without a threshold of their own


def echo(text: object) -> None:
    """Print lines, with escape sequences in names of classes and files written out."""
    print(printable_lines(str(text)), flush=True)


class SuggestingGroup(click.Group):
    """A group that suggests the nearest command for a misspelt one, and shows its help without a command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added, not by name."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help if there are no arguments; newer versions of click make that an error with code 2."""
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or raise a usage error with the nearest name."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"no command '{name}': {did_you_mean(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


class OneOf(click.Choice):
    """A choice that suggests the nearest value for a misspelt one."""

    def __init__(self, choices: Sequence[str]) -> None:
        super().__init__(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the value; raises a usage error with the nearest choice."""
        if value not in self.choices:
            self.fail(f"'{value}' is unknown: {did_you_mean(str(value), map(str, self.choices))}", param, ctx)
        return value


class ImageSize(click.ParamType):
    """``640`` or ``480x640``: the (height, width) that images are resized to."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text. The config schema checks that both sides are multiples of 32."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", str(value).strip())
        if match is None:
            self.fail(f"'{value}' is neither N nor HxW, such as 640 or 480x640", param, ctx)
        height, width = match.group(1), match.group(2) or match.group(1)
        return int(height), int(width)


class FolderOrUrl(click.ParamType):
    """A folder as a ``Path``, or a URL such as ``s3://bucket/folder`` as text."""

    name = "DIR|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Check that a path is not that of a file."""
        if isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
            return value
        return OUTPUT_FOLDER.convert(value, param, ctx)


def thresholds_callback(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> Any:
    """``0.5``, ``best`` and ``CLASS=0.3`` as one value, or as a dictionary where there are thresholds of classes."""
    given: dict[str, float | str] = {}
    for text in texts:
        if text == BEST:
            if given.setdefault(EVERY, BEST) != BEST:
                raise click.BadParameter("two values for all classes", context, option)
            continue
        name, has_name, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise click.BadParameter(
                f"'{text}' is neither a number nor CLASS=NUMBER nor {BEST}", context, option
            ) from None
        if not 0 <= number <= 1:
            raise click.BadParameter(f"{text} is not in the range from 0 to 1", context, option)
        if given.setdefault(name if has_name else EVERY, number) != number:
            raise click.BadParameter(
                f"two values for {f'class {name!r}' if has_name else 'all classes'}", context, option
            )
    return given.get(EVERY) if set(given) <= {EVERY} else given


def tile_options(command: Decorated) -> Decorated:
    """``--tile``, ``--overlap`` and ``--no-whole``, the same in every command that can predict on tiles."""
    for option in (
        click.option(
            "--no-whole", is_flag=True, help="With --tile: without the whole picture, which shows large objects."
        ),
        click.option("--overlap", type=float, metavar="X", help="Of neighbouring tiles, as a share.  [default: 0.2]"),
        click.option("--tile", type=ImageSize(), metavar="N|HxW", help="Predict on windows of so many pixels."),
    ):
        command = option(command)
    return command


def device_option(command: Decorated) -> Decorated:
    """``--device``, the same in every command that runs a model."""
    return click.option(
        "--device", metavar="D", help="cpu, cuda, cuda:1 or mps.  [default: the first GPU, else the CPU]"
    )(command)


def precision_option(command: Decorated) -> Decorated:
    """``--precision``, the same in every command that predicts."""
    return click.option(
        "--precision",
        type=OneOf(get_args(PrecisionOption)),
        default="auto",
        show_default=True,
        metavar="P",
        help="fp32, bf16, fp16 (GPUs), or auto: the fastest one here.",
    )(command)


def family_option(command: Decorated) -> Decorated:
    """``--family``, the same in every command that takes weights."""
    return click.option(
        "--family",
        metavar="F",
        help="Of an authors' .pth file whose name does not tell it: rtdetr, rtdetrv2, dfine, deim, "
        "deim-rtdetrv2, rtdetrv4, ecdet, ecseg, ecpose, detrpose, mask-rtdetr.",
    )(command)


def assignments_option(command: Decorated) -> Decorated:
    """``-o key.sub=value``, any number of times."""
    return click.option(
        "-o",
        "assignments",
        multiple=True,
        metavar="KEY.SUB=VALUE",
        help="Set any key of the config, such as -o train.lr=3e-4. Repeatable; wins over every other option.",
    )(command)

"""What several commands share: parameter types, options with one meaning, and errors that suggest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

EXISTING_FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
EXISTING_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
OUTPUT_FOLDER = click.Path(path_type=Path, file_okay=False)
WEIGHTS = "a run folder, .safetensors file, Hugging Face folder or Hub id"


def suggestion(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'X'?`` for a near miss, otherwise the whole list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f": did you mean '{near[0]}'?" if near else f": choose one of {', '.join(names)}"


class SuggestingGroup(click.Group):
    """A group that answers a misspelt command with the nearest one, and no command with its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added, which is the order of work."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help if there is nothing to do (as an error, with code 2, in click's newer versions)."""
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
            raise click.UsageError(f"no command '{name}'{suggestion(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


class OneOf(click.Choice):
    """A choice that answers a misspelt value with the nearest one."""

    def __init__(self, choices: Sequence[str]) -> None:
        super().__init__(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the value; raises a usage error with the nearest choice."""
        if value not in self.choices:
            self.fail(f"'{value}' is unknown{suggestion(str(value), map(str, self.choices))}", param, ctx)
        return value


class ImageSize(click.ParamType):
    """``640`` or ``480x640``: the (height, width) that images are resized to."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text; that both sides are multiples of 32 is the schema's rule, not repeated here."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", str(value).strip())
        if match is None:
            self.fail(f"'{value}' is neither N nor HxW, such as 640 or 480x640", param, ctx)
        height, width = match.group(1), match.group(2) or match.group(1)
        return int(height), int(width)


def device_option(command: Decorated) -> Decorated:
    """``--device``, the same in every command that runs a model."""
    return click.option(
        "--device",
        metavar="D",
        help="cpu, cuda, cuda:1 or mps.  [default: the first GPU, else the CPU]",
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


@contextmanager
def image_counter(description: str) -> Iterator[Callable[[int], None]]:
    """A line that counts images while the block runs; yields what is called with the number of new ones."""
    from tqdm import tqdm

    with tqdm(desc=description, unit="img", leave=False) as bar:

        def count(images: int) -> None:
            bar.update(images)

        yield count

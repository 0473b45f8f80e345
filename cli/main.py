"""The command ``mvision`` with its subcommands. Here errors become one line on stderr and an exit code.

Exit codes: 0 done, 1 a bug in mvision (with its traceback), 2 wrong usage or bad input (one line), 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from mvision import __version__
from mvision.cli.benchmark import benchmark
from mvision.cli.data import data
from mvision.cli.export import export
from mvision.cli.info import info
from mvision.cli.options import SuggestingGroup
from mvision.cli.predict import predict
from mvision.cli.train import train
from mvision.cli.transfer import transfer
from mvision.cli.val import val
from mvision.errors import UserError

# Errors of the file system that a user can mend: a full disk, no permission, a file where a folder should be.
_FILE_SYSTEM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="mvision %(version)s")
def cli() -> None:
    """Train and use vision models: one encoder, every task.

    \b
    Start here, no data needed:
      mvision train --task detection       train on the built-in data set
      mvision predict --task detection     predict with that run
      mvision train --task instance-seg    the same with masks
    """


for _command in (train, val, predict, export, benchmark, transfer, data, info):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; the entry point of the console script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Exceptions that are bugs pass through with their traceback."""
    try:
        result: Any = cli.main(args=arguments, prog_name="mvision", standalone_mode=False)
        sys.stdout.flush()
        # click returns the code of ctx.exit() here, and what the command returned (None) otherwise.
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        return _fail(_usage_line(error))
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped by Ctrl-C", code=130, prefix="")
    except BrokenPipeError:
        # The reading program (head, less) has ended. Without this, Python's last flush at exit prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = _bad_input_line(error)
        if line is None:
            raise
        return _fail(line)


def _fail(line: str, code: int = 2, prefix: str = "error: ") -> int:
    click.echo(prefix + " ".join(line.split()), err=True)
    return code


def _usage_line(error: click.ClickException) -> str:
    """A click error as one line, with the nearest options and the command that shows the help."""
    line = error.format_message()
    line = line[:1].lower() + line[1:]
    context = getattr(error, "ctx", None)
    if isinstance(error, click.UsageError) and context is not None:
        line = f"{line.rstrip('.')} (help: {context.command_path} --help)"
    return line


def _bad_input_line(error: Exception) -> str | None:
    """The line for an error that the user can mend, or None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _FILE_SYSTEM:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{(error.strerror or str(error)).lower()}"
    if "No space left on device" in str(error):  # safetensors raises its own class without an errno
        return "no space left on the disk that the output goes to"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, compared by name: torch may never have been imported
        return f"out of memory on the device: a smaller --batch-size or --image-size helps ({str(error).split('.')[0]})"
    return None

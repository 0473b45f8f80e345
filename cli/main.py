"""The command ``mvision`` with its subcommands. Here errors become one line on stderr and an exit code.

Exit codes: 0 done, 1 a bug in mvision (with its traceback), 2 wrong usage or bad input (one line), 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mvision import __version__
from mvision.cli.benchmark import benchmark
from mvision.cli.data import data
from mvision.cli.demo import demo
from mvision.cli.export import export
from mvision.cli.info import info
from mvision.cli.label import label
from mvision.cli.models import models
from mvision.cli.options import SuggestingGroup
from mvision.cli.predict import predict
from mvision.cli.push import push
from mvision.cli.train import train
from mvision.cli.transfer import transfer
from mvision.cli.val import val
from mvision.errors import Stopped, UserError, printable, shortened

# Errors of the system that tell of a bug here: a closed file or a process that is gone. All others (a full disk, no
# permission, too many open files, a loop of links, a name that the file system refuses) are the user's to mend.
_BUGS = {errno.EBADF, errno.EFAULT, errno.ECHILD, errno.ESRCH, errno.ENOTTY, errno.EINTR, errno.EDOM, errno.ERANGE}
MAX_LINE = 4000  # characters of an error; more than that is a name or value that fills the terminal
# Parts of messages of libraries that raise classes of their own -> the line for the user.
_FULL_DISK = "no space left on the disk that the output goes to"
_OUT_OF_MEMORY = "out of memory: a smaller --batch-size or --image-size, fewer --workers or smaller pictures help"
_MESSAGES = {
    "No space left on device": _FULL_DISK,  # safetensors
    "PytorchStreamWriter failed writing": _FULL_DISK,  # torch.save
    "Disk quota exceeded": "the disk quota is used up",
    "DefaultCPUAllocator": _OUT_OF_MEMORY,  # torch on the CPU
    "Storage size calculation overflowed": _OUT_OF_MEMORY,  # torch
    "Insufficient memory": _OUT_OF_MEMORY,  # OpenCV
    "bad_alloc": _OUT_OF_MEMORY,  # libraries in C++
    "can't start new thread": "the system allows no further thread or process (see ulimit -u)",
    "embedded null": "the name of a file or folder has a zero byte in it, which no system allows",
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


for _command in (train, val, predict, demo, label, export, push, models, benchmark, transfer, data, info):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; the entry point of the console script.

    SIGTERM, by which schedulers end jobs, ends every command as Ctrl-C does: no file is left half-written.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else the caller has asked to ignore it
        signal.signal(signal.SIGTERM, _stop)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Exceptions that are bugs pass through with their traceback."""
    _show_everything()
    try:
        result: Any = cli.main(args=arguments, prog_name="mvision", standalone_mode=False)
        sys.stdout.flush()
        # click returns the code of ctx.exit() here, and what the command returned (None) otherwise.
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        return _fail(_usage_line(error))
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__  # click raises its Abort from the interruption
        stopped = next((e for e in (error, cause) if isinstance(e, Stopped)), Stopped(signal.SIGINT))
        return _fail(str(stopped), code=stopped.code, prefix="")
    except BrokenPipeError:
        # The reading program (head, less) has ended. Without this, Python's last flush at exit prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = _bad_input_line(error)
        if line is None:
            raise
        return _fail(line)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def _show_everything() -> None:
    """What the encoding of the terminal lacks, such as a class's name in Chinese in one that has ASCII, is escaped.

    Streams that the caller has closed (``>&-``) lead nowhere; else the next file that is opened would take their place.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(line: str, code: int = 2, prefix: str = "error: ") -> int:
    click.echo(prefix + shortened(printable(" ".join(line.split())), MAX_LINE), err=True)
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
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _BUGS:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        return f"{where}{(error.strerror or str(error)).lower()}"
    if isinstance(error, UnicodeError):
        return f"a text or the name of a file that is no valid Unicode: {error}"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read"
    # Compared by name: torch may never have been imported.
    if type(error).__name__ == "OutOfMemoryError" and not isinstance(error, MemoryError):
        return f"out of memory on the device: a smaller --batch-size or --image-size helps ({str(error).split('.')[0]})"
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    return next((line for part, line in _MESSAGES.items() if part in str(error)), None)

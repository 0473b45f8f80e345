"""The exceptions for mistakes that a user can correct and for signals, and texts that are safe to show."""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Iterable

SHORT_LIST = 40  # up to so many names are all listed; among more, several near ones are suggested

# What a terminal takes for a command or draws in another order than it is written: control characters (ESC and its
# one-byte forms U+0080-009F among them), line separators, marks that turn the direction of text, halves of characters.
_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for one line of a terminal or a log: what is no plain character is written out, such as ``\\x1b``.

    Names of classes and files come from data that others made. Shown as they are, they could colour, move or hide lines
    of the terminal, or start a line of their own.
    """
    return _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def shortened(text: str, most: int) -> str:
    """Text of at most ``most`` characters: of a longer one the beginning and the end. A name can have megabytes."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def printable_lines(text: str) -> str:
    """As ``printable``, for a text of several lines: line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


class UserError(Exception):
    """Wrong usage or bad input.

    The message is one line that names the file, key or option, its value, and what to do about it. The command line
    prints it without a traceback and exits with code 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal has ended the work. The command line prints the message as one line and exits with ``code``.

    Attributes:
        number: of the signal.
        hint: how to go on; empty where there is nothing to go on from.
    """

    def __init__(self, number: int, hint: str = "") -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}" + (f"; {hint}" if hint else ""))
        self.number, self.hint = number, hint

    @property
    def code(self) -> int:
        """The exit code that shells give to a process that the signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: ``did you mean 'X'?``, or the list of known names."""
    names = sorted(known)
    by_lower = {name.lower(): name for name in reversed(names)}
    is_short = len(names) <= SHORT_LIST
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=1 if is_short else 3)
    if near:
        return f"did you mean {' or '.join(repr(by_lower[name]) for name in near)}?"
    return f"choose one of {', '.join(names)}" if is_short else "no known name is like it"

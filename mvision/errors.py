"""The exception for mistakes that a user can correct, and the suggestion of a near name for its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHORT_LIST = 40  # up to so many names are all listed; among more, several near ones are suggested


class UserError(Exception):
    """Wrong usage or bad input.

    The message is one line that names the file, key or option, its value, and what to do about it. The command line
    prints it without a traceback and exits with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: ``did you mean 'X'?``, or the list of known names."""
    names = sorted(known)
    by_lower = {name.lower(): name for name in reversed(names)}
    is_short = len(names) <= SHORT_LIST
    near = difflib.get_close_matches(word.lower(), by_lower, n=1 if is_short else 3)
    if near:
        return f"did you mean {' or '.join(repr(by_lower[name]) for name in near)}?"
    return f"choose one of {', '.join(names)}" if is_short else "no known name is like it"

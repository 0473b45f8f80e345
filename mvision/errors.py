"""The one exception that is meant for the user's eyes, and the suggestion that goes into its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 20  # names in a suggestion, at most


class UserError(Exception):
    """Wrong usage or bad input.

    The message is one line that names the file, key or option, the value found there, and the way out. The command line
    prints it without a traceback and exits with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean 'X'?`` for a near miss, otherwise the names that are known."""
    names = sorted(known)
    lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(word.lower(), lower, n=1)
    if near:
        return f"did you mean '{lower[near[0]]}'?"
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"choose one of {', '.join(names[:LISTED])}{more}"

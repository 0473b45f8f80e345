"""Numbers and flags as annotation files hold them: some tools write them as text, some write nonsense."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**63 - 1
"""Ids beyond it fit in no array of whole numbers."""
NO = frozenset({"", "0", "0.0", "false", "no", "none", "null"})


def whole_number(value: Any) -> int | None:
    """An id, a side of an image: a whole number, also as ``3.0``, ``"3"`` or ``"3.0"``; None for anything else."""
    if isinstance(value, int):
        return None if isinstance(value, bool) or abs(value) > LARGEST else value
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        try:
            return whole_number(int(value))  # exact, where a float would round ids of 16 digits
        except ValueError:  # thousands of digits, or two signs
            return None
    found = number(value)
    return int(found) if found is not None and found.is_integer() and abs(found) < LARGEST else None


def number(value: Any) -> float | None:
    """A finite number, also as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):  # no number as text; a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def numbers(value: Any, count: int) -> list[float] | None:
    """A list of ``count`` finite numbers, or a text such as ``"[1, 2, 3, 4]"``; None for anything else."""
    if isinstance(value, str) and len(value) < 64 * count:
        value = value.strip().strip("[]()").replace(",", " ").split()
    if not isinstance(value, list) or len(value) != count:
        return None
    found = []
    for entry in value:
        exact = entry if type(entry) is float and math.isfinite(entry) else number(entry)
        if exact is None:
            return None
        found.append(exact)
    return found


def flag(value: Any) -> bool:
    """Yes or no; ``"0"`` and ``"false"`` as text are no."""
    return value.strip().lower() not in NO if isinstance(value, str) else bool(value)

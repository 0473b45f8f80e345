"""Faults of a data set, counted by kind, for a line in the log or a report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass
class Problem:
    """One kind of fault.

    Attributes:
        kind: what is wrong, and what is done about it.
        count: how often it occurs.
        examples: the first few places.
    """

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} x {self.kind} ({', '.join(self.examples)}{more})"


class Problems:
    """Counts problems by kind and keeps the first few examples of each, in the order of appearance."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Problem] = {}

    def add(self, kind: str, example: str) -> None:
        """Count one case of ``kind``; ``example`` says where (file and annotation)."""
        problem = self._by_kind.setdefault(kind, Problem(kind))
        problem.count += 1
        if len(problem.examples) < MAX_EXAMPLES:
            problem.examples.append(example)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._by_kind.values())

    def __len__(self) -> int:
        """Number of kinds, not of cases."""
        return len(self._by_kind)

    @property
    def count(self) -> int:
        """Number of cases over all kinds."""
        return sum(problem.count for problem in self)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self)

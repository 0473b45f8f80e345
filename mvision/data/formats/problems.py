"""Faults of a data set, counted by kind, for a line in the log or a report."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from mvision.errors import printable, shortened

MAX_EXAMPLES = 5  # places that a line names
MAX_EXAMPLE = 400  # characters of one of them in a line
MAX_PLACES = 100_000  # places that are kept, for a report that lists all of them


@dataclass
class Problem:
    """One kind of fault.

    Attributes:
        kind: what is wrong, and what is done about it.
        count: how often it occurs.
        examples: the places, up to ``MAX_PLACES``.
        field: of ``Targets``, that it concerns: ``masks`` and ``keypoints`` where other tasks lose nothing by it.
    """

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    field: str = "boxes"

    def __str__(self) -> str:
        more = "; ..." if self.count > MAX_EXAMPLES else ""
        shown = [shortened(example, MAX_EXAMPLE) for example in self.examples[:MAX_EXAMPLES]]
        return printable(f"{self.count} x {self.kind} ({'; '.join(shown)}{more})")


class Problems:
    """Counts problems by kind and keeps the places of each, in the order of appearance."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Problem] = {}

    def add(self, kind: str, example: str, field: str = "boxes") -> None:
        """Count one case of ``kind``.

        Args:
            kind: what is wrong, and what is done about it.
            example: where: file and annotation.
            field: see ``Problem``.
        """
        problem = self._by_kind.setdefault(kind, Problem(kind, field=field))
        problem.count += 1
        if len(problem.examples) < MAX_PLACES:
            problem.examples.append(example)

    def of(self, fields: Collection[str]) -> list[Problem]:
        """Those that concern these fields of ``Targets``; those of boxes concern every task."""
        return [problem for problem in self if problem.field == "boxes" or problem.field in fields]

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

"""``predictions.json`` of ``mvision val``: what was evaluated, as a COCO results list with the data set's numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mvision.errors import UserError
from mvision.storage.atomic import whole_file
from mvision.structures import Category


class ResultsFile:
    """A COCO results list that is complete or not there; a context manager.

    Args:
        path: of the file.
        model: the classes of the results.
        data: the classes of the data set. Results get its numbers of the classes of the same name; those of classes
            that it lacks are left out, because their numbers may be those of other classes there.

    Attributes:
        left_out: number of results that were left out, by class name.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, model: Iterable[Category], data: Iterable[Category]) -> None:
        self.path = path
        self.left_out: Counter[str] = Counter()
        numbers = {category.name: category.id for category in data}
        self._classes = {category.id: (category.name, numbers.get(category.name)) for category in model}
        self._separator = "[\n"
        with self._named_errors(), ExitStack() as files:
            temporary = files.enter_context(whole_file(path))
            self._file: TextIO = files.enter_context(temporary.open("w", encoding="utf-8"))
            self._files = files.pop_all()

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append results as ``Instances.to_coco`` gives them; their numbers are not rounded."""
        with self._named_errors():
            for entry in entries:
                name, number = self._classes[entry["category_id"]]
                if number is None:
                    self.left_out[name] += 1
                    continue
                self._file.write(self._separator + json.dumps({**entry, "category_id": number}))
                self._separator = ",\n"

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._named_errors():
            if error is not None:
                self._files.__exit__(kind, error, trace)
                return
            with self._files:
                self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error


def results_path(folder: Path, *names: str, taken: Sequence[Path] = ()) -> Path:
    """``predictions.json``, or ``predictions-NAME.json`` where there are several; with a number where that is taken."""
    stem = "-".join(["predictions", *names])
    path, number = folder / f"{stem}.json", 1
    while path in taken:
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path

"""A run's folder: its place, its files, who writes into it, and what a kill at any moment leaves of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mvision.errors import UserError
from mvision.storage.atomic import remove_partial_files, write_text

BEST = "best.safetensors"
METRICS = "metrics.jsonl"
END = ("metrics.json", "curves*.png", "curves.json", "calibration*.png", "confusion_matrix*.png", "predictions.jpg")
"""What is written when a run ends, about the weights in ``BEST``."""


class RunFolder:
    """``runs/TASK/N`` with the files that docs/runs.md lists.

    Every file is replaced as a whole. ``last/state.safetensors`` is the only one that a resumed run relies on: it holds
    the record of the last epoch too, from which a line of ``metrics.jsonl`` that a kill prevented is made up for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state(self) -> Path:
        """The state from which the run can be resumed."""
        return self.path / "last" / "state.safetensors"

    @classmethod
    def create(cls, output: Path | None, tasks: list[str]) -> RunFolder:
        """A new folder: ``output``, or the next free number under ``runs/TASK``.

        Raises:
            UserError: the folder cannot be created, or ``output`` is not empty.
        """
        try:
            if output is not None:
                if output.exists() and any(output.iterdir()):
                    raise UserError(f"--output {output}: the folder is not empty; choose another, or --resume {output}")
                output.mkdir(parents=True, exist_ok=True)
                return cls(output)
            parent = Path("runs") / "+".join(tasks)
            parent.mkdir(parents=True, exist_ok=True)
            number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdecimal()), default=0)
            while True:
                try:
                    (parent / str(number)).mkdir()
                    return cls(parent / str(number))
                except FileExistsError:
                    number += 1
        except OSError as error:
            place = output or Path("runs")
            raise UserError(
                f"--output {place}: cannot be written ({error.strerror or error}); choose another"
            ) from error

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """The folder of a run that can be continued.

        Raises:
            UserError: it has no saved state, or one that an earlier version wrote as pickles.
        """
        run = cls(path)
        if run.state.is_file():
            return run
        if (run.state.parent / "progress.json").is_file() or (path / ".last.old").is_dir():
            raise UserError(
                f"--resume {path}: an earlier version saved its state in files that can run code when opened, and they "
                f"are not read; start a new run from its weights: --init {path / BEST}"
            )
        raise UserError(
            f"--resume {path}: no saved state in {run.state.parent}; it is saved after the first epoch, and when a run "
            "is stopped by Ctrl-C or SIGTERM. Start the run again with another --output"
        )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside this context no other process can claim the folder; the claim ends with the process, however it ends.

        What a killed run left half-written is removed.

        Raises:
            UserError: a run is going on in the folder, or nothing can be written into it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.path}: a training is going on in this folder; wait for its end, or choose another"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        try:
            for folder in (self.path, self.state.parent):
                remove_partial_files(folder, all_of_them=True)
            yield
        finally:
            lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run, see ``mvision.storage.atomic``; nothing is done where it has this text already."""
        path = self.path / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._write_records([*self.records(), record])

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Raises:
            UserError: a line is no such record.
        """
        path = self.path / METRICS
        if not path.is_file():
            return []
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); remove that line") from error
            if record is not None and not _is_record(record):
                raise UserError(f"{path}: line {number} is not the record of an epoch; remove that line")
            records += [] if record is None else [record]
        return records

    def restore_records(self, epoch: int, last: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Make ``metrics.jsonl`` agree with the saved state, and return its records.

        Args:
            epoch: epochs of the state. Lines of later ones are removed: the run trains these epochs again.
            last: the record of the state's last epoch; it is added where a kill came before its line.
        """
        records = [record for record in self.records() if record["epoch"] < epoch]
        if last is not None and all(record["epoch"] != last["epoch"] for record in records):
            records.append(last)
        self._write_records(records)
        return records

    def _write_records(self, records: list[dict[str, Any]]) -> None:
        self.write_text(METRICS, "".join(json.dumps(record) + "\n" for record in records))

    def is_finished(self, epoch: int) -> bool:
        """Whether everything that a run leaves at its end is there, for an end after this number of epochs."""
        try:
            return bool(json.loads(self._finished.read_text(encoding="utf-8")) == {"epochs": epoch})
        except (OSError, ValueError):
            return False

    def mark_finished(self, epoch: int) -> None:
        """Note that everything is there which a run leaves at its end after this number of epochs."""
        write_text(self._finished, json.dumps({"epochs": epoch}))

    def forget_end(self) -> None:
        """Remove what a run leaves at its end, figures and pictures of weights that are about to be replaced."""
        self._finished.unlink(missing_ok=True)
        for pattern in END:
            for path in self.path.glob(pattern):
                path.unlink()

    @property
    def _finished(self) -> Path:
        return self.state.parent / "finished.json"


def _is_record(record: Any) -> bool:
    """Whether a line of ``metrics.jsonl`` has what is read of it: the epoch, loss terms and figures by task."""
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        return False
    figures = record.get("metrics", {})
    return _are_numbers(record.get("loss")) and isinstance(figures, dict) and all(map(_are_numbers, figures.values()))


def _are_numbers(named: Any) -> bool:
    return isinstance(named, dict) and all(isinstance(value, int | float) for value in named.values())

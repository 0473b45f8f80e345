"""A run's folder: its place, its files, and writing them so that a kill at any moment leaves complete ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mvision.errors import UserError
from mvision.storage.atomic import write_text

STATE = "last"
BEST = "best.safetensors"


class RunFolder:
    """``runs/TASK/N`` with the files that the README lists under "What a run leaves"."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
        """The folder of a run that can be continued; UserError if it has no saved state."""
        run = cls(path)
        if not (run.state() / "progress.json").is_file():
            raise UserError(f"--resume {path}: no saved state in {path / STATE}; it is saved after the first epoch")
        return run

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run, see ``mvision.storage.atomic``."""
        write_text(self.path / name, text)

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def cut_records(self, epoch: int) -> None:
        """Remove the lines of the epochs from ``epoch`` on: a run that is resumed trains these epochs again."""
        kept = [record for record in self.records() if record["epoch"] < epoch]
        self.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def replace_state(self, fresh: Path) -> None:
        """Make the folder ``fresh`` the run's saved state; after a kill the old or the new one is there."""
        state, old = self.path / STATE, self.path / f".{STATE}.old"
        shutil.rmtree(old, ignore_errors=True)
        if state.exists():
            state.replace(old)
        fresh.replace(state)
        shutil.rmtree(old, ignore_errors=True)

    def state(self) -> Path:
        """The folder of the saved state, which is the previous one after a kill between the two renames."""
        old = self.path / f".{STATE}.old"
        if not (self.path / STATE).exists() and old.exists():
            old.replace(self.path / STATE)
        return self.path / STATE

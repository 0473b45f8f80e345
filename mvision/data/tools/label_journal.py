"""The work of ``mvision label`` that is done so far: a folder beside the output from which a stopped run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from mvision.data.formats.labelled import LabelledPicture
from mvision.errors import UserError

FILE, DATA, LOCK = "predictions.jsonl", "data", ".lock"
# Settings of a run by the option that sets them.
OPTIONS = {"source": "FOLDER", "weights": "--weights", "tasks": "--task"}


class Journal:
    """A line of JSON for every picture that is done, in the hidden folder ``.NAME.partial`` beside the output.

    Only one picture and the names of all are in memory. A context manager: at its end the file is closed, and the
    folder is removed if it holds nothing.

    Attributes:
        folder: the hidden folder.
        counts: over all pictures, objects by class and by what else ``add`` was given.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        """Open it, or make it.

        Args:
            target: the output.
            settings: what the predictions depend on; those of a run that goes on have to be the same.

        Raises:
            UserError: the folder cannot be written, another process writes it, or it is of other settings.
        """
        self.folder = target.with_name(f".{target.name}.partial")
        self.path = self.folder / FILE
        self._lines: dict[str, tuple[int, list[int]]] = {}  # by name: place of the line, and stamp of the picture
        self._settings = dict(settings)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / LOCK)
            self._lock.acquire(timeout=0)
            self._file = self.path.open("ab+")
            self._resume()
        except Timeout as error:
            raise UserError(f"--output {target}: another process is writing it; choose another folder") from error
        except OSError as error:
            raise UserError(
                f"--output {target}: cannot be written ({error.strerror or error}); choose another"
            ) from error
        except UserError:
            self._file.close()
            self._lock.release()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lines:
            self.remove()
        self._file.close()
        self._lock.release()

    def __len__(self) -> int:
        return len(self._lines)

    def has(self, name: str, stamp: list[int]) -> bool:
        """Whether a picture is done, and has not changed since."""
        return name in self._lines and self._lines[name][1] == stamp

    def keep_only(self, names: set[str]) -> int:
        """Forget pictures that are not among these any more; returns how many they were."""
        gone = self._lines.keys() - names
        for name in gone:
            del self._lines[name]
        return len(gone)

    def add(self, picture: LabelledPicture, stamp: list[int], notes: Mapping[str, int]) -> None:
        """Write a picture.

        Args:
            stamp: tells this version of its file from others.
            notes: numbers of things by what was left out of the picture or replaced in it.
        """
        self._lines[picture.name] = (self._file.seek(0, os.SEEK_END), stamp)
        rest = json.dumps({"stamp": stamp, "notes": dict(notes)})
        # The picture comes last, so that the rest can be read without it.
        self._file.write(f'{rest[:-1]}, "picture": {picture.to_json()}}}\n'.encode("ascii"))
        self._file.flush()

    def entries(self) -> Iterator[tuple[LabelledPicture, Counter[str]]]:
        """Every picture, in the order in which they were done, with its notes."""
        with self.path.open("rb") as file:
            file.readline()
            place = file.tell()
            for line in file:
                tree = json.loads(line)
                picture = LabelledPicture.from_json(tree["picture"])
                if self._lines.get(picture.name, (-1,))[0] == place:
                    yield picture, Counter(tree["notes"])
                place += len(line)

    def remove(self) -> None:
        """Delete the folder; nothing can be added any more."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _resume(self) -> None:
        self._file.seek(0)
        header = self._file.readline()
        if not header.endswith(b"\n"):  # a new file, or one of a process that was killed at once
            self._file.truncate(0)
            self._file.write(json.dumps(self._settings).encode() + b"\n")
            self._file.flush()
            return
        try:
            self._compare(json.loads(header))
            place = self._file.tell()
            for line in self._file:
                if not line.endswith(b"\n"):
                    break  # the process was killed while it wrote this line
                tree = json.loads(line)
                self._lines[tree["picture"]["name"]] = (place, tree["stamp"])
                place += len(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: damaged ({error}); delete the folder {self.folder} and start again"
            ) from error
        self._file.truncate(place)

    def _compare(self, earlier: dict[str, Any]) -> None:
        for key, value in self._settings.items():
            if earlier.get(key) != value:
                option = OPTIONS.get(key, f"--{key}")
                raise UserError(
                    f"{self.folder} has the unfinished work of a run with {option} {_shown(earlier.get(key))}, not "
                    f"{_shown(value)}: go on with the same options, choose another --output, or delete that folder"
                )


def _shown(value: Any) -> str:
    return "none" if value in (None, []) else " ".join(map(str, value)) if isinstance(value, list) else str(value)

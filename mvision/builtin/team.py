"""Processes that share numbered jobs: each takes the next one as soon as it has done the last."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from threading import Condition, Thread
from typing import IO, Any

_LONGEST = 200  # characters that are quoted of a process's last words


class Team:
    """Processes that answer the number of a job, a line of their standard input, with a line of JSON.

    Attributes:
        count: processes that were asked for.
        lost: why each process that could not be started, or ended before the jobs did, is gone.
    """

    def __init__(self, start: Callable[[int], subprocess.Popen[str]], count: int, jobs: int) -> None:
        """Start the processes.

        Args:
            start: starts one; its argument is the file descriptor for the standard error. May raise OSError.
            count: of processes; 0: every `result` is None.
            jobs: they are numbered from 0 on.
        """
        self.count = count
        self.lost: list[str] = []
        self._start = start
        self._jobs = iter(range(jobs))
        self._results: dict[int, Any] = {}
        self._failed: set[int] = set()
        self._processes: list[subprocess.Popen[str]] = []
        self._closed = False
        self._changed = Condition()
        self._threads = [Thread(target=self._serve, daemon=True) for _ in range(count)]
        self._serving = count
        for thread in self._threads:  # one for each process: it starts it, and waits for its answers
            thread.start()

    @property
    def active(self) -> bool:
        """Whether a process is left."""
        return self._serving > 0

    def result(self, number: int) -> Any:
        """The answer to a job, waited for; None where the caller has to do it: its process has ended, or all have."""
        with self._changed:
            while number not in self._results and number not in self._failed and self._serving:
                self._changed.wait(0.5)  # with a limit: without, Ctrl-C does not get through on Windows
            return self._results.pop(number, None)

    def close(self) -> None:
        """End all processes, whatever they do, and wait until they have ended."""
        with self._changed:
            self._closed = True
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        reason = None
        try:
            with tempfile.TemporaryFile() as errors:
                reason = self._serve_one(errors)
        except OSError as error:
            reason = f"not started: {error.strerror or error}"
        finally:
            with self._changed:
                self._serving -= 1
                if reason is not None and not self._closed:
                    self.lost.append(reason)
                self._changed.notify_all()

    def _serve_one(self, errors: IO[bytes]) -> str | None:
        """Start a process and pass it jobs until none is left; the reason where it ended before."""
        process = self._start(errors.fileno())
        with process:  # closes the pipes and waits
            with self._changed:
                self._processes.append(process)
                if self._closed:
                    process.kill()
            while (number := self._next()) is not None:
                answer = _ask(process, number)
                with self._changed:
                    if answer is None:
                        self._failed.add(number)
                    else:
                        self._results[number] = answer
                    self._changed.notify_all()
                if answer is None:
                    process.kill()  # where it answered, but not what was asked
                    return _last_words(process.wait(), errors)
        return None

    def _next(self) -> int | None:
        with self._changed:
            return None if self._closed else next(self._jobs, None)


def _ask(process: subprocess.Popen[str], number: int) -> Any:
    """The answer of a process to a job; None where there is none, or no whole one."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # Past the buffer: what is left in it when the process ends would be written, and fail, once more on closing.
        os.write(process.stdin.fileno(), f"{number}\n".encode())
        return json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return None  # the process has ended; the caller says why


def _last_words(code: int, errors: IO[bytes]) -> str:
    """How a process ended, with the last line of its standard error."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")[:_LONGEST]
    names = {-number: number.name for number in signal.Signals}
    ending = f"killed by {names[code]}" if code in names else f"exit code {code}"
    return f"{ending}: {last}" if last else ending

"""Drawing many pictures, in several processes where that pays."""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cv2

from mvision.builtin.scene import generate_image
from mvision.machine import cores

Job = tuple[str, int]  # split, index
_JPEG_QUALITY = 88
_MAX_PROCESSES = 8
_WORTH_A_PROCESS = 40  # images; starting a process takes as long as drawing about thirty
_WORKER = "import sys; from mvision.builtin.drawing import work; work(*sys.argv[1:])"


def list_jobs(train: int, val: int) -> list[Job]:
    """Every picture of the set, in the order of the annotation files."""
    return [("train", i) for i in range(train)] + [("val", i) for i in range(val)]


def draw_all(folder: Path, seed: int, train: int, val: int) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Write all pictures into a folder and yield (split, record) in the order of `list_jobs`.

    A record is the image's COCO entry without ids, with one key more, `annotations`. Closing the generator ends the
    processes it started. Threads would not do: most of the work is Python's own.

    Raises:
        OSError: a file can't be written.
    """
    jobs = list_jobs(train, val)
    count = min(cores() if _can_start_processes() else 1, _MAX_PROCESSES, len(jobs) // _WORTH_A_PROCESS)
    workers: list[subprocess.Popen[str] | None] = []
    try:
        for first in range(count if count > 1 else 0):
            workers.append(_start(folder, seed, train, val, first, count))
        for number, job in enumerate(jobs):
            line = _next_line(workers[number % count]) if workers else ""
            # Where processes can't be started, or one died, its pictures are drawn here: the cause, if it is one that
            # matters, then shows here as well, as an ordinary exception.
            yield job[0], json.loads(line) if line.endswith("\n") else draw(folder, seed, job)
    finally:
        for worker in workers:
            if worker is not None:
                with worker:  # closes the pipe and waits
                    worker.kill()


def draw(folder: Path, seed: int, job: Job) -> dict[str, Any]:
    """Write one picture and return its record."""
    split, index = job
    image, annotations = generate_image(seed, index, split)
    name = f"{split}_{index:06d}.jpg"
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise OSError(f"OpenCV could not encode {name}")
    (folder / name).write_bytes(data.tobytes())
    height, width = image.shape[:2]
    return {"file_name": name, "width": width, "height": height, "annotations": annotations}


def work(folder: str, *numbers: str) -> None:
    """What a started process does: draw every `count`-th picture from `first` on, and print one record a line."""
    seed, train, val, first, count = map(int, numbers)
    cv2.setNumThreads(1)  # the pictures are small, and the other cores are taken
    for job in list_jobs(train, val)[first::count]:
        print(json.dumps(draw(Path(folder), seed, job)), flush=True)


def _start(folder: Path, *numbers: int) -> subprocess.Popen[str] | None:
    """A fresh interpreter rather than `multiprocessing`: it neither forks this process, whose other libraries may hold
    locks, nor imports the caller's main module, which need not be guarded then. None where the system refuses."""
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(folder), *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except OSError:
        return None


def _next_line(worker: subprocess.Popen[str] | None) -> str:
    """A worker's next record; empty, or without a line end, if the process has ended."""
    return worker.stdout.readline() if worker is not None and worker.stdout is not None else ""


def _can_start_processes() -> bool:
    """False in a frozen program, where there is no interpreter to start."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)

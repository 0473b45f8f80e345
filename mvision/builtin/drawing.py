"""Drawing many pictures, in several processes where that pays."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import cv2

from mvision.builtin.scene import generate_image
from mvision.builtin.team import Team
from mvision.machine import cores, keep_freed_memory

Job = tuple[str, int]  # split, index
_JPEG_QUALITY = 88
_MAX_PROCESSES = 32
_WORTH_A_PROCESS = 40  # images; starting a process takes as long as drawing about thirty
_WORKER = "import sys; from mvision.builtin.drawing import work; work(*sys.argv[1:])"
# The pictures are small, and every core has a process: threads of numpy's libraries would only be in the way.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def list_jobs(train: int, val: int) -> list[Job]:
    """Every picture of the set, in the order of the annotation files."""
    return [("train", i) for i in range(train)] + [("val", i) for i in range(val)]


def draw_all(
    folder: Path, seed: int, train: int, val: int, log: Callable[[str], None]
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Write all pictures into a folder and yield (split, record) in the order of `list_jobs`.

    A record is the image's COCO entry without ids, with one key more, `annotations`. Closing the generator ends the
    processes it started. Threads would not do: most of the work is Python's own.

    Args:
        log: is called with a line about processes that ended early or could not be started. Their pictures are drawn
            here: the cause, if it is one that matters, then shows here as well, as an ordinary exception.

    Raises:
        OSError: a file can't be written.
    """
    jobs = list_jobs(train, val)
    count = min(cores() if _can_start_processes() else 1, _MAX_PROCESSES, len(jobs) // _WORTH_A_PROCESS)
    team = Team(lambda errors: _start(errors, folder, seed, train, val), count if count > 1 else 0, len(jobs))
    alone, said = 0, False
    try:
        for number, job in enumerate(jobs):
            record = team.result(number)
            if record is None:
                if team.lost and not team.active and not said:
                    log(f"{_lost(team)}: {len(jobs) - number} of {len(jobs)} pictures are drawn in one process")
                    said = True
                record = draw(folder, seed, job)
                alone += 1
            yield job[0], record
    finally:
        team.close()
    if team.lost and not said:
        log(f"{_lost(team)}; {alone} of {len(jobs)} pictures were drawn in their place, the others by the rest")


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
    """What a started process does: read the number of a picture, draw it, print its record in a line, and so on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process; the caller ends this one
    keep_freed_memory()
    cv2.setNumThreads(1)
    seed, train, val = map(int, numbers)
    jobs = list_jobs(train, val)
    for line in sys.stdin:  # ends with the caller, also where it is killed
        print(json.dumps(draw(Path(folder), seed, jobs[int(line)])), flush=True)


def _start(errors: int, folder: Path, *numbers: int) -> subprocess.Popen[str]:
    """A fresh interpreter rather than `multiprocessing`: it neither forks this process, whose other libraries may hold
    locks, nor imports the caller's main module, which need not be guarded then.

    errors: file descriptor that takes what it has to say about its end.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(folder), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def _lost(team: Team) -> str:
    few = f"{len(team.lost)} of {team.count} drawing processes"
    return f"warning: {few} could not be started or ended early ({', '.join(dict.fromkeys(team.lost))})"


def _can_start_processes() -> bool:
    """False in a frozen program, where there is no interpreter to start."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)

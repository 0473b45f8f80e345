"""Worker processes: how many, and the server that they are forked from. Needs no torch, so that it can start early."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

from mvision.machine import cores

PRELOAD = "mvision.data.loading.loader"  # all that a worker needs
# Workers compute with one thread each, of which there is one for every core: numpy's and torch's libraries would start
# as many again in the server, and once more in every process that is forked from it.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def pick_workers(workers: int | None, on_cuda: bool, world_size: int = 1) -> int:
    """Loading processes per training process: as asked for, else by the cores.

    With a GPU all cores but one, up to 16. On a CPU the training itself needs the cores: one worker, and up to four on
    large machines. Measured on two cores: a step of 258 ms without loading takes 54 ms more with no worker, 18 ms more
    with one, 24 ms more with two.
    """
    if workers is not None:
        return workers
    available = cores()
    if available == 1:
        return 0
    per_process = available // world_size
    return max(1, min(per_process - 1, 16)) if on_cuda else max(1, min(per_process // 4, 4))


def worker_context() -> BaseContext:
    """How worker processes start: forked from a server process, which is itself a new interpreter.

    A fork of the main process copies locks that a thread of OpenMP, cv2 or a tracker may hold, and then hangs. A new
    interpreter for every worker would import torch each time; the server does the imports once. It begins with them at
    the first call of this function, so the earlier that is, the sooner the first batch is there.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import resource_tracker  # not importable on Windows, nor is the next
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # The server and the workers never see Ctrl-C and SIGTERM, which terminals and schedulers send to every process.
    resource_tracker.ensure_running()  # else it is started below, and lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        with _environment_of_the_server():
            ensure_running()  # its imports take seconds, in which the caller can go on
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@contextmanager
def _environment_of_the_server() -> Iterator[None]:
    """The variables that a process started here inherits, besides those of this one.

    Python 3.11 does not tell the server where this process finds modules. Where ``sys.path`` has been changed, it would
    skip what it cannot import, in silence, and every worker would import everything by itself.
    """
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    changes = {**ONE_THREAD, "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Ray: joining the cluster that the environment names, or starting one on this machine, and its errors as one line."""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mvision.errors import UserError
from mvision.machine import cores

ADDRESS = "RAY_ADDRESS"
_USER_ERROR = re.compile(rf"{UserError.__module__}\.{UserError.__name__}: (.+)")
THREADS = 4  # of an actor on CPUs: as many forward passes share one copy of the model
FOR_ACTORS = 0.625  # of the CPUs; the others read and write. Ray counts CPUs and ties no process to them
READ_CPUS, WRITE_CPUS = 0.25, 0.125  # of a task; reading waits for disks and networks


@dataclass(frozen=True)
class Actors:
    """The actors of a cluster.

    Attributes:
        count: how many there are.
        device: of PyTorch.
        cpus, gpus: what Ray reserves for each.
        threads: of PyTorch in each, on CPUs.
    """

    count: int
    device: str
    cpus: float
    gpus: float
    threads: int


def require_ray() -> None:
    """Raise a ``UserError`` where Ray Data or what it needs is missing."""
    try:
        importlib.import_module("ray")
        importlib.import_module("pyarrow")
        importlib.import_module("pandas")
    except ImportError as error:
        raise UserError(
            f"--engine ray: the package {error.name} is missing: pip install 'ray[data]', or mvision with its extra: "
            'pip install -e ".[ray]"'
        ) from error


@contextmanager
def ray_session() -> Iterator[None]:
    """Inside this context Ray is connected: as before, to the cluster of ``RAY_ADDRESS``, or to one of its own.

    Only what was started here is shut down. The signal handlers stay those of the caller: Ray's own one would end this
    process without a word.

    Raises:
        UserError: there is no cluster at the address.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.data  # sets the levels of its logger

    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    started = not ray.is_initialized()
    try:
        if started:
            _start()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if started:
            ray.shutdown()


def _start() -> None:
    import ray

    address = os.environ.get(ADDRESS)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    # Ray Data makes actors in a way that Ray's core calls an error in a line of its own (an actor whose arguments are
    # lost cannot be restarted). With this level, which may be set otherwise, it says so as it starts, and no more.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with _hidden_stderr():
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", num_cpus=cores(), include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"{ADDRESS} {address}" if address else "--engine ray"
        what = "cannot join that cluster" if address else "Ray does not start on this machine"
        raise UserError(f"{where}: {what} ({' '.join(str(error).split())[:300]})") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _hidden_stderr() -> Iterator[None]:
    """What libraries in C++ print is lost inside this context."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def choose_actors(device: str | None, count: int | None, own_threads: bool) -> Actors:
    """How many actors there are and what each gets, from what the cluster has.

    Args:
        device: ``cpu``, ``cuda`` or None: GPUs where the cluster has some.
        count: None: one for each GPU, or on CPUs one for four cores.
        own_threads: the runtime takes all cores of a machine by itself.

    Raises:
        UserError: another device, or a cluster without the GPUs that were asked for.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in alive))
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: with --engine ray give cpu or cuda; Ray hands each actor a GPU of its own")
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: the cluster has no GPU; leave it out, or give cpu")
    if gpus and device != "cpu":
        wanted = count or gpus
        # Whole actors have to fit on one GPU: three on two GPUs are halves, not two thirds.
        return Actors(wanted, "cuda", 1.0 if wanted <= gpus else 0.5, 1 / math.ceil(wanted / gpus), 1)
    cpus = [int(node["CPU"]) for node in alive if node.get("CPU", 0) >= 1] or [1]
    size = min(min(cpus), THREADS) if not own_threads else min(cpus)
    fitting = sum(node // size for node in cpus)
    wanted = count or fitting
    threads = size if wanted <= fitting else max(1, size // math.ceil(wanted / fitting))
    share = FOR_ACTORS * size / max(1, math.ceil(wanted / fitting))
    return Actors(wanted, "cpu", share, 0, threads)


def user_error_in(error: BaseException) -> UserError | None:
    """The error of a user's making that a task or an actor of Ray has ended with; None: it is another one.

    Ray sends exceptions without their causes, but with the text of the traceback, which names them.
    """
    found = _USER_ERROR.findall(str(error))
    return UserError(found[-1].strip()) if found else None

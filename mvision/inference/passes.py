"""Forward passes at once on a CPU, in threads that stay: each with a part of PyTorch's threads.

``torch.set_num_threads`` sets two numbers: that of the thread which calls it, and that of every thread that computes
for the first time later. The threads here set their own once, and the caller's thread sets the second one back, so that
the rest of the program keeps its number. They are kept, because between the two a thread of the program could begin to
compute; and predictions of several threads of the program share them, so that no more passes run than there are cores.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

MOST_PASSES = 4  # each needs memory for its activations


def forward_passes(threads: int, batches: int | None) -> tuple[int, int]:
    """How many forward passes to run at once on a CPU, and how many of PyTorch's threads each gets.

    Several passes of one thread each take less time than one pass after the other by all threads: these wait for each
    other at the end of every operator, longest where decoding and drawing need the cores too.

    Args:
        threads: that PyTorch has.
        batches: how many there are to come; None: not known.
    """
    passes = max(1, min(threads, MOST_PASSES, threads if batches is None else batches))
    return passes, threads // passes


def pool(passes: int, threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which PyTorch computes with ``threads``; the same ones in every call."""
    with _of_all.lock:
        found = _of_all.pools.get((passes, threads))
        if found is None:
            found = _of_all.pools[passes, threads] = _started(passes, threads)
        return found


def _started(passes: int, threads: int) -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(passes, "forward-pass")
    everyone = threading.Barrier(passes + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread takes the program's number, also over one that was set
        everyone.wait()
        torch.set_num_threads(threads)
        everyone.wait()

    before = torch.get_num_threads()
    try:
        for _ in range(passes):
            executor.submit(begin)
        everyone.wait()
        everyone.wait()
    except BaseException:  # no thread can be started, or Ctrl-C: those that wait end
        everyone.abort()
        executor.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(before)
    return executor


class _OfAllModels:
    """The threads of this process, by the number of passes and of PyTorch's threads in each."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pools: dict[tuple[int, int], ThreadPoolExecutor] = {}

    def after_fork(self) -> None:
        """In the new process: neither these threads exist in it nor the one that may have held the lock."""
        self.lock = threading.Lock()
        self.pools = {}


_of_all = _OfAllModels()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_of_all.after_fork)

"""Two generators that let reading, computing and writing overlap, in order and with bounded memory.

Both read their input only up to a given number of items ahead. An exception in a thread is raised where its result is
taken. Closing a generator (or an exception in its consumer) stops the threads and closes the input.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    ahead: int | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> Generator[R, None, None]:
    """``map(function, items)`` on ``workers`` threads with up to ``ahead`` results waiting (twice the threads if None).

    The input is iterated in the caller's thread. With a single worker the calls themselves are in order too. ``pool``:
    that many threads which others may use as well; None: threads of its own.
    """
    limit = 2 * workers if ahead is None else ahead
    executor = ThreadPoolExecutor(workers) if pool is None else pool
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        if pool is None:
            executor.shutdown(wait=True, cancel_futures=True)
        else:
            wait([future for future in pending if not future.cancel()])
        if isinstance(items, Generator):
            items.close()


def background(items: Iterable[T], ahead: int = 4) -> Generator[T, None, None]:
    """The same items, produced by a thread of their own, up to ``ahead`` of them before they are taken."""
    iterator = iter(items)
    end: Any = object()
    executor = ThreadPoolExecutor(1)
    try:
        pending = deque(executor.submit(next, iterator, end) for _ in range(ahead))
        while (item := pending.popleft().result()) is not end:
            pending.append(executor.submit(next, iterator, end))
            yield item
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        if isinstance(iterator, Generator):
            iterator.close()

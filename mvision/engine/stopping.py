"""Ending a training from outside: by Ctrl-C, by SIGTERM (schedulers pre-empt jobs so), or with another process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from mvision.errors import Stopped, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAUNCHED = "LOCAL_RANK"
"""The environment variable by which torchrun and others tell a process that it is one of several."""
REPEATED = 2.0
"""Seconds in which a signal that comes again is the same request: ``timeout``, ``srun`` and ``torchrun`` send it to a
process that has had it from its group already."""
T = TypeVar("T")


class StopRequest:
    """Turns signals into ``Stopped``: at once, or inside ``held`` at the next moment that asks for ``requested``.

    A second Ctrl-C or SIGTERM does not wait for that moment. SIGTERM is a second one only after ``REPEATED`` seconds,
    and so is Ctrl-C where a launcher has started several processes, because it passes both on.

    Attributes:
        number: of the first signal that has come; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._holds = 0
        self._came = 0.0  # the time of the first signal
        self._waits = False
        self._group: Any = None
        self._question: Any = None
        self._answer = torch.zeros(2, dtype=torch.int64)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Receive the signals of this process; they are ignored where the caller of the program ignores them."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows no other thread to do this
            before = {number: signal.getsignal(number) for number in SIGNALS}
            before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._receive)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside this context signals are noted only."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def waiting(self, items: Iterable[T], may_stop: Callable[[], bool], save: Callable[[], None]) -> Iterator[T]:
        """The same items. A signal that comes while one is waited for does not wait for it, not even inside ``held``.

        Args:
            may_stop: asked before each wait: whether the training can go on from here.
            save: called where a signal has ended the wait.

        Raises:
            Stopped: a signal has ended the wait.
        """
        iterator = iter(items)
        while True:
            waits = may_stop()
            try:
                self._waits = waits
                if waits and self.number is not None:  # it came just before
                    raise self.stopped()
                item = next(iterator)
            except StopIteration:
                return
            except Stopped:
                if hasattr(items, "close"):
                    items.close()  # a progress bar, also one that has not begun, ends before the line that says why
                if waits:
                    save()
                raise
            finally:
                self._waits = False
            yield item

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether a signal has come to any of the processes; all of them have to ask at the same moment."""
        if accelerator.num_processes == 1:
            return self.number is not None
        stops, _ = self._receive_answer()
        if not stops:
            self._ask(False)
            stops, _ = self._receive_answer()
        return stops

    def agree(self, accelerator: Accelerator, wish: bool) -> tuple[bool, bool]:
        """The same for a training step, without waiting for the other processes.

        All processes get the same answers. Where there are several, those are to the questions of the step before.

        Args:
            wish: something that all processes have to do in the same step, because one of them wants it.

        Returns:
            Whether a signal has come, and whether one of the processes had this wish.
        """
        if accelerator.num_processes == 1:
            return self.number is not None, wish
        stops, wished = self._receive_answer()
        if not stops:
            self._ask(wish)
        return stops, wished

    def _ask(self, wish: bool) -> None:
        """Send this process's signal and wish to the others."""
        if self._group is None:
            # Of its own, on the CPU: with the one of the gradients, on a GPU, the answer would wait for them.
            self._group = torch.distributed.new_group(backend="gloo")
        self._answer = torch.tensor([self.number or 0, wish])
        self._question = torch.distributed.all_reduce(
            self._answer, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

    def _receive_answer(self) -> tuple[bool, bool]:
        """Wait for the answer to the last question: whether a signal has come to any process, and whether one wished.

        A signal that has come to this process since is not in it: the others do not know of it yet.
        """
        if self._question is None:
            return False, False
        self._question.wait()
        self._question = None
        number, wish = self._answer.tolist()
        self.number = number or self.number
        return number != 0, wish != 0

    def stopped(self, hint: str = "") -> Stopped:
        """The exception for the signal that has come."""
        return Stopped(self.number or signal.SIGINT, hint)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first = self.number is None
        if is_first:
            self.number, self._came = number, time.monotonic()
        if is_first and self._holds and not self._waits:
            # Not print: the signal may have come while this thread writes to the same stream.
            again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            os.write(2, f"\nstopping after this step, to save the state; {again} again stops at once\n".encode())
        elif is_first or self._is_second(number):
            raise Stopped(number)

    def _is_second(self, number: int) -> bool:
        """Whether a signal that is not the first one is a request of its own."""
        by_hand = number == signal.SIGINT and LAUNCHED not in os.environ
        return by_hand or time.monotonic() - self._came > REPEATED


@contextmanager
def lost_processes_in_one_line(accelerator: Accelerator) -> Iterator[None]:
    """The end of another process of the training, which breaks off the communication, becomes an error in one line.

    Raises:
        UserError: the communication between the processes has failed.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_of_communication(error):
            raise
        raise UserError(
            f"process {accelerator.process_index} of {accelerator.num_processes}: another process of this training has "
            "ended, so this one ends too; its own message is above if it had one, and out of memory if it was killed. "
            "Go on with --resume and the run's folder"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors that name its source file; NCCL's have classes of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()

"""Waiting for a reply with poll(2) instead of Trio's loop while nothing else is pending.

A request costs a turn of the loop for each task involved: the one that sent it, the one that reads
the connection, and the one that would take the next request meanwhile.  A loop that serves one
request after the other, such as a mount used by one program, has nothing else to do until the reply
arrives.  Any other input arrives at the descriptors that the loop serves: they are polled, too,
and end the wait.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from warabi._core.tuning import INLINE_LONGEST, INLINE_MOMENT, INLINE_TURN

_served: trio.lowlevel.RunVar[tuple[int, ...]] = trio.lowlevel.RunVar("warabi-served", ())


@contextmanager
def serving(fd: int) -> Iterator[None]:
    """Declare that the loop serves requests from *fd*, and may block until the next one.

    Inside, a request over a connection may get its reply without a checkpoint.
    """
    before = _served.get()
    _served.set((*before, fd))
    try:
        yield
    finally:
        _served.set(before)


class InlineWait:
    """Waits for one descriptor.

    Args:
        fd: where replies arrive.
    """

    __slots__ = ("_end", "_fd", "_poll", "_served")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0.0
        self._served: tuple[int, ...] = ()
        self._poll = select.poll()

    @property
    def turn(self) -> int:
        """Nanoseconds for which a task may do nothing but requests; 0 if the loop serves
        nothing."""
        return INLINE_TURN * 1_000_000 if _served.get() else 0

    def begin(self) -> None:
        """Start the time limit: a request was sent."""
        self._end = time.monotonic() + INLINE_LONGEST / 1000

    def wait(self) -> bool:
        """Whether *fd* becomes readable within a moment, and before any other input.

        False at once in a loop that has not declared what it serves.
        """
        served = _served.get()
        if served is not self._served:
            self._poll = select.poll()
            for fd in (self._fd, *served):
                self._poll.register(fd, select.POLLIN)
            self._served = served
        if not served or time.monotonic() > self._end:
            return False
        return [fd for fd, _ in self._poll.poll(INLINE_MOMENT)] == [self._fd]

"""Waiting for a reply, or for the medium, in the kernel, and not in Trio's loop, while nothing else
is to be done.

A request costs a turn of the loop for each task that takes part: who sent it, who reads the
connection, and who would take the next request meanwhile.  A loop that serves one request after
the other, as a mount does for one program, has nothing else to do until the reply comes.  What may
come otherwise is in the descriptors that it serves: those are waited for too, and end the lull.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

MOMENT = 5
"""Milliseconds for which a loop stands still when nothing comes: more than a tick of the kernel's
clock, for a shorter limit sets a timer each time, which costs more than the rest of the call."""
TURN = 5
"""Milliseconds after which other tasks get a turn, while one request follows the other."""
LONGEST = 10
"""Milliseconds after which it does not wait for the next piece of a reply, though one comes after
the other; its other tasks wait for so long at most."""

_served: trio.lowlevel.RunVar[tuple[int, ...]] = trio.lowlevel.RunVar("warabi-served", ())


@contextmanager
def serving(fd: int) -> Iterator[None]:
    """The loop lives for requests that come by *fd*, and may stand still until the next one.

    Who sends a request of his own over a connection may get its reply without a checkpoint.
    """
    before = _served.get()
    _served.set((*before, fd))
    try:
        yield
    finally:
        _served.set(before)


class Lull:
    """Waits at one descriptor.

    Args:
        fd: where replies come.
    """

    __slots__ = ("_end", "_fd", "_poll", "_served")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0.0
        self._served: tuple[int, ...] = ()
        self._poll = select.poll()

    @property
    def turn(self) -> int:
        """Nanoseconds for which a task may do nothing but requests; 0 where nothing is served."""
        return TURN * 1_000_000 if _served.get() else 0

    def begin(self) -> None:
        """A request was sent."""
        self._end = time.monotonic() + LONGEST / 1000

    def wait(self) -> bool:
        """Whether there is something to receive, within a moment and before anything else comes.

        False at once in a loop that does not say what it serves.
        """
        served = _served.get()
        if served is not self._served:
            self._poll = select.poll()
            for fd in (self._fd, *served):
                self._poll.register(fd, select.POLLIN)
            self._served = served
        if not served or time.monotonic() > self._end:
            return False
        return [fd for fd, _ in self._poll.poll(MOMENT)] == [self._fd]

"""Adaptive busy polling before blocking.

Waking a sleeping process on another core takes 40 to 50 µs, longer than most requests.  So one side
of a connection whose messages follow each other closely polls for the next one for a moment before
it blocks.  Between two polls it yields its core (sched_yield(2)), to the peer among others if both
have only one core.

After many bytes it polls for longer, since then more than the wake-up counts: a woken process often
runs on the waker's core, and begins to receive only when all has been sent.  A receiver that is
faster than the sender also polls for the next chunk within a message; otherwise it would sleep and
be woken for each 64 KiB.

On a busy machine a yielded core comes back late; then blocking is better for a while, because the
scheduler prefers a process that was just woken.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from time import perf_counter_ns

from warabi._core.backoff import Pause
from warabi._core.tuning import POLL_LATE, POLL_LONGEST, POLL_MOMENT, POLL_PAUSE, POLL_SOON

UNKNOWN, NOTHING = -2, -1
"""What an interrupted :meth:`BusyPoll.receive` has received, if not a number of bytes."""

Receive = Callable[[memoryview, int, int], int]
"""``socket.recv_into``, or a function with its signature."""


class BusyPoll:
    """The polling state of one side of a connection."""

    __slots__ = ("_flows", "_moved", "_pause", "_soon", "received")

    def __init__(self) -> None:
        self.received = UNKNOWN  # by the current :meth:`receive`, if its caller resets it
        self._soon = False
        self._flows = True  # the next chunk of a message is expected soon
        self._moved = 0  # bytes since the last message
        self._pause = Pause(*POLL_PAUSE)

    def receive(self, receive: Receive, place: memoryview) -> int:
        """Call *receive*, which may block, after polling for a moment."""
        began = perf_counter_ns()
        count = self.look(receive, place, began) if self._soon else -1
        if count < 0:
            # In one step, see interrupts.py: if a signal handler raises, either nothing was
            # received, or *received* contains the count.
            self.received = NOTHING
            (self.received,) = map(receive, (place,), (0,), (0,))
            count = self.received
            self.came(began)
        return count

    def look(self, receive: Receive, place: memoryview, began: int, *, wait: bool = True) -> int:
        """Receive pending data or, with *wait*, poll for a moment if data are expected; -1 if
        nothing arrived.  *began* is the current time."""
        more = min(self._moved, POLL_LONGEST)
        until = self.until(began) if wait else began
        count = self._look(receive, place, began, until, POLL_LATE + more)
        if count >= 0:
            self._moved = count
        return count

    def piece(self, receive: Receive, place: memoryview, began: int, *, wait: bool = True) -> int:
        """The same as :meth:`look` within a message: the sender is expected to be sending, unless
        it was slow before."""
        until = began
        if wait and self._flows and began >= self._pause.end:
            until += POLL_MOMENT
        return self._look(receive, place, began, until, POLL_LATE)

    def _look(self, receive: Receive, place: memoryview, before: int, until: int, late: int) -> int:
        while True:
            try:
                return receive(place, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if before >= until:
                    return -1
            before = self._offer(before, late)

    def until(self, began: int) -> int:
        """Return until when to poll; *began*, the current time, if nothing is expected."""
        if self._soon and began >= self._pause.end:
            return began + POLL_MOMENT + min(self._moved, POLL_LONGEST)
        return began

    def offer(self, before: int) -> int:
        """Yield the core after a poll at the time *before*; return the current time."""
        return self._offer(before, POLL_LATE + min(self._moved, POLL_LONGEST))

    def _offer(self, before: int, late: int) -> int:
        os.sched_yield()
        now = perf_counter_ns()
        if now - before > late:
            self._pause.begin(now, now)
        return now

    def came(self, began: int) -> None:
        """Record that data arrived after blocking since *began*."""
        self._soon = perf_counter_ns() - began < POLL_SOON + min(self._moved, POLL_LONGEST)
        self._moved = 0

    def message(self, count: int) -> None:
        """Record a message, *count* bytes of which were received other than by :meth:`look`."""
        self._moved = count

    def piece_came(self, began: int) -> None:
        """Record that the next chunk of a message arrived after blocking since *began*."""
        self._flows = perf_counter_ns() - began < POLL_SOON

    def moved(self, count: int) -> None:
        """Record *count* bytes that were received or sent other than by :meth:`look`."""
        self._moved += count


class Attention:
    """Tracks from which of an event loop's connections messages arrive.

    While the loop polls one connection it serves no other; so it polls only if one is active.
    """

    __slots__ = ("_latest", "_since")

    ALONE = 2_000_000
    """Nanoseconds without a message from another connection."""

    def __init__(self) -> None:
        self._latest: object = None
        self._since = 0

    def give(self, connection: object, now: int) -> None:
        """Record that a message arrived from *connection*."""
        if connection is not self._latest:
            self._latest = connection
            self._since = now

    def alone(self, connection: object, now: int) -> bool:
        """Whether no message arrived from another connection recently."""
        return connection is self._latest and now - self._since > self.ALONE

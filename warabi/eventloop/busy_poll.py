"""Waiting for what is about to come, without going to sleep.

A process that sleeps is woken on another core in 40 to 50 µs, which is more than most requests
take.  So a side of a connection to which messages come shortly one after another looks for the next
one for a moment, again and again, before it sleeps.  Between two looks it offers its core to others
(sched_yield(2)), among them, where both sides have but one core, the one that it waits for.

After many bytes the moment is longer, for with those it is not the wake-up alone that counts: who
is woken often finds himself on the waker's core, and begins to receive when all has been sent.
So a receiver that is quicker than the sender looks for the next piece of a message, too: else it
would sleep, and be woken, for each 64 KiB.

An offered core comes back late where others have much to do; then sleeping is better for a while,
because who is woken goes before them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from time import perf_counter_ns

from warabi._core.backoff import Pause

_MOMENT = 100_000
"""Nanoseconds for which to look at most."""
_LONGEST = 1_000_000
"""So much longer at most, a nanosecond for each byte that was moved since the last message came:
what a stream of a GB/s takes from one message to the next."""
_SOON = 150_000
"""A message that woke a sleeper so soon, in nanoseconds, would have come within the moment."""
_LATE = 500_000
"""A core that stays away for so long was given to somebody who does not only answer."""
_PAUSE = (5_000_000, 160_000_000)
"""Nanoseconds for which nothing is looked for then: at first, and at most if that happens again."""

UNKNOWN, NOTHING = -2, -1
"""What an interrupted :meth:`Lookout.receive` has received, if not a number of bytes."""

Receive = Callable[[memoryview, int, int], int]
"""``socket.recv_into``, or what stands for it."""


class Lookout:
    """What one side of a connection knows of when the next message comes."""

    __slots__ = ("_flows", "_moved", "_pause", "_soon", "received")

    def __init__(self) -> None:
        self.received = UNKNOWN  # by the present :meth:`receive`, where its caller resets it
        self._soon = False
        self._flows = True  # the next piece of a message comes soon
        self._moved = 0  # bytes since the last message came
        self._pause = Pause(*_PAUSE)

    def receive(self, receive: Receive, place: memoryview) -> int:
        """As *receive*, which may sleep; with a look or two before."""
        began = perf_counter_ns()
        count = self.look(receive, place, began) if self._soon else -1
        if count < 0:
            # In one step, see interrupts.py: when a signal's handler raises, either nothing was
            # received, or *received* tells how much.
            self.received = NOTHING
            (self.received,) = map(receive, (place,), (0,), (0,))
            count = self.received
            self.came(began)
        return count

    def look(self, receive: Receive, place: memoryview, began: int, *, wait: bool = True) -> int:
        """Receive what is there or, with *wait*, what comes within a moment, if that is to be
        expected; -1 when nothing did.  *began* is the present time."""
        more = min(self._moved, _LONGEST)
        until = self.until(began) if wait else began
        count = self._look(receive, place, began, until, _LATE + more)
        if count >= 0:
            self._moved = count
        return count

    def piece(self, receive: Receive, place: memoryview, began: int, *, wait: bool = True) -> int:
        """As :meth:`look`, in the middle of a message: the sender is at it, unless it has been
        slow before."""
        until = began
        if wait and self._flows and began >= self._pause.end:
            until += _MOMENT
        return self._look(receive, place, began, until, _LATE)

    def _look(self, receive: Receive, place: memoryview, before: int, until: int, late: int) -> int:
        while True:
            try:
                return receive(place, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if before >= until:
                    return -1
            before = self._offer(before, late)

    def until(self, began: int) -> int:
        """Until when to look for what is to be expected; *began*, the present, if nothing is."""
        if self._soon and began >= self._pause.end:
            return began + _MOMENT + min(self._moved, _LONGEST)
        return began

    def offer(self, before: int) -> int:
        """Offer the core to others, after a look at the time *before*; returns the present time."""
        return self._offer(before, _LATE + min(self._moved, _LONGEST))

    def _offer(self, before: int, late: int) -> int:
        os.sched_yield()
        now = perf_counter_ns()
        if now - before > late:
            self._pause.begin(now, now)
        return now

    def came(self, began: int) -> None:
        """Something came to who slept, and waited since *began*."""
        self._soon = perf_counter_ns() - began < _SOON + min(self._moved, _LONGEST)
        self._moved = 0

    def message(self, count: int) -> None:
        """A message came, of which so many bytes were received otherwise than by :meth:`look`."""
        self._moved = count

    def piece_came(self, began: int) -> None:
        """The next piece of a message came to who slept, and waited since *began*."""
        self._flows = perf_counter_ns() - began < _SOON

    def moved(self, count: int) -> None:
        """So many bytes were received or sent otherwise than by :meth:`look`."""
        self._moved += count


class Attention:
    """Which of an event loop's connections the messages come from.

    While one is looked at, nobody else is served; so that is done only for one that is alone.
    """

    __slots__ = ("_latest", "_since")

    ALONE = 2_000_000
    """Nanoseconds without a message from another connection."""

    def __init__(self) -> None:
        self._latest: object = None
        self._since = 0

    def give(self, connection: object, now: int) -> None:
        """Something came from *connection*."""
        if connection is not self._latest:
            self._latest = connection
            self._since = now

    def alone(self, connection: object, now: int) -> bool:
        """Whether nothing came from others lately."""
        return connection is self._latest and now - self._since > self.ALONE

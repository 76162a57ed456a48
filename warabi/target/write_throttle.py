"""Writes that mostly do not wait, made where nobody may wait for as long as they are quick.

A write of a file goes to the page cache.  But the kernel holds up who writes faster than the medium
takes it, and first reads a page of which only a part changes.  It tells only afterwards, by the
time that it took.  An event loop that met that has threads make its writes for a while, and ever
longer if the next one that it tries itself is slow, too.
"""

from __future__ import annotations

from warabi._core.backoff import Pause

_SLOW = 5_000_000
"""Nanoseconds that no write takes which only copies a page or two, but on a very busy machine."""
_COPYING = 5
"""Nanoseconds for each byte that is copied, at most."""
_PAUSE = (50_000_000, 3_200_000_000)
"""Nanoseconds for which no write is tried after a slow one: at first, and at most."""


class Pace:
    """What an event loop knows of how long writes take.  Times are nanoseconds of one clock."""

    __slots__ = ("_pause",)

    def __init__(self) -> None:
        self._pause = Pause(*_PAUSE)

    def slow(self, now: int) -> bool:
        """Whether a write had better be made elsewhere."""
        return now < self._pause.end

    def wrote(self, size: int, began: int, now: int) -> None:
        """A write of *size* bytes, made at once, took from *began* to *now*."""
        if now - began > _SLOW + _COPYING * size:
            self._pause.begin(began, now)

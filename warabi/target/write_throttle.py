"""Decide whether an event loop makes short writes itself or has threads make them.

A write of a file goes to the page cache and usually does not block.  But the kernel throttles a
process that writes faster than the storage device, and first reads a page that is written only in
part.  This shows only afterwards, in how long the write took.  After a slow write the event loop
has threads make its writes for a while, and for ever longer if the next write that it tries itself
is slow, too.
"""

from __future__ import annotations

from warabi._core.backoff import Pause
from warabi._core.tuning import SLOW_WRITE, SLOW_WRITE_BYTE, SLOW_WRITE_PAUSE


class Pace:
    """How long recent writes of an event loop took.  Times are nanoseconds of one clock."""

    __slots__ = ("_pause",)

    def __init__(self) -> None:
        self._pause = Pause(*SLOW_WRITE_PAUSE)

    def slow(self, now: int) -> bool:
        """Whether writes should be made by threads at *now*."""
        return now < self._pause.end

    def wrote(self, size: int, began: int, now: int) -> None:
        """A write of *size* bytes, made at once, took from *began* to *now*."""
        if now - began > SLOW_WRITE + SLOW_WRITE_BYTE * size:
            self._pause.begin(began, now)

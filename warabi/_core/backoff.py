"""Not trying again for a while what went badly."""

from __future__ import annotations


class Pause:
    """A time in which something is not tried, which is longer if it soon goes badly again.

    Args:
        least: how long at first, in nanoseconds.
        most: how long at most.

    Attributes:
        end: when it ends, by the clock of those who begin it.
    """

    __slots__ = ("_least", "_length", "_most", "end")

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._length = 0
        self.end = 0

    def begin(self, tried: int, now: int) -> None:
        """What was *tried* at that time has gone badly."""
        soon = tried < self.end + self._length
        self._length = min(2 * self._length, self._most) if soon else self._least
        self.end = now + self._length

"""Exponential backoff after failures."""

from __future__ import annotations


class Pause:
    """An interval without attempts, which doubles if the next attempt soon fails again.

    Args:
        least: initial length in nanoseconds.
        most: maximal length.

    Attributes:
        end: when it ends, by the caller's clock.
    """

    __slots__ = ("_least", "_length", "_most", "end")

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._length = 0
        self.end = 0

    def begin(self, tried: int, now: int) -> None:
        """Begin an interval: the attempt at the time *tried* has failed."""
        soon = tried < self.end + self._length
        self._length = min(2 * self._length, self._most) if soon else self._least
        self.end = now + self._length

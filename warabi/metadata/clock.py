"""Times of inodes: coarse like Linux's, and exact if a change could otherwise go unnoticed.

Every change of a region's times must be written to stable storage by the next sync.  So times
advance once per tick of the kernel's clock (1 to 10 ms) and not with every write, as in other file
systems.  But a time that a client has seen must not stand for later changes, too, or it could not
tell two contents apart: then the exact time is used.  Coarse times never precede exact times that
were used before, so that a later change, of whatever inode, never has an earlier time.

The change time of an inode never goes back, and differs whenever any of its times do, even if the
clock is set back.  ``target/commit.py`` relies on that.
"""

from __future__ import annotations

import time

from warabi.metadata.domain import TIME_MIN
from warabi.metadata.inode import Inode

_COARSE = 5
"""CLOCK_REALTIME_COARSE of Linux, which the module ``time`` does not define."""
_SECOND = 10**9


class Clock:
    """Sets the times of inodes; protected by the same lock as the inodes."""

    def __init__(self) -> None:
        self._given = 0  # the last exact time

    def exact(self) -> int:
        """Return the current time in nanoseconds since the epoch."""
        self._given = time.time_ns()
        return self._given

    def _coarse(self) -> int:
        now = time.clock_gettime_ns(_COARSE)
        return self._given if now < self._given < now + _SECOND else now

    def wrote_at(self, inode: Inode, when: int) -> None:
        """Set the times of *inode* for a write at *when*, as reported by the writer."""
        when = max(TIME_MIN, min(when, time.time_ns()))
        self._given = max(self._given, when)
        inode.changed_at(when)
        inode.mtime = when

    def file_wrote_at(self, inode: Inode, when: int) -> None:
        """The same as :meth:`wrote_at`, with the time of the region's file, which is from the
        kernel's coarse clock and may precede times that were used before."""
        if when < self._given < when + _SECOND:
            when = self._given
        if when <= inode.mtime < when + _SECOND:
            when = inode.mtime + 1
        self.wrote_at(inode, when)

    def wrote(self, inode: Inode) -> None:
        """Set the times of *inode* for a write just now."""
        now = self._coarse()
        if now <= inode.ctime:
            unseen = inode.seen != inode.ctime == inode.mtime
            if unseen and inode.ctime < now + _SECOND:
                return
            now = self.exact()
        inode.changed_at(now)  # before mtime: readers without the lock check it for changes
        inode.mtime = now

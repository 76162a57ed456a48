"""When things changed, as Linux tells it: to the tick, and finer where somebody would notice.

A region that is written and synced all the time has its times put on the medium each time that
they change.  So they change once in a tick of the kernel's clock (1 to 10 ms) and not with every
write, as the times of other file systems do.  But times that somebody has seen must not stand for
later changes as well, or two contents could not be told apart by them: then the exact time is
taken.  Coarse times never come before exact ones that were given earlier, so that what changed
later, in whatever inode, has no earlier time.

The change time of an inode never goes back, and differs whenever any of its times do, also when
the clock is set back.  ``target/commit.py`` relies on that.
"""

from __future__ import annotations

import time

from warabi.metadata.domain import TIME_MIN
from warabi.metadata.inode import Inode

_COARSE = 5
"""CLOCK_REALTIME_COARSE of Linux, which the module ``time`` does not name."""
_SECOND = 10**9


class Clock:
    """Gives inodes their times; the lock that guards those guards this, too."""

    def __init__(self) -> None:
        self._given = 0  # the last exact time

    def exact(self) -> int:
        """Nanoseconds since the epoch."""
        self._given = time.time_ns()
        return self._given

    def _coarse(self) -> int:
        now = time.clock_gettime_ns(_COARSE)
        return self._given if now < self._given < now + _SECOND else now

    def wrote_at(self, inode: Inode, when: int) -> None:
        """The bytes of *inode* changed at *when*, as who wrote them says."""
        when = max(TIME_MIN, min(when, time.time_ns()))
        self._given = max(self._given, when)
        inode.changed_at(when)
        inode.mtime = when

    def file_wrote_at(self, inode: Inode, when: int) -> None:
        """As :meth:`wrote_at`, as the region's file says, by the kernel's coarse clock: that may be
        before times that were given earlier."""
        if when < self._given < when + _SECOND:
            when = self._given
        if when <= inode.mtime < when + _SECOND:
            when = inode.mtime + 1
        self.wrote_at(inode, when)

    def wrote(self, inode: Inode) -> None:
        """The bytes of *inode* changed just now."""
        now = self._coarse()
        if now <= inode.ctime:
            unseen = inode.seen != inode.ctime == inode.mtime
            if unseen and inode.ctime < now + _SECOND:
                return
            now = self.exact()
        inode.changed_at(now)  # first: who asks without the lock looks whether it changed
        inode.mtime = now

"""Ordering of a mount's pending writes and reads of the same bytes.

The kernel does not lock the pages of a write after filling them: it may drop and read them again
before the write is sent or completed.  The result of such a read stays in the page cache.

* A read that arrives after the write must return the written data.  It waits for the write, even
  if it could be served sooner, from shared memory or while a thread writes.
* A read that arrived shortly before the write returned the old data.  That is correct only if the
  writing thread itself issued the read, since it got its data before it wrote.  After a read by
  another thread the kernel is notified, when the write ends, to drop the pages that were written.

``thread`` is the number of the thread that reads or writes; 0 is an unknown one, and ``KERNEL`` is
writeback, during which the kernel locks the pages.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import trio

from warabi._core.caller import CALLER
from warabi._core.tuning import RECENT_READ
from warabi.region import RegionID

KERNEL = -1
_MOST_READS, _MOST_INODES = 64, 1024
_PAGE = 4096


class Writes:
    """The writes of one mount.

    Attributes:
        under_way: pending writes, in the order in which they began.
        drop: makes the kernel drop cached pages, asynchronously: inode, offset, size in bytes.
    """

    def __init__(self) -> None:
        self.under_way: list[Write] = []
        self.drop: Callable[[int, int, int], None] = lambda ino, offset, size: None
        # By inode: time, thread, first byte, end.
        self._reads: dict[int, deque[tuple[float, int, int, int]]] = {}

    async def after_appends(self, write: Write) -> None:
        """Return when the appends to the same file that began before *write* have ended.

        The kernel sends the parts of a large asynchronous append without waiting for replies.
        """
        write.appends = True
        for other in self.under_way.copy():
            if other is write:
                return
            if other.appends and other.region == write.region:
                await other.wait()

    def one(self, region: RegionID, thread: int, offset: int, size: int) -> Write:
        """Return a context manager: a write by *thread* that is pending inside the block."""
        return Write(self, region, thread, offset, offset + size)

    def check(self, ino: int, thread: int, start: int, end: int) -> None:
        """After a write by *thread*, drop pages that other threads read shortly before it."""
        if thread == KERNEL:
            return
        start, end = start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE
        since = time.monotonic() - RECENT_READ
        for when, reader, first, last in self._reads.get(ino, ()):
            if when > since and first < end and start < last and (reader != thread or not thread):
                self.drop(ino, start, end - start)
                return

    async def follow(self, region: RegionID, offset: int, size: int) -> None:
        """Before a write: wait for pending overlapping writes whose programs were killed.

        The kernel then no longer serializes them with new writes, which must take effect later.
        """
        for write in self.under_way.copy():
            if write.is_left and write.overlaps(region, offset, offset + size):
                await write.wait()

    async def read(self, region: RegionID, thread: int, offset: int, size: int) -> None:
        """Before a read by *thread*: wait for the overlapping writes that are pending now."""
        end = offset + size
        reads = self._reads.get(region.slot)
        if reads is None:
            if len(self._reads) >= _MOST_INODES:
                self._reads.clear()
            reads = self._reads[region.slot] = deque(maxlen=_MOST_READS)
        reads.append((time.monotonic(), thread, offset, end))
        for write in self.under_way.copy():
            if write.overlaps(region, offset, end):
                await write.wait()


class Write:
    """A pending write."""

    __slots__ = ("_caller", "_ended", "_writes", "appends", "end", "region", "start", "thread")

    def __init__(self, writes: Writes, region: RegionID, thread: int, start: int, end: int) -> None:
        self._writes = writes
        self.thread = thread
        self._ended: trio.Event | None = None
        self.appends = False
        self._caller = CALLER.get()
        self.region = region
        self.start = start
        self.end = end

    def overlaps(self, region: RegionID, start: int, end: int) -> bool:
        """Whether it writes some of these bytes."""
        return self.region == region and self.start < end and start < self.end

    @property
    def is_left(self) -> bool:
        """Whether the program that wrote was killed, and does not wait for the result."""
        return self._caller is not None and self._caller.gone

    async def wait(self) -> None:
        """Return when it has ended, successfully or not."""
        if self in self._writes.under_way:
            self._ended = self._ended or trio.Event()
            await self._ended.wait()

    def __enter__(self) -> Write:
        self._writes.under_way.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._writes.under_way.remove(self)
        self._writes.check(self.region.slot, self.thread, self.start, self.end)
        if self._ended is not None:
            self._ended.set()

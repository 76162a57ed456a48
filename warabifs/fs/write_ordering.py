"""Writes of a mount that take time, and reads of the same bytes.

The kernel does not hold the pages of a write once they are filled: they may be dropped, and read
anew, before it is sent or answered.  What such a read brings stays in the page cache.

* A read that comes after the write must bring what the write stores, and waits for it, though it
  could be answered sooner, from shared memory or beside a thread that writes.
* One that came shortly before it brought what was before.  Whose read it was tells whether that can
  be: not who writes, who has the bytes that he read by then.  Of what somebody else read the kernel
  is told, after the write, to drop the pages that were written.

Who reads or writes is the number of a thread; 0 is nobody that is known, and ``KERNEL`` holds the
pages that it writes back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import trio

from warabi._core.caller import CALLER
from warabi.region import RegionID

KERNEL = -1
_LATELY = 1.0
"""Seconds from a read to a write that the kernel may have been about to send by then."""
_MOST_READS, _MOST_INODES = 64, 1024
_PAGE = 4096


class Writes:
    """Those of one mount.

    Attributes:
        under_way: in the order in which they began.
        drop: has the kernel drop bytes of an inode, from one on, so many; later.
    """

    def __init__(self) -> None:
        self.under_way: list[Write] = []
        self.drop: Callable[[int, int, int], None] = lambda ino, offset, size: None
        # By inode: when, by whom, from which byte to which.
        self._reads: dict[int, deque[tuple[float, int, int, int]]] = {}

    async def after_appends(self, write: Write) -> None:
        """Return when the appends to the same file that began before *write* have ended.

        The kernel sends the parts of a large asynchronous one without waiting for answers.
        """
        write.appends = True
        for other in self.under_way.copy():
            if other is write:
                return
            if other.appends and other.region == write.region:
                await other.wait()

    def one(self, region: RegionID, who: int, offset: int, size: int) -> Write:
        """A write of *size* bytes at *offset*, under way for as long as the block runs, by
        *who*."""
        return Write(self, region, who, offset, offset + size)

    def check(self, ino: int, who: int, start: int, end: int) -> None:
        """A write by *who* has ended: have pages dropped that others read shortly before."""
        if who == KERNEL:
            return
        start, end = start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE
        since = time.monotonic() - _LATELY
        for when, reader, first, last in self._reads.get(ino, ()):
            if when > since and first < end and start < last and (reader != who or not who):
                self.drop(ino, start, end - start)
                return

    async def follow(self, region: RegionID, offset: int, size: int) -> None:
        """Some bytes are about to be written: return when writes of any of them have ended whose
        programs were killed.  The kernel lets others write there then, and theirs come later."""
        for write in self.under_way.copy():
            if write.is_left and write.overlaps(region, offset, offset + size):
                await write.wait()

    async def read(self, region: RegionID, who: int, offset: int, size: int) -> None:
        """Some bytes are about to be read by *who*: return when writes of any of them have
        ended that are under way now."""
        end = offset + size
        reads = self._reads.get(region.slot)
        if reads is None:
            if len(self._reads) >= _MOST_INODES:
                self._reads.clear()
            reads = self._reads[region.slot] = deque(maxlen=_MOST_READS)
        reads.append((time.monotonic(), who, offset, end))
        for write in self.under_way.copy():
            if write.overlaps(region, offset, end):
                await write.wait()


class Write:
    """One of them."""

    __slots__ = ("_caller", "_ended", "_writes", "appends", "end", "region", "start", "who")

    def __init__(self, writes: Writes, region: RegionID, who: int, start: int, end: int) -> None:
        self._writes = writes
        self.who = who
        self._ended: trio.Event | None = None
        self.appends = False
        self._caller = CALLER.get()
        self.region = region
        self.start = start
        self.end = end

    def overlaps(self, region: RegionID, start: int, end: int) -> bool:
        """Whether it is a write of any of these bytes."""
        return self.region == region and self.start < end and start < self.end

    @property
    def is_left(self) -> bool:
        """Whether the program that wrote was killed, and does not wait for its end."""
        return self._caller is not None and self._caller.gone

    async def wait(self) -> None:
        """Return when it has ended, well or not."""
        if self in self._writes.under_way:
            self._ended = self._ended or trio.Event()
            await self._ended.wait()

    def __enter__(self) -> Write:
        self._writes.under_way.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._writes.under_way.remove(self)
        self._writes.check(self.region.slot, self.who, self.start, self.end)
        if self._ended is not None:
            self._ended.set()
